"""Results that are kept row by row, so that an interrupted run loses nothing and none is measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.paper.setting import Setting

Row = dict[str, Any]


def rows_in(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append(path: Path, row: Row, setting: Setting) -> None:
    """Add one row, unless the setting says that nothing is written."""
    if setting.write:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
