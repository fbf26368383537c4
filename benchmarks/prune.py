"""Accuracy against latency and parameters: residual networks pruned with coupled channels, and plain ones by rmfx.

Figure 6 of the paper, on ``digits32``: a ResNet of 3 x 2 basic blocks, trained, pruned to several parts of its MACs,
and trained on, by every method of :mod:`benchmarks.prune_networks` with the same data and the same epochs:

* ``stock BN scale``, ``stock group norm``: pruners of Torch-Pruning, with their own sparse training;
* ``coupled, tuned``: the residual network with all that rmfx does but the removal of its shortcuts;
* ``coupled, shortcuts off``: that, from the training that switches shortcuts off (training on revives some);
* ``rmfx``: its shortcuts switched off by sparse training, made plain, pruned, lowered;
* with ``--ablations``: rmfx and the tuned one with one thing changed;
* with ``--untrained``: both before they are trained on, with norms estimated again and with least squares.

Everything is chosen by validation images, which come from other originals than those trained on; test images, from
still other ones, are looked at once, by finished networks. Figures are of ``SEEDS`` only: methods, setting, and how
fronts are compared, were chosen by networks of the seeds ``EXPLORED``, before any of ``SEEDS`` was trained. Networks
stay in ``--folder``, and rows of results are appended to ``results/prune.jsonl``: what is there is not done again.
``--time`` measures latencies, each against the unpruned network in interleaved pairs; ``--table`` prints what there is.

Fronts are compared at 0.3 and 0.8 points below the unpruned network: cost of the baseline over that of rmfx. For
latencies these are fronts of the means over seeds, as one network scatters by as much as 0.3 points, with the 95 %
interval that leaving out single seeds gives, beside the geometric mean of every seed's own ratio; for parameters, those
of each seed by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import CONSOLE, RESULTS, Figure, code_version, macs, provenance, tracked
from benchmarks.prune_fronts import Point, cost_at, jackknife, mean_points
from benchmarks.prune_networks import (
    ABLATIONS,
    EXAMPLE,
    METHODS,
    Method,
    Setting,
    accuracy,
    cut,
    deployed,
    parameters,
    splits,
    trained,
)
from rmfx.files.serialise import load, save
from rmfx.learn.trainer import train
from rmfx.measure.paired import compare
from rmfx.measure.runners import runner
from rmfx.measure.target import Target

matplotlib.use("agg")

ROWS = RESULTS / "prune.jsonl"
PARTS = (0.6, 0.45, 0.33, 0.24, 0.17)  # of the MACs of the residual network
EXPLORED = (0, 1, 2, 3)  # all choices were made by these
SEEDS = (4, 5, 6, 7, 8)  # all figures are of these
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
OTHER = "than usual; give --output and --folder, too"
PAIRS, SECONDS, SHOWN = 40, 1.5, 5.0
UNTRAINED = (  # label, norms, solve: as for `cut`
    ("as pruned", False, False),
    ("norms", True, False),
    ("least squares", False, True),
    ("least squares, norms", True, True),
)
QUICK = Setting(images=2_400, test_images=1_000, epochs=1, tune_epochs=1)
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One network: what the rows of training and of timing have in common."""

    method: str
    seed: int
    part: float

    def __str__(self) -> str:
        return f"{self.method} {self.part:g} seed {self.seed}"


