"""Where the command line writes: results to standard output, progress and errors to standard error."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rmfx.report import Report

_SILENT_SECONDS = 2.0  # work that takes longer says what it is doing, also in a log file
_UNITS = ((10**9, "G"), (10**6, "M"), (10**3, "k"))
_STATUS_STYLE = {"removed": None, "kept": "yellow", "refused": "red"}


def out(text: str) -> None:
    """Print one result line on standard output, unwrapped and unstyled."""
    print(text, file=sys.stdout)


def out_json(data: dict[str, Any]) -> None:
    """Print one JSON document on standard output."""
    print(json.dumps(data, indent=2, allow_nan=False), file=sys.stdout)


def note(text: str) -> None:
    """Print one line about the progress of the work on standard error."""
    print(text, file=sys.stderr)


def fail(text: str) -> None:
    """Print an error on standard error, in red on a terminal."""
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False)


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Show that ``what`` is being done: a spinner on a terminal, else one line when it takes over 2 seconds.

    What third-party libraries print meanwhile goes to standard error: standard output is for results.
    """
    with contextlib.redirect_stdout(sys.stderr), _spinner(what):
        yield


@contextlib.contextmanager
def _spinner(what: str) -> Iterator[None]:
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(f"{escape(what)} ..."):
            yield
        return
    timer = threading.Timer(_SILENT_SECONDS, note, (f"{what} ...",))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class StepBars:
    """One progress bar per kind of work; call it as ``bars(what, done, total)``.

    On a terminal it draws bars; in a log file it writes one line when a kind of work begins.
    """

    def __init__(self) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
        self._progress = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> StepBars:
        if self._progress.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
            if not self._progress.console.is_terminal:
                note(f"{what} ...")
        self._progress.update(self._tasks[what], completed=done, total=total)


class TimeBar:
    """A progress bar over a budget of seconds; call it with what is being done.

    On a terminal it draws a bar; in a log file it writes one line.
    """

    def __init__(self, title: str, seconds: float) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._title = title
        self._task = self._progress.add_task(title, total=seconds or None)
        self._started = time.monotonic()

    def __enter__(self) -> TimeBar:
        if self._progress.console.is_terminal:
            self._progress.start()
        else:
            note(f"{self._title} ...")
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def __call__(self, what: str) -> None:
        done = time.monotonic() - self._started
        self._progress.update(self._task, description=f"{self._title}: {escape(what)}", completed=done)


def show_report(report: Report) -> None:
    """Print a report: a coloured table on a terminal, else its plain text."""
    if not sys.stdout.isatty():
        out(str(report))
        return
    console = Console()
    if report.entries:
        console.print(_report_table(report))
    for entry in report.entries:
        for text in filter(None, (entry.reason, *entry.size_conditions)):
            console.print(f"{escape(entry.name)}: {escape(text)}", highlight=False)
    console.print(escape(report.summary()), highlight=False)
    for line in report.passes:
        console.print(f"{line.name}: {line.applied} applied, {len(line.refused)} refused", highlight=False)
    for text in (*report.left_out_lines(), *report.size_conditions, *report.concat_conditions):
        console.print(escape(text), highlight=False)
    for text in report.notes:
        console.print(f"note: {escape(text)}", highlight=False)


def _report_table(report: Report) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("place", overflow="fold")
    for title in ("kind", "status", "carrier"):
        table.add_column(title, no_wrap=True)
    for title in ("MACs", "parameters"):
        table.add_column(title, no_wrap=True, justify="right")
    for entry in report.entries:
        cells = (
            entry.name,
            entry.kind,
            entry.status,
            entry.carrier or "-",
            _growth(entry.macs_before, entry.macs_after),
            _growth(entry.params_before, entry.params_after),
        )
        table.add_row(*map(escape, cells), style=_STATUS_STYLE[entry.status])
    return table


def _growth(before: int | None, after: int | None) -> str:
    """How a count changes, like ``1.2 M x 1.87``.

    >>> _growth(1_200_000, 2_400_000), _growth(None, None)
    ('1.20 M x 2.00', '-')
    """
    if before is None or after is None:
        return "-"
    shown = next((f"{before / size:.2f} {unit}" for size, unit in _UNITS if before >= size), str(before))
    return f"{shown} x {after / before:.2f}" if before else f"0 -> {after}"
