"""Prints the rows: per source and class, reasons ranked, what went wrong, and the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.coverage.classes import CLASSES, MERGE
from benchmarks.coverage.figures import EASY, Figure, count, figures
from benchmarks.coverage.store import Row

CONSOLE = Console(width=150)
RANKED = 40
SLOW = 60.0  # seconds
TROUBLE = ("wrong", "crashed", "timeout", "unbuildable", "refused")


def show(rows: Mapping[str, Row], names: Sequence[str]) -> bool:
    """Print everything about the networks ``names``; whether all figures are reached."""
    chosen = [rows[name] for name in names if name in rows]
    _show_statuses(chosen, len(names))
    for source in sorted({row["source"] for row in chosen}):
        _show_classes(source, [row for row in chosen if row["source"] == source])
    _show_reasons(chosen)
    _show_trouble(chosen)
    return _show_figures(figures(rows, names))


def _show_statuses(rows: Sequence[Row], expected: int) -> None:
    statuses = Counter(row["status"] for row in rows)
    doors = Counter(row.get("entered", "none") for row in rows)
    CONSOLE.print(f"{len(rows)} of {expected} networks:", ", ".join(f"{n} {s}" for s, n in statuses.most_common()))
    CONSOLE.print("entered by:", ", ".join(f"{door} {number}" for door, number in doors.most_common()))


def _show_classes(source: str, rows: Sequence[Row]) -> None:
    columns = ("class", "sums", "removed", "", "planned", "refused", "kept", "missing")
    table = Table(*columns, title=f"residual sums of {source}")
    for name, classes in [*((kind, kind) for kind in CLASSES), ("A to G", EASY), ("all", CLASSES)]:
        found = count(rows, classes)
        total = found.total()
        share = f"{100 * found['removed'] / total:.1f} %" if total else "-"
        states = (str(found[state]) for state in ("planned", "refused", "kept", "missing"))
        table.add_row(name, str(total), str(found["removed"]), share, *states, end_section=name in "KG")
    merges = sum(sum(row.get("sums", {}).get(MERGE, {}).values()) for row in rows)
    table.caption = f"beside them {merges} merges of two nonlinear branches"
    CONSOLE.print(table)


def _show_reasons(rows: Sequence[Row]) -> None:
    by_class: dict[str, Counter[str]] = {}
    for row in rows:
        for kind, reason, number in row.get("reasons", ()):
            by_class.setdefault(kind, Counter())[reason] += number
    overall: Counter[str] = Counter()
    for kind, reasons in by_class.items():
        if kind != MERGE:
            overall += reasons
    _show_ranking("reasons of all residual sums that stay", overall, RANKED)
    for kind in sorted(by_class):
        _show_ranking(f"reasons in class {kind}", by_class[kind], RANKED // 3)


def _show_ranking(title: str, reasons: Counter[str], length: int) -> None:
    table = Table("sums", "reason", title=title, title_justify="left")
    for reason, number in reasons.most_common(length):
        table.add_row(str(number), reason or "(none given)")
    rest = reasons.most_common()[length:]
    if rest:
        table.add_row(str(sum(number for _, number in rest)), f"({len(rest)} more reasons)")
    CONSOLE.print(table)


def _show_trouble(rows: Sequence[Row]) -> None:
    for status in TROUBLE:
        for row in (row for row in rows if row["status"] == status):
            what = row.get("error") or f"difference {row['difference']:.3g}, noise {row['noise']:.3g}"
            CONSOLE.print(f"[red]{status}[/] {row['model']}:", what, highlight=False, markup=True)
    slow = sorted((row for row in rows if _seconds(row) > SLOW), key=_seconds, reverse=True)
    for row in slow:
        CONSOLE.print(f"slow {row['model']}: {_seconds(row):.0f} s", highlight=False)


def _seconds(row: Row) -> float:
    return row.get("seconds", {}).get("total", 0.0)


def _show_figures(found: Sequence[Figure]) -> bool:
    table = Table("figure", "measured", "bound", "", title="coverage")
    for figure in found:
        mark = "[green]reached[/]" if figure.reached else "[bold red]NOT REACHED[/]"
        bound = f"{'at least' if figure.at_least else 'at most'} {figure.shown(figure.bound)}"
        table.add_row(figure.name, figure.shown(figure.value), bound, mark)
    CONSOLE.print(table)
    return all(figure.reached for figure in found)
