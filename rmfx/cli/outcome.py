"""What a finished command says and how it leaves."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import typer

from rmfx.cli import console
from rmfx.deploy.signature import Signature, read_signature
from rmfx.errors import PartialConversionWarning, RmfxError
from rmfx.files.atomic import demand_writable
from rmfx.report import Report

REFUSED = 3
PARTIAL = 4


def leave_if_refused(report: Report, strict: bool) -> None:
    """With ``--strict``, leave with code 3 when the report holds a refused sum."""
    if strict and report.count("refused"):
        raise typer.Exit(REFUSED)


@contextlib.contextmanager
def without_warning() -> Iterator[None]:
    """Keep what the report and the exit code say about partial conversion from being said a third time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PartialConversionWarning)
        yield


def leave_if_partial(report: Report) -> None:
    """Leave with code 4 when only parts of the model were converted."""
    if report.left_out:
        raise typer.Exit(PARTIAL)


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse an output path early, before any long work.

    Raises:
        typer.BadParameter: for an unknown suffix.
        RmfxError: when no file can be written there.
    """
    if path.suffix not in suffixes:
        raise typer.BadParameter(f"{path}: the name must end in {' or '.join(suffixes)}")
    demand_writable(path, RmfxError)


def one_output(argument: Path | None, option: Path | None) -> Path:
    """The path given as OUTPUT or with ``--output``.

    Raises:
        typer.BadParameter: when there is none, or both.
    """
    given = [path for path in (argument, option) if path is not None]
    if len(given) != 1:
        raise typer.BadParameter("give the file to write once: as OUTPUT or with --output FILE")
    return given[0]


def tell_written(path: Path, original: Signature | None) -> None:
    """Say what was written: of an ONNX file its opset, and which free sizes of ``original`` are fixed in it."""
    if path.suffix != ".onnx":
        console.out(f"wrote {path}")
        return
    if original is not None and original.free:
        console.note(f"only the batch stays free; fixed as in the example input: {', '.join(original.free)}")
    console.out(f"wrote {path} (opset {read_signature(path).opset})")
