"""Accuracy against latency and parameters: residual networks pruned with coupled channels, and plain ones by rmfx.

Figure 6 of the paper, on ``digits32`` or, with ``--data`` and ``--root``, on CIFAR: a ResNet of 3 x 2 basic blocks,
trained, pruned to several parts of its MACs, and trained on, by every method of :mod:`benchmarks.prune_networks` with
the same data and the same epochs:

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
Rows of the seeds explored are in ``results/prune_constants.jsonl``, for ``--table --output``: there constants are kept
by all methods, as ``rmfx.prune`` does by default.

Fronts are compared at 0.3 and 0.8 points below the unpruned network: cost of the baseline over that of rmfx. For
latencies these are fronts of the means over seeds, as one network scatters by as much as 0.3 points, with the 95 %
interval that leaving out single seeds gives, beside the geometric mean of every seed's own ratio; for parameters, those
of each seed by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common import code_version, macs, provenance, tracked
from benchmarks.prune_data import DATASETS, splits
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
    trained,
)
from benchmarks.prune_results import EXPLORED, PARTS, ROWS, SEEDS, TARGETS, Job, Row, draw, read, show
from rmfx.files.serialise import load, save
from rmfx.learn.distill import Distillation
from rmfx.learn.objective import Objective
from rmfx.learn.trainer import train
from rmfx.measure.paired import compare
from rmfx.measure.runners import runner
from rmfx.measure.target import Target

OTHERS = ("weight_decay", "tune_rate", "tune_decay", "distillation")
OTHER = "other than usual; give --output and --folder, too"
PAIRS, SECONDS = 40, 1.5
UNTRAINED = (  # label, norms, solve: as for `cut`
    ("as pruned", False, False),
    ("norms", True, False),
    ("least squares", False, True),
    ("least squares, norms", True, True),
)
QUICK = {"images": 2_400, "test_images": 1_000, "epochs": 1, "tune_epochs": 1}


@dataclass(frozen=True)
class Where:
    """Where networks and images are kept, and what computes.

    Attributes:
        folder: of networks.
        root: of the files of CIFAR.
        device: to train and to time on.
    """

    folder: Path
    root: Path | None
    device: str


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


def make(job: Job, setting: Setting, where: Where) -> Row:
    """Train, prune, train on, test."""
    data, test = splits(setting.data, where.root, setting.images, setting.test_images)
    method, folder = method_of(job.method), where.folder
    base = trained(method.base, job.seed, setting, folder, data, device=where.device)
    network = cut(method, base, job.part, data, job.seed, norms=not method.solve, solve=method.solve)
    before = accuracy(network, data.test)
    objective = _objective(job, method, setting, folder)
    epochs = train(network, data, setting.tuning(job.seed), objective=objective, device=where.device)
    finished = deployed(network)
    save(finished, folder / f"{job}.rmfx")
    return {
        **asdict(job),
        "validation_before_tuning": before,
        "validation_by_epoch": [epoch.test_accuracy for epoch in epochs],
        "validation": accuracy(finished, data.test),
        "test": accuracy(finished, test),
        "parameters": parameters(finished),
        "macs": macs(load(folder / f"{job}.rmfx"), EXAMPLE.shape[-1]),
        "setting": asdict(setting),
    }


def _objective(job: Job, method: Method, setting: Setting, folder: Path) -> Objective:
    if not (method.tool and setting.distillation):
        return Objective()
    teacher = load(folder / f"{Job('unpruned', job.seed, 1.0)}.rmfx")
    return Distillation(teacher, weight=setting.distillation)


def untrained(job: Job, setting: Setting, where: Where) -> Row:
    """Accuracy on validation images without any training after pruning: what norms and least squares make up for."""
    data, _ = splits(setting.data, where.root, setting.images, setting.test_images)
    method = method_of(job.method)
    base = trained(method.base, job.seed, setting, where.folder, data, device=where.device)
    found = {}
    for label, norms, solve in UNTRAINED:
        network = cut(method, base, job.part, data, job.seed, norms=norms, solve=solve)
        found[label] = accuracy(network, data.test)
    return {**asdict(job), "validation": found}


def measure(job: Job, _: Setting, where: Where) -> Row:
    """Latency on every target, on one thread of a CPU, over that of the unpruned network."""
    unpruned = Job("unpruned", job.seed, 1.0)
    found = {}
    for name, (place, images) in TARGETS.items():
        target = Target(place, where.device, threads=1 if where.device == "cpu" else None)
        inputs = (EXAMPLE.expand(images, -1, -1, -1).contiguous(),)
        pair = [runner(load(where.folder / f"{which}.rmfx"), inputs, target) for which in (unpruned, job)]
        found[name] = compare(str(job), *pair, pairs=PAIRS, seconds=SECONDS).to_dict()
    return {**asdict(job), "latency": found}


MEASURES: dict[str, Callable[[Job, Setting, Where], Row]] = {
    "accuracy": make,
    "untrained": untrained,
    "latency": measure,
}


def main() -> None:
    """Run the benchmark."""
    given = _given()
    torch.set_num_threads(given.threads)
    setting, where = _setting(given), Where(given.folder, given.root, given.device)
    methods, seeds = given.methods, given.seeds
    if given.ablations or given.untrained:
        methods, seeds = list(ABLATIONS) if given.ablations else ["coupled, tuned", "rmfx"], EXPLORED[:1]
    wanted = [] if given.table else jobs(methods, seeds)
    kind = "latency" if given.time else "untrained" if given.untrained else "accuracy"
    done = read(given.output, kind)
    todo = [job for job in wanted if job not in done]
    given.folder.mkdir(parents=True, exist_ok=True)
    for job in tracked(todo, len(todo)):
        row = MEASURES[kind](job, setting, where)
        given.output.parent.mkdir(parents=True, exist_ok=True)
        with given.output.open("a", encoding="utf-8") as file:
            row = {"kind": kind, **row, "provenance": provenance(where.device), "code": code_version()}
            file.write(json.dumps(row) + "\n")
    figured = tuple(given.seeds)
    missed = show(given.output, figured)
    if given.table and read(given.output, "latency"):
        draw(given.output, figured)
    sys.exit(1 if missed else 0)


def _given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *ABLATIONS], default=list(METHODS))
    parser.add_argument("--ablations", action="store_true", help="these, for the first explored seed")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="to make, and that figures are of")
    parser.add_argument("--data", choices=list(DATASETS), default="digits32")
    parser.add_argument("--root", type=Path, help="folder with the files of CIFAR")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: to train and to time on")
    parser.add_argument("--folder", type=Path, help="of networks; runs/prune, or with the data and the device behind")
    parser.add_argument("--output", type=Path, help="of rows; likewise")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="little training: does it run")
    for name in OTHERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Setting(), name), help=OTHER)
    parser.add_argument("--epochs", nargs=2, type=int, metavar=("BEFORE", "AFTER"), help=OTHER)
    parser.add_argument("--time", action="store_true", help="measure latencies of the networks in the folder")
    parser.add_argument("--untrained", action="store_true", help="rmfx and the tuned one, first explored seed")
    parser.add_argument("--table", action="store_true", help="do nothing, print what there is")
    given = parser.parse_args()
    others = (given.data, given.device.replace(":", "_"))
    name = "_".join(["prune", *(other for other in others if other not in ("digits32", "cpu"))])
    given.folder = given.folder or Path("runs") / name
    given.output = given.output or ROWS.with_stem(name)
    return given


def _setting(given: argparse.Namespace) -> Setting:
    images, test_images = DATASETS[given.data]
    told = {"data": given.data, "images": images, "test_images": test_images} | (QUICK if given.quick else {})
    told |= {name: getattr(given, name) for name in OTHERS}
    if given.epochs:
        told |= {"epochs": given.epochs[0], "tune_epochs": given.epochs[1]}
    return Setting(**told)


if __name__ == "__main__":
    main()
