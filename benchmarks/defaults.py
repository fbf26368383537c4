"""The defaults, as users call them: float32 networks, ``rmfx.convert(model, x)`` with its own verification.

``benchmarks.coverage`` compares in float64 and by itself. Here one network of every family (the smallest of each file
of timm's models, and the smallest of each of torchvision's, by the parameters in ``results/coverage.jsonl``) is
converted in float32, and must pass the comparison that ``convert`` makes. Casts in the code, and what it computes from
weights on every call, show here and not there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch

import rmfx
from benchmarks.common import CONSOLE, Figure, finish, options, tracked
from benchmarks.coverage import store
from benchmarks.coverage.models import attempts, build
from benchmarks.coverage.weights import fill
from rmfx.vision import import_timm

PATIENCE = 600  # seconds for one network
Row = dict[str, Any]


def families() -> list[str]:
    """The smallest network of each family, smallest first."""
    modules = import_timm().models._registry._model_to_module
    smallest: dict[str, tuple[int, str]] = {}
    for name, row in store.read(store.RUNS).items():
        source, _, network = name.partition(":")
        family = modules.get(network, "") if source == "timm" else network.rstrip("0123456789").partition("_")[0]
        size = (int(row.get("params", 2**62)), name)
        smallest[f"{source} {family}"] = min(size, smallest.get(f"{source} {family}", size))
    return [name for _, name in sorted(smallest.values())]


def measure(name: str) -> Row:
    """What became of one network."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(PATIENCE)
    start = time.perf_counter()
    error: Exception | None = None
    try:
        for attempt in attempts(name):
            try:
                model, skipped = build(name, attempt)
                x = torch.randn(attempt.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
                fill(model, x, skipped)
                model(x)
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as misfit:
                error = misfit  # the network does not take this size
                continue
            return _converted(name, model.float(), x.float()) | {"seconds": round(time.perf_counter() - start, 1)}
    except TimeoutError:
        return {"model": name, "status": "crashed", "error": f"takes more than {PATIENCE} seconds"}
    finally:
        signal.alarm(0)
    return {"model": name, "status": "unbuildable", "error": f"{type(error).__name__}: {error}"}


def _converted(name: str, model: torch.nn.Module, x: torch.Tensor) -> Row:
    row: Row = {"model": name, "input": list(x.shape)}
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            report = rmfx.report(rmfx.convert(model, x))
    except rmfx.VerificationError as error:
        return row | {"status": "unverified", "error": str(error)}
    except rmfx.RmfxError as error:
        return row | {"status": "refused", "error": f"{type(error).__name__}: {error}"}
    except Exception as error:  # a crash is a row too, whatever it is
        return row | {"status": "crashed", "error": f"{type(error).__name__}: {str(error)[:500]}"}
    return row | {"status": "verified", "sums": [report.count("removed"), report.count("refused")]}


def _give_up(number: int, frame: object) -> None:
    raise TimeoutError


def rows(names: list[str]) -> Iterator[Row]:
    """The rows of all networks, in the order in which they end."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("forkserver")) as pool:
        for done in as_completed([pool.submit(measure, name) for name in names]):
            yield done.result()


def main() -> None:
    """Run the benchmark."""
    names = families()
    arguments = options(__doc__, names)
    found = list(tracked(rows(arguments.models), len(arguments.models)))
    for row in found:
        if "error" in row:
            CONSOLE.print(row["status"], row["model"], row["error"], markup=False)
    statuses = Counter(row["status"] for row in found)
    CONSOLE.print(", ".join(f"{number} {status}" for status, number in statuses.most_common()))
    failures = ("unverified", "refused", "crashed", "unbuildable")
    figures = [Figure(f"{len(found)} families", status, statuses[status], 0) for status in failures]
    finish("defaults", figures, sorted(found, key=lambda row: row["model"]), write=not arguments.no_write)


if __name__ == "__main__":
    main()
