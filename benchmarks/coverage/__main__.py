"""Coverage of torchvision and timm: each network is converted, run against the original, and its sums are counted.

Every classification and segmentation network of torchvision and every model of timm is built with seeded random
weights and hostile batch-norm statistics, converted in float64 and compared with the original, in a process of its
own. Each residual sum of the original graph has a class (``classes.py``), and an outcome: removed, or the reason why
not. One row per network goes to ``benchmarks/results/coverage.jsonl``; a run goes on where the last one stopped.

    python -m benchmarks.coverage                         run what has no row of these sources yet
    python -m benchmarks.coverage --models 'resnet*'      only these, with or without the source in front
    python -m benchmarks.coverage --explain               plan only, compute nothing; rows go to a temporary file
    python -m benchmarks.coverage --table                 the tables and the figures; exit status 1 where one is missed

Networks that do not fit into the memory are counted (planned) only; the row says so, and they never count as right.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.common import code_version, provenance
from benchmarks.coverage import store
from benchmarks.coverage.models import SOURCES, all_names, matching
from benchmarks.coverage.sweep import BLAMELESS, Plan, sweep
from benchmarks.coverage.table import show

GIB = 2**30
PLANS = Path(tempfile.gettempdir()) / "rmfx_coverage_plans.jsonl"
PROVENANCE = ("commit", "uncommitted_changes", "time", "python", "torch", "torchvision", "timm", "cpu")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the rows there are, run nothing")
    parser.add_argument("--explain", action="store_true", help="plan only; rows go elsewhere")
    parser.add_argument("--models", nargs="+", metavar="PATTERN", help="only these, such as 'timm:res*'")
    parser.add_argument("--zoo", choices=SOURCES, help="only this source")
    parser.add_argument("--only-failed", action="store_true", help="only those whose last row is a failure")
    parser.add_argument("--again", action="store_true", help="also those that have a row of these sources")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--memory", type=float, default=_free_memory(), help="GiB for all workers (default: 85 %%)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one network (default: 600)")
    parser.add_argument("--size", type=int, help="input size to try first; give --output, so that rows do not mix")
    parser.add_argument("--output", type=Path, help="the file of rows")
    return parser.parse_args()


def _free_memory() -> float:
    """85 % of what the system can give now, in GiB."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return round(0.85 * kib / 2**20, 1)


def main() -> int:
    """Run or print; the exit status."""
    arguments = _options()
    path = arguments.output or (PLANS if arguments.explain else store.RUNS)
    names = every = all_names()
    if arguments.zoo:
        names = [name for name in names if name.startswith(f"{arguments.zoo}:")]
    if arguments.models:
        names = matching(names, arguments.models)
    if not names:
        raise SystemExit("no network has such a name")
    if arguments.table:
        return 0 if show(store.read(path), names) else 1
    _run(_wanted(names, arguments, path), arguments, path)
    store.compact(path, every)
    return 0


def _wanted(names: list[str], arguments: argparse.Namespace, path: Path) -> list[str]:
    rows = store.read(path)
    if arguments.only_failed:
        return [name for name in names if rows.get(name, {}).get("status", "right") not in BLAMELESS]
    if arguments.again:
        return names
    now = code_version()
    return [name for name in names if rows.get(name, {}).get("code") != now]


def _run(names: list[str], arguments: argparse.Namespace, path: Path) -> None:
    plan = Plan(
        arguments.workers, int(arguments.memory * GIB), arguments.timeout, not arguments.explain, arguments.size
    )
    origin = {key: value for key, value in provenance().items() if key in PROVENANCE} | {"code": code_version()}
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    statuses: Counter[str] = Counter()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names))

        def done(row: store.Row) -> None:
            store.append(path, row | origin)
            statuses[row["status"]] += 1
            shown = ", ".join(f"{number} {status}" for status, number in statuses.most_common())
            progress.update(task, advance=1, description=f"{shown}; last {row['model']}")

        sweep(names, plan, done)
    print(f"rows are in {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
