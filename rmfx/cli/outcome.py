"""What a finished command says and how it leaves."""

from __future__ import annotations

from pathlib import Path

import typer

from rmfx.report import Report

REFUSED = 3


def leave_if_refused(report: Report, strict: bool) -> None:
    """With ``--strict``, leave with code 3 when the report holds a refused sum."""
    if strict and report.count("refused"):
        raise typer.Exit(REFUSED)


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse an output path early, before any long work.

    Raises:
        typer.BadParameter: for an unknown suffix or a folder that does not exist.
    """
    if path.suffix not in suffixes:
        raise typer.BadParameter(f"{path}: the name must end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{path}: the folder {path.parent} does not exist")