def jobs(methods: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Everything there is to do, seed by seed."""
    return [
        Job(method, seed, part)
        for seed in seeds
        for method in methods
        for part in (PARTS if method_of(method).tool else (1.0,))
    ]


def method_of(name: str) -> Method:
    """By its name."""
    return {**METHODS, **ABLATIONS}[name]


def make(job: Job, setting: Setting, folder: Path) -> Row:
    """Train, prune, train on, test."""
    data, test = splits(setting.images, setting.test_images)
    method = method_of(job.method)
    base = trained(method.base, job.seed, setting, folder, data)
    network = cut(method, base, job.part, data, job.seed, norms=not method.solve, solve=method.solve)
    before = accuracy(network, data.test)
    train(network, data, setting.tuning(job.seed))
    finished = deployed(network)
    save(finished, folder / f"{job}.rmfx")
    return {
        **asdict(job),
        "validation_before_tuning": before,
        "validation": accuracy(finished, data.test),
        "test": accuracy(finished, test),
        "parameters": parameters(finished),
        "macs": macs(load(folder / f"{job}.rmfx"), EXAMPLE.shape[-1]),
        "setting": asdict(setting),
    }


def untrained(job: Job, setting: Setting, folder: Path) -> Row:
    """Accuracy on validation images without any training after pruning: what norms and least squares make up for."""
    data, _ = splits(setting.images, setting.test_images)
    method = method_of(job.method)
    base = trained(method.base, job.seed, setting, folder, data)
    found = {}
    for label, norms, solve in UNTRAINED:
        network = cut(method, base, job.part, data, job.seed, norms=norms, solve=solve)
        found[label] = accuracy(network, data.test)
    return {**asdict(job), "validation": found}


def measure(job: Job, _: Setting, folder: Path) -> Row:
    """Latency on every target, one thread, over that of the unpruned network."""
    unpruned = Job("unpruned", job.seed, 1.0)
    found = {}
    for name, (place, images) in TARGETS.items():
        target, inputs = Target(place, threads=1), (EXAMPLE.expand(images, -1, -1, -1).contiguous(),)
        pair = [runner(load(folder / f"{which}.rmfx"), inputs, target) for which in (unpruned, job)]
        found[name] = compare(str(job), *pair, pairs=PAIRS, seconds=SECONDS).to_dict()
    return {**asdict(job), "latency": found}


MEASURES: dict[str, Callable[[Job, Setting, Path], Row]] = {
    "accuracy": make,
    "untrained": untrained,
    "latency": measure,
}


def read(path: Path, kind: str) -> dict[Job, Row]:
    """The last row of each job."""
    rows = _rows(path, path.stat().st_size) if path.exists() else []
    return {Job(row["method"], row["seed"], row["part"]): row for row in rows if row["kind"] == kind}


@cache
def _rows(path: Path, size: int) -> list[Row]:
    """All rows of a file that only grows."""
    return [json.loads(line) for line in path.read_bytes()[:size].decode().splitlines() if line.strip()]


def points(path: Path, method: str, seed: int, cost: str) -> list[Point]:
    """Accuracy and cost of a method's networks, and of the unpruned one: costs over that of the unpruned one."""
    accuracies, latencies = read(path, "accuracy"), read(path, "latency")
    found = []
    for job, row in sorted(accuracies.items(), key=lambda item: -item[0].part):
        if job.seed != seed or job.method not in (method, "unpruned"):
            continue
        if cost in TARGETS:
            if job.method == "unpruned":
                found.append((row["test"], 1.0))
            elif job in latencies:
                found.append((row["test"], latencies[job]["latency"][cost]["ratio"]))
        else:
            found.append((row["test"], row[cost] / accuracies[Job("unpruned", seed, 1.0)][cost]))
    return found


def compared(path: Path, baseline: str, cost: str, below: float, seeds: Sequence[int]) -> float:
    """What the baseline pays over what rmfx pays, ``below`` the unpruned network, by the means over seeds."""
    unpruned = read(path, "accuracy")
    accuracy = mean(unpruned[Job("unpruned", seed, 1.0)]["test"] for seed in seeds) - below
    fronts = [mean_points([points(path, method, seed, cost) for seed in seeds]) for method in (baseline, "rmfx")]
    theirs, ours = (cost_at(front, accuracy).value for front in fronts)
    return theirs / ours


def figures(path: Path) -> Iterator[Figure]:
    """What was to be reached: inverted where more is better, as a figure is a limit from above."""
    latencies = read(path, "latency")
    for baseline, limit in LIMITS.items():
        done = [seed for seed in SEEDS if all(Job(name, seed, PARTS[-1]) in latencies for name in (baseline, "rmfx"))]
        for below in BELOW if done else ():
            subject = f"{100 * below:.1f} points below"
            for cost in TARGETS:
                ratio, low, high = jackknife(partial(compared, path, baseline, cost, below), done)
                own = geometric_mean(compared(path, baseline, cost, below, [seed]) for seed in done)
                told = f"{ratio:.2f}x, {low:.2f} to {high:.2f}; mean of each seed's own {own:.2f}x"
                words = f"rmfx / {baseline}, latency in {cost} ({told})"
                yield Figure(subject, words, 1 / ratio, 1 / limit)
            each = [compared(path, baseline, "parameters", below, [seed]) for seed in done]
            words = f"rmfx / {baseline}, parameters, worst of {', '.join(f'{1 / ratio:.2f}' for ratio in each)}"
            yield Figure(subject, words, 1 / min(each), 1.0)


def show(path: Path) -> list[Figure]:
    """Print every row, costs over the unpruned network's, then the figures; returns the missed ones."""
    table = Table(
        "network", "validation, %", "test, %", "parameters, x", "MACs, x", *(f"{name}, x" for name in TARGETS)
    )
    accuracies, latencies = read(path, "accuracy"), read(path, "latency")
    for job, row in sorted(accuracies.items(), key=lambda item: (item[0].seed, item[0].method, -item[0].part)):
        unpruned = accuracies.get(Job("unpruned", job.seed, 1.0), row)
        cells = [f"{100 * row[split]:.2f}" for split in ("validation", "test")]
        cells += [f"{row[cost] / unpruned[cost]:.3f}" for cost in ("parameters", "macs")]
        cells += [f"{latencies[job]['latency'][name]['ratio']:.3f}" if job in latencies else "" for name in TARGETS]
        table.add_row(str(job), *cells)
    (CONSOLE if CONSOLE.is_terminal else Console(width=180)).print(table)
    for job, row in read(path, "untrained").items():
        told = ", ".join(f"{label} {100 * value:.2f}" for label, value in row["validation"].items())
        CONSOLE.print(f"{job}, validation without training: {told}")
    found = list(figures(path)) if latencies else []
    for figure in found:
        mark = "reached" if figure.reached else "[red]missed[/]"
        CONSOLE.print(f"{mark} {figure.subject}: {figure.quantity} is {figure.value:.3f}, limit {figure.limit:.3f}")
    return [figure for figure in found if not figure.reached]


def draw(path: Path) -> None:
    """Figure 6: accuracy against latency and parameters, all seeds; networks that broke down lie below the picture."""
    from matplotlib import pyplot as plt  # after the choice of what draws

    sheet, axes = plt.subplots(2, 3, figsize=(15, 9))
    for axis, cost in zip(axes.flat, COSTS, strict=True):
        for method in [name for name, method in METHODS.items() if method.tool]:
            dots = [
                dot
                for seed in SEEDS
                for dot in points(path, method, seed, cost)
                if dot not in points(path, "unpruned", seed, cost)
            ]
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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *ABLATIONS], default=list(METHODS))
    parser.add_argument("--ablations", action="store_true", help="these, for the first explored seed")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/prune"), help="of networks")
    parser.add_argument("--output", type=Path, default=ROWS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="little training: does it run")
    parser.add_argument("--weight-decay", type=float, default=Setting().weight_decay, help=OTHER)
    parser.add_argument("--epochs", nargs=2, type=int, metavar=("BEFORE", "AFTER"), help=OTHER)
    parser.add_argument("--time", action="store_true", help="measure latencies of the networks in the folder")
    parser.add_argument("--untrained", action="store_true", help="rmfx and the tuned one, first explored seed")
    parser.add_argument("--table", action="store_true", help="do nothing, print what there is")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    setting = replace(QUICK if given.quick else Setting(), weight_decay=given.weight_decay)
    if given.epochs:
        setting = replace(setting, epochs=given.epochs[0], tune_epochs=given.epochs[1])
    methods, seeds = given.methods, given.seeds
    if given.ablations or given.untrained:
        methods, seeds = list(ABLATIONS) if given.ablations else ["coupled, tuned", "rmfx"], EXPLORED[:1]
    wanted = [] if given.table else jobs(methods, seeds)
    kind = "latency" if given.time else "untrained" if given.untrained else "accuracy"
    done = read(given.output, kind)
    todo = [job for job in wanted if job not in done]
    given.folder.mkdir(parents=True, exist_ok=True)
    for job in tracked(todo, len(todo)):
        row = MEASURES[kind](job, setting, given.folder)
        given.output.parent.mkdir(parents=True, exist_ok=True)
        with given.output.open("a", encoding="utf-8") as file:
            row = {"kind": kind, **row, "provenance": provenance(), "code": code_version()}
            file.write(json.dumps(row) + "\n")
    missed = show(given.output)
    if given.table and read(given.output, "latency"):
        draw(given.output)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
