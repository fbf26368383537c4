"""What ``benchmarks.prune`` has found: rows, means over seeds, fronts, what was to be reached, and the picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import matplotlib
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.common import CONSOLE, RESULTS, Figure
from benchmarks.prune_fronts import Point, cost_at, jackknife, mean_points
from benchmarks.prune_networks import METHODS

matplotlib.use("agg")

ROWS = RESULTS / "prune.jsonl"
PARTS = (0.6, 0.45, 0.33, 0.24, 0.17)  # of the MACs of the residual network
EXPLORED = tuple(range(9))  # all choices were made by these
SEEDS = (10, 11, 12, 13, 14)  # all figures are of these
TARGETS = {  # where, and how many images: of one, torch spends most of its time between kernels
    "onnxruntime": ("onnxruntime", 1),
    "inductor": ("inductor", 1),
    "eager": ("eager", 1),
    "inductor, 32 images": ("inductor", 32),
    "eager, 32 images": ("eager", 32),
}
COSTS = (*TARGETS, "parameters")
BELOW = (0.003, 0.008)  # the unpruned network's accuracy
LIMITS = {"stock BN scale": 2.0, "stock group norm": 2.0, "coupled, tuned": 1.28, "coupled, shortcuts off": 1.28}
SHOWN_COSTS = ("macs", "parameters", *TARGETS)
HEADER = ("test, %", "MACs, x", *(f"{name}, x" for name in SHOWN_COSTS[1:]))
SHOWN = 5.0  # points of accuracy in the picture
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One network: what the rows of training and of timing have in common."""

    method: str
    seed: int
    part: float

    def __str__(self) -> str:
        return f"{self.method} {self.part:g} seed {self.seed}"


def read(path: Path, kind: str) -> dict[Job, Row]:
    """The last row of each job."""
    rows = _rows(path, path.stat().st_size) if path.exists() else []
    return {Job(row["method"], row["seed"], row["part"]): row for row in rows if row["kind"] == kind}


@cache
def _rows(path: Path, size: int) -> list[Row]:
    """All rows of a file that only grows."""
    return [json.loads(line) for line in path.read_bytes()[:size].decode().splitlines() if line.strip()]


def parts(path: Path, method: str, seed: int, cost: str) -> list[tuple[float, Point]]:
    """Accuracy and cost of a method's networks, largest first: costs over that of the unpruned one."""
    accuracies, latencies = read(path, "accuracy"), read(path, "latency")
    unpruned = Job("unpruned", seed, 1.0)
    found = []
    for job, row in sorted(accuracies.items(), key=lambda item: -item[0].part):
        if (job.method, job.seed) != (method, seed):
            continue
        if job == unpruned:
            found.append((job.part, (row["test"], 1.0)))
        elif unpruned in accuracies and cost not in TARGETS:
            found.append((job.part, (row["test"], row[cost] / accuracies[unpruned][cost])))
        elif job in latencies:
            found.append((job.part, (row["test"], latencies[job]["latency"][cost]["ratio"])))
    return found


def points(path: Path, method: str, seed: int, cost: str) -> list[Point]:
    """Those of the unpruned network and of a method's."""
    return [dot for name in ("unpruned", method) for _, dot in parts(path, name, seed, cost)]


def mean_accuracy(path: Path, method: str, seeds: Sequence[int], part: float = 1.0) -> float:
    """Of a method's networks of one size, on test images."""
    accuracies = read(path, "accuracy")
    return mean(accuracies[Job(method, seed, part)]["test"] for seed in seeds)


def compared(path: Path, baseline: str, cost: str, below: float, seeds: Sequence[int]) -> float:
    """What the baseline pays over what rmfx pays, ``below`` the unpruned network, by the means over seeds."""
    accuracy = mean_accuracy(path, "unpruned", seeds) - below
    fronts = [mean_points([points(path, method, seed, cost) for seed in seeds]) for method in (baseline, "rmfx")]
    theirs, ours = (cost_at(front, accuracy).value for front in fronts)
    return theirs / ours


@dataclass(frozen=True)
class Ratio:
    """What a baseline pays over what rmfx pays at one accuracy.

    Attributes:
        low, high: 95 % interval over seeds.
        each: every seed's own, from its own front.
    """

    value: float
    low: float
    high: float
    each: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f}), own {geometric_mean(self.each):.2f}"


@cache
def ratio(path: Path, baseline: str, cost: str, below: float, seeds: tuple[int, ...]) -> Ratio:
    """That of those seeds whose networks are timed."""
    done = seen(path, [baseline, "rmfx"], seeds)
    each = tuple(compared(path, baseline, cost, below, [seed]) for seed in done)
    return Ratio(*jackknife(partial(compared, path, baseline, cost, below), done), each)


def figures(path: Path, seeds: tuple[int, ...]) -> Iterator[Figure]:
    """What was to be reached: inverted where more is better, as a figure is a limit from above."""
    for baseline, limit in LIMITS.items():
        for below in BELOW if seen(path, [baseline, "rmfx"], seeds) else ():
            subject = f"{100 * below:.1f} points below"
            for cost in TARGETS:
                words = f"rmfx / {baseline}, latency in {cost}"
                yield Figure(subject, words, 1 / ratio(path, baseline, cost, below, seeds).value, 1 / limit)
            worst = min(ratio(path, baseline, "parameters", below, seeds).each)
            yield Figure(subject, f"rmfx / {baseline}, parameters, worst seed", 1 / worst, 1.0)


