"""Every table and figure of the paper: all trainings first, then the scripts one after the other.

The options are those of the scripts; ``--only table2 figure5`` names some of them, ``--trainings-only`` leaves out what
comes after training. Trainings that ``runs.jsonl`` holds already are not repeated, so that an interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys

from benchmarks.common import CONSOLE
from benchmarks.paper.jobs import Job, rows_of
from benchmarks.paper.setting import setting

SCRIPTS = ("table1", "table2", "table3", "table4", "figure5", "figure7", "figure9")


def main() -> None:
    """Run the benchmark."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--only", nargs="+", default=SCRIPTS, choices=SCRIPTS, metavar="SCRIPT", help=" ".join(SCRIPTS))
    own.add_argument("--trainings-only", action="store_true", help="train, and leave tables and figures for later")
    chosen, arguments = own.parse_known_args()
    given = setting(__doc__, arguments, also=own)
    wanted: dict[Job, None] = {}
    for name in chosen.only:
        module = importlib.import_module(f"benchmarks.paper.{name}")
        wanted |= dict.fromkeys(module.jobs(given) if hasattr(module, "jobs") else ())
    CONSOLE.print(f"{len(wanted)} trainings on {given.data}")
    rows_of(list(wanted), given)
    if chosen.trainings_only:
        return
    failed = [name for name in chosen.only if _run(name, arguments)]
    CONSOLE.print(f"missed a figure: {', '.join(failed)}" if failed else "all scripts reached their figures")
    sys.exit(1 if failed else 0)


def _run(name: str, arguments: list[str]) -> int:
    """In a process of its own: a script leaves nothing behind that could slow the next one down."""
    return subprocess.run([sys.executable, "-m", f"benchmarks.paper.{name}", *arguments], check=False).returncode


if __name__ == "__main__":
    main()
