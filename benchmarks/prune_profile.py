"""Where the time of pruned networks goes in torch: to its convolutions, and of that to their kernels.

``python -m benchmarks.prune_profile`` takes finished networks of one seed of ``benchmarks.prune`` and tells, for every
one of ``PLACES``, per call and on one thread:

* the median of the whole call, with nothing watching;
* what the profiler of torch sees in operators that compute convolutions;
* what oneDNN itself says that its convolution kernels took, and its changes of layout.

What lies between the last two is the way from the operator to its kernel; what lies between the first two is all other
operators and the way to them. Of one image, eager mode takes no oneDNN but im2col and a matrix product; the C++ wrapper
does not go by the dispatcher, where the profiler would see it.

For each of these costs it prints what baselines pay over what rmfx pays at equal accuracy, by the mean accuracies of
``benchmarks.prune``: by how much networks would differ if nothing but kernels took time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import CONSOLE, RESULTS, macs, provenance, tracked
from benchmarks.prune_fronts import cost_at
from benchmarks.prune_networks import EXAMPLE, METHODS
from benchmarks.prune_results import BELOW, LIMITS, PARTS, ROWS, SEEDS, Job, mean_accuracy
from rmfx.files.serialise import load
from rmfx.measure.paired import Call, sample
from rmfx.measure.runners import runner
from rmfx.measure.target import Target


@dataclass(frozen=True)
class Place:
    """A way to run networks in torch."""

    runtime: str
    images: int
    channels_last: bool = False
    cpp_wrapper: bool = False

    def __str__(self) -> str:
        told = [self.runtime] + ["channels last"] * self.channels_last + ["C++ wrapper"] * self.cpp_wrapper
        return ", ".join([*told, f"{self.images} image{'s' if self.images > 1 else ''}"])


PLACES = (
    Place("eager", 1),
    Place("eager", 1, channels_last=True),
    Place("eager", 32),
    Place("inductor", 1),
    Place("inductor", 1, cpp_wrapper=True),
    Place("inductor", 32),
)
CALLS, WATCHED = 200, 50
OPERATORS = ("aten::_slow_conv2d_forward", "aten::mkldnn_convolution", "mkldnn::_convolution_pointwise")
COSTS = ("whole", "operators", "kernels", "layouts")
HEADER = "onednn_verbose,"


@dataclass(frozen=True)
class Profile:
    """Of one network in one place, microseconds per call.

    Attributes:
        whole: median, with nothing watching.
        operators: in operators that compute convolutions, by torch's profiler.
        kernels: in oneDNN's convolution kernels, by its own clock.
        layouts: in its changes of layout.
    """

    method: str
    part: float
    place: str
    macs: int
    whole: float
    operators: float
    kernels: float
    layouts: float


def profiled(network: Job, place: Place, folder: Path) -> Profile:
    """One network in one place."""
    layout = torch.channels_last if place.channels_last else torch.contiguous_format
    inputs = (EXAMPLE.expand(place.images, -1, -1, -1).contiguous(memory_format=layout),)
    path = folder / f"{network}.rmfx"
    with torch._inductor.config.patch(cpp_wrapper=place.cpp_wrapper):
        call = runner(load(path).to(memory_format=layout), inputs, Target(place.runtime, threads=1))
        for _ in range(WATCHED):
            call()
    whole = median(sample(call, 1) for _ in range(CALLS)) * 1e3
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        for _ in range(WATCHED):
            call()
    events = sorted(watched.events(), key=lambda event: event.time_range.start)
    operators = per_call([event.self_cpu_time_total for event in events if event.name.startswith(OPERATORS)])
    kernels, layouts = map(per_call, _by_onednn(call))
    count = place.images * macs(load(path), EXAMPLE.shape[-1])
    return Profile(network.method, network.part, str(place), count, whole, operators, kernels, layouts)


def per_call(spent: list[float]) -> float:
    """Median over the watched calls of what each spent in all.

    >>> per_call([1.0, 2.0] * WATCHED)
    3.0
    """
    each, rest = divmod(len(spent), WATCHED)
    if rest:
        raise RuntimeError(f"{len(spent)} events in {WATCHED} calls: they are not the same in every call")
    return median(sum(spent[each * call : each * (call + 1)]) for call in range(WATCHED))


def _by_onednn(call: Call) -> tuple[list[float], list[float]]:
    """Microseconds of every convolution and of every change of layout, in all watched calls."""
    with _standard_output() as written, torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        for _ in range(WATCHED):
            call()
    spent: dict[str, list[float]] = {"convolution": [], "reorder": []}
    for line in written:
        fields = line.split(",")
        if line.startswith(HEADER) and "exec" in fields and (kind := fields[fields.index("cpu") + 1]) in spent:
            spent[kind].append(float(fields[-1]) * 1e3)  # oneDNN tells milliseconds
    return spent["convolution"], spent["reorder"]


@contextmanager
def _standard_output() -> Iterator[list[str]]:
    """Lines that C code writes there, once the block has ended."""
    lines: list[str] = []
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield lines
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        lines += file.read().decode().splitlines()


def show(found: list[Profile], rows: Path, seeds: list[int]) -> None:
    """Print them, and what each cost comes to at equal accuracy."""
    console = CONSOLE if CONSOLE.is_terminal else Console(width=120)
    keys = {(row.method, row.part) for row in found}
    accuracies = {key: mean_accuracy(rows, key[0], seeds, key[1]) for key in keys}
    for place in map(str, PLACES):
        here = [row for row in found if row.place == place]
        table = Table("network", "MACs, M", "whole, us", *COSTS[1:], title=place)
        for row in here:
            cells = (row.macs / 1e6, *(getattr(row, cost) for cost in COSTS))
            table.add_row(f"{row.method} {row.part:g}", *(f"{cell:.0f}" for cell in cells))
        console.print(table)
        for baseline, cost, ratios in compared(here, accuracies):
            console.print(f"{place}: {baseline} / rmfx at equal accuracy, {cost}: {ratios}")


def compared(here: list[Profile], accuracies: dict[tuple[str, float], float]) -> Iterator[tuple[str, str, str]]:
    """What each baseline pays over what rmfx pays, for every cost that is seen in this place."""
    for baseline in LIMITS:
        for cost in COSTS:
            fronts = [
                [
                    (accuracies[row.method, row.part], getattr(row, cost))
                    for row in here
                    if row.method in ("unpruned", method)
                ]
                for method in (baseline, "rmfx")
            ]
            if any(value == 0 for front in fronts for _, value in front):
                continue
            wanted = [accuracies["unpruned", 1.0] - below for below in BELOW]
            theirs, ours = ([cost_at(front, accuracy).value for accuracy in wanted] for front in fronts)
            told = ", ".join(
                f"{their / our:.2f} at {100 * below:.1f} points"
                for their, our, below in zip(theirs, ours, BELOW, strict=True)
            )
            yield baseline, cost, told


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/prune"), help="of networks")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of accuracies; profiled: the first")
    parser.add_argument("--rows", type=Path, default=ROWS, help="of accuracies")
    parser.add_argument("--output", type=Path, default=RESULTS / "prune_profile.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {name: PARTS if method.tool else (1.0,) for name, method in METHODS.items()}
    networks = [Job(name, given.seeds[0], part) for name, parts in sizes.items() for part in parts]
    todo = [(network, place) for place in PLACES for network in networks]
    found = [profiled(*job, given.folder) for job in tracked(todo, len(todo))]
    show(found, given.rows, given.seeds)
    rows = {"rows": [asdict(row) for row in found], "provenance": provenance()}
    given.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