def seen(path: Path, methods: Sequence[str], seeds: Sequence[int]) -> list[int]:
    """Those seeds whose networks by these methods are all timed."""
    latencies = read(path, "latency")
    return [seed for seed in seeds if all(Job(name, seed, part) in latencies for name in methods for part in PARTS)]


def show(path: Path, seeds: tuple[int, ...]) -> list[Figure]:
    """Print every row, costs over the unpruned network's, then means and figures; returns the missed ones."""
    console = CONSOLE if CONSOLE.is_terminal else Console(width=180)
    console.print(_networks(path))
    for line in _by_validation(path):
        CONSOLE.print(line)
    console.print(_means(path, seeds))
    console.print(_ratios(path, seeds))
    missed = [figure for figure in figures(path, seeds) if not figure.reached]
    for figure in missed:
        CONSOLE.print(f"missed {figure.subject}: {figure.quantity} is {figure.value:.3f}, limit {figure.limit:.3f}")
    return missed


def _networks(path: Path) -> Table:
    every = Table("network", "validation, %", *HEADER)
    rows = read(path, "accuracy")
    for job in sorted(rows, key=lambda job: (job.seed, job.method, -job.part)):
        every.add_row(str(job), f"{100 * rows[job]['validation']:.2f}", *_cells(path, job.method, [job.seed], job.part))
    return every


def _by_validation(path: Path) -> Iterator[str]:
    """What choices are made by: means over sizes, and what untrained networks have."""
    found: dict[tuple[str, int], list[float]] = {}
    for job, row in read(path, "accuracy").items():
        if job.part in PARTS:
            found.setdefault((job.method, job.seed), []).append(row["validation"])
    for (method, seed), values in found.items():
        if len(values) == len(PARTS):
            yield f"{method} seed {seed}, validation, mean over sizes: {100 * mean(values):.2f}"
    for job, row in read(path, "untrained").items():
        told = ", ".join(f"{label} {100 * value:.2f}" for label, value in row["validation"].items())
        yield f"{job}, validation without training: {told}"


def _means(path: Path, seeds: Sequence[int]) -> Table:
    done = seen(path, list(LIMITS), seeds)
    means = Table("method", *HEADER, title=f"means of seeds {', '.join(map(str, done))}", box=MARKDOWN)
    for method in METHODS if done else ():
        for part in PARTS if METHODS[method].tool else (1.0,):
            means.add_row(method, *_cells(path, method, done, part))
    return means


def _ratios(path: Path, seeds: tuple[int, ...]) -> Table:
    ratios = Table("baseline / rmfx", *(f"{100 * below:.1f} points below" for below in BELOW), "reach", box=MARKDOWN)
    for baseline, limit in LIMITS.items():
        if not seen(path, [baseline, "rmfx"], seeds):
            continue
        for cost in (*TARGETS, "macs"):  # MACs tell what of a latency's ratio is accuracy, and what is time per MAC
            found = (str(ratio(path, baseline, cost, below, seeds)) for below in BELOW)
            ratios.add_row(f"{baseline}; {cost}", *found, f"{limit:g}" if cost in TARGETS else "")
        each = (ratio(path, baseline, "parameters", below, seeds).each for below in BELOW)
        ratios.add_row(f"{baseline}; parameters", *(", ".join(f"{x:.2f}" for x in own) for own in each), "each > 1")
    return ratios


def _cells(path: Path, method: str, seeds: Sequence[int], part: float) -> list[str]:
    """Accuracy and all costs of one method's networks: means over seeds, of costs the geometric ones."""
    cells = [f"{100 * mean_accuracy(path, method, seeds, part):.2f}"]
    for cost in SHOWN_COSTS:
        found = [dict(parts(path, method, seed, cost)).get(part) for seed in seeds]
        dots = [[dot] for dot in found if dot is not None]
        cells.append(f"{mean_points(dots)[0][1]:.3f}" if len(dots) == len(seeds) else "")
    return cells


def draw(path: Path, seeds: Sequence[int]) -> None:
    """Figure 6: accuracy against latency and parameters of every network; those that broke down lie below it."""
    from matplotlib import pyplot as plt  # after the choice of what draws

    sheet, axes = plt.subplots(2, 3, figsize=(15, 9))
    for axis, cost in zip(axes.flat, COSTS, strict=True):
        for method in [name for name, method in METHODS.items() if method.tool]:
            dots = [dot for seed in seeds for _, dot in parts(path, method, seed, cost)]
            dots.sort(key=lambda dot: dot[1])
            axis.plot([x for _, x in dots], [100 * y for y, _ in dots], "o", markersize=4, label=method)
        top = 100 * max(row["test"] for row in read(path, "accuracy").values())
        axis.set(xlabel=f"{cost}, over the unpruned network's", ylabel="test accuracy, %", xscale="log")
        axis.set(ylim=(top - SHOWN, top + 0.5))
        axis.set_xticks(ticks := [0.1, 0.2, 0.3, 0.5, 0.7, 1.0], labels=map(str, ticks))
        axis.minorticks_off()
        axis.legend(frameon=False)
    for suffix in ("png", "svg"):
        sheet.savefig(path.with_suffix(f".{suffix}"), bbox_inches="tight")
