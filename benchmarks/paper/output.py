"""Where results go: a table on the terminal, JSON with every sample, figures as PNG and SVG."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import CONSOLE, Figure, provenance
from benchmarks.paper.setting import Setting
from benchmarks.paper.store import rows_in
from rmfx.errors import RmfxError
from rmfx.files.atomic import replacing

_WIDTH = 180  # of tables in files


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*("-" if cell is None else str(cell) for cell in row))
    console = CONSOLE if CONSOLE.is_terminal else Console(width=_WIDTH)
    console.print(table)


def _measured_on(setting: Setting) -> dict[str, list[str]]:
    """The devices that trainings and speeds in the folder come from; each of their rows says more."""
    found = {}
    for kind in ("runs", "speeds"):
        where_from = [row["provenance"] for row in rows_in(setting.folder / f"{kind}.jsonl")]
        found[kind] = sorted({f"{p['gpu'] or p['cpu']}, torch {p['torch']}" for p in where_from})
    return found


def save(name: str, setting: Setting, content: dict[str, Any]) -> None:
    """Write ``<folder>/<name>.json``."""
    if not setting.write:
        return
    setting.folder.mkdir(parents=True, exist_ok=True)
    if setting.dtype != torch.float32:
        name = f"{name}_{str(setting.dtype).removeprefix('torch.')}"
    origin = {"provenance": provenance(setting.device), "measured_on": _measured_on(setting), "quick": setting.quick}
    whole = {"benchmark": f"paper.{name}", **origin, **content}
    path = setting.folder / f"{name}.json"
    with replacing(path, RmfxError) as scratch:
        scratch.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    CONSOLE.print(f"written to {path}")


def leave(figures: Sequence[Figure]) -> None:
    """Exit with status 1 when one of ``figures`` is beyond its limit, saying which."""
    missed = [figure for figure in figures if not figure.reached]
    for figure in missed:
        CONSOLE.print(f"[red]missed[/] {figure.subject}: {figure.quantity} is {figure.value:.4g} > {figure.limit:.4g}")
    sys.exit(1 if missed else 0)


def off(subject: str, quantity: str, measured: float, paper: float, limit: float) -> Figure:
    """How far a number is from the paper's, relative to the paper's, as a figure with a limit."""
    return Figure(subject, f"{quantity}, relative distance to the paper's", abs(measured / paper - 1), limit)


def changed_predictions(runs: Sequence[dict[str, Any]]) -> list[Figure]:
    """How many test predictions each trained network changes when it is converted.

    In float32, two classes whose logits are equal up to rounding may swap: one image in a thousand is allowed for.
    """
    figures = []
    for run in runs:
        if "converted" in run:  # its training did not diverge
            converted, job = run["converted"], run["job"]
            changed = converted["predictions"] - converted["same_predictions"]
            subject = f"{job['network']}, seed {job['recipe']['seed']}"
            limit = converted["predictions"] / 1000
            figures.append(Figure(subject, "test predictions changed by conversion", changed, limit))
    return figures


def mean_and_spread(accuracies: Sequence[float]) -> str | None:
    """``95.31 % ± 0.12`` over seeds.

    >>> mean_and_spread([0.95, 0.96]), mean_and_spread([])
    ('95.50 % ± 0.71', None)
    """
    if not accuracies:
        return None
    spread = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{100 * statistics.mean(accuracies):.2f} %{spread}"


def as_dicts(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """For JSON."""
    return [{**asdict(figure), "reached": figure.reached} for figure in figures]


@contextmanager
def drawing(name: str, setting: Setting, columns: int = 1, rows: int = 1) -> Iterator[Any]:
    """Yield matplotlib axes ``[rows, columns]``; what was drawn is written to ``<name>.png`` and ``<name>.svg``.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "rmfx", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    yield axes
    if setting.write:
        setting.folder.mkdir(parents=True, exist_ok=True)
        for suffix in ("png", "svg"):
            path = setting.folder / f"{name}.{suffix}"
            with replacing(path, RmfxError) as scratch:
                figure.savefig(scratch, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
        CONSOLE.print(f"drawn to {setting.folder / name}.png and .svg")
    pyplot.close(figure)
