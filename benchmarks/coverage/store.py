"""The file of rows: one JSON object per line, appended whole, the last one of a network counts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

Row = dict[str, Any]
RUNS = RESULTS / "coverage.jsonl"


def read(path: Path) -> dict[str, Row]:
    """The last row of each network; nothing where there is no file yet."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["model"]: row for row in rows}


def append(path: Path, row: Row) -> None:
    """Add one row in one write, so that an interruption leaves whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, allow_nan=True) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def compact(path: Path, names: Iterable[str]) -> None:
    """Keep one row per network, in the order of ``names``; the file is replaced in one step."""
    rows = read(path)
    lines = [json.dumps(rows[name], allow_nan=True) + "\n" for name in names if name in rows]
    beside = path.with_suffix(".part")
    beside.write_text("".join(lines), encoding="utf-8")
    os.replace(beside, path)
