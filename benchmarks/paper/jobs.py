"""Trainings, each done once: what is in ``runs.jsonl`` is read from there, whichever script asked for it.

A job is a network and a recipe. Its row holds the whole history, the accuracy, and the
accuracy of what :func:`rmfx.convert` makes of the trained network, with the number of equal predictions.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import rmfx
from benchmarks.common import CONSOLE, provenance
from benchmarks.paper.networks import FULL_WIDTH, NETWORKS
from benchmarks.paper.setting import Setting
from benchmarks.paper.store import Row, append, rows_in
from rmfx.errors import DivergedError, RmfxError
from rmfx.learn.data import Data, Split
from rmfx.learn.distill import Distillation
from rmfx.learn.evaluate import answers
from rmfx.learn.finetune import finetune
from rmfx.learn.images import ImageSplit
from rmfx.learn.objective import Objective
from rmfx.learn.recipe import Recipe
from rmfx.learn.sources import open_data
from rmfx.learn.trainer import train

FINETUNE_EPOCHS, FINETUNE_RATE = 2, 0.01
QUICK_EPOCHS = 1
RUNS = "runs.jsonl"


@dataclass(frozen=True)
class Job:
    """One training; what comes with it is said in :data:`benchmarks.paper.networks.NETWORKS`.

    Attributes:
        network: its name there.
        recipe: with its seed.
        width: of the network's first stage.
    """

    network: str
    recipe: Recipe
    width: int

    @property
    def teacher(self) -> Job | None:
        """The training of the network that this one learns from."""
        name = NETWORKS[self.network].teacher
        return None if name is None else replace(self, network=name)

    @property
    def finetuned(self) -> bool:
        """Whether the trained network is converted and trained on (the paper's Figure 9)."""
        return NETWORKS[self.network].finetuned

    def key(self, setting: Setting) -> dict[str, Any]:
        """What makes it this job and no other, as it stands in its row."""
        more = {"data": setting.data, "images": setting.images}
        return {**asdict(self), **more, "finetune_epochs": FINETUNE_EPOCHS if self.finetuned else 0}


def jobs_for(setting: Setting, networks: Iterable[str], *, epochs: int) -> list[Job]:
    """One job per network and seed, by one recipe for all of them."""
    recipe = Recipe(
        epochs=setting.epochs or (QUICK_EPOCHS if setting.quick else epochs),
        batch=setting.batch,
        learning_rate=0.1 * setting.batch / 128,
        weight_decay=5e-4,
        schedule="cosine",
        warmup=0.0 if setting.quick else 0.5,
        clip=5.0,
        precision="bf16" if setting.bf16 else "float32",
    )
    return [Job(name, replace(recipe, seed=seed), setting.width) for name in networks for seed in range(setting.seeds)]


def rows_of(jobs: Sequence[Job], setting: Setting) -> list[Row]:
    """The rows of ``jobs``, in their order; those that are not in ``runs.jsonl`` yet are trained and appended."""
    known = {_text(row["job"]): row for row in rows_in(setting.folder / RUNS)}
    missing = [job for job in jobs if _text(job.key(setting)) not in known]
    taught_with = {job.teacher for job in missing}  # a teacher's row comes with its student's
    for rows in _run_all([job for job in missing if job not in taught_with], setting):
        for row in rows:
            known[_text(row["job"])] = row
            append(setting.folder / RUNS, row, setting)
            CONSOLE.print(_line(row))
    return [known[_text(job.key(setting))] for job in jobs]


def accuracies(rows: Sequence[Row], network: str) -> list[float]:
    """Test accuracies of ``network``, one per seed; those whose training diverged are left out."""
    found = [row["accuracy"] for row in rows if row["job"]["network"] == network]
    return [accuracy for accuracy in found if accuracy is not None]


def _line(row: Row) -> str:
    recipe, reached = row["job"]["recipe"], row["accuracy"]
    result = row["diverged"] if reached is None else f"{reached:.2%}"
    return (
        f"{row['job']['network']}, seed {recipe['seed']}: {result} ({recipe['epochs']} epochs, {row['seconds']:.0f} s)"
    )


def _text(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _run_all(jobs: Sequence[Job], setting: Setting) -> Iterable[list[Row]]:
    if setting.jobs == 1 or len(jobs) < 2:
        for job in jobs:
            yield run(job, setting)
        return
    # Fresh processes: CUDA does not survive a fork. Long jobs first, so that none is left alone at the end.
    with ProcessPoolExecutor(setting.jobs, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, job, setting) for job in sorted(jobs, key=_length, reverse=True)]):
            yield done.result()


def _length(job: Job) -> int:
    """Roughly how long a job takes: its layers, with those of its teacher."""
    with torch.device("meta"):
        own = sum(1 for _ in NETWORKS[job.network].build(3, 10, FULL_WIDTH).modules())
    return own + (0 if job.teacher is None else 10 * _length(job.teacher))


_OPENED: dict[str, Data] = {}


def _data(setting: Setting) -> Data:
    """The dataset, or the first of its training images."""
    if setting.data not in _OPENED:
        data = open_data(setting.data, root=setting.root)
        if setting.images is not None:
            data = replace(data, train=_first(data.train, setting.images))
        _OPENED[setting.data] = data
    return _OPENED[setting.data]


def _first(split: Split, count: int) -> Split:
    if not isinstance(split, ImageSplit):
        raise RmfxError("--images needs a dataset that is held in memory")
    return split.only(slice(count))


def run(job: Job, setting: Setting) -> list[Row]:
    """Do one job, after that of its teacher: the row of each."""
    if setting.jobs > 1:
        torch.set_num_threads(1)
    if job.teacher is None:
        return [_run(job, setting, None)[0]]
    first, teacher = _run(job.teacher, setting, None)
    return [first, _run(job, setting, Distillation(teacher))[0]]


def _run(job: Job, setting: Setting, objective: Objective | None) -> tuple[Row, nn.Module]:
    start = time.perf_counter()
    data = _data(setting)
    torch.manual_seed(job.recipe.seed)
    network = NETWORKS[job.network].build(data.shape[0], data.classes, job.width)
    row: Row = {"job": job.key(setting)}
    try:
        history = train(network, data, job.recipe, objective=objective, device=setting.device)
    except DivergedError as error:
        row |= {"history": [], "accuracy": None, "diverged": str(error)}
        return {**row, "seconds": time.perf_counter() - start, "provenance": provenance(setting.device)}, network.cpu()
    row["history"] = [epoch.to_dict() for epoch in history]
    row |= {"accuracy": history[-1].test_accuracy, **_converted(network.cpu(), data, setting)}
    if job.finetuned:
        row |= _finetuned(network.cpu(), data, job, setting)
    return {**row, "seconds": time.perf_counter() - start, "provenance": provenance(setting.device)}, network.cpu()


def _converted(network: nn.Module, data: Data, setting: Setting) -> Row:
    """Predictions before and after, in float32 on the device."""
    plain = rmfx.convert(network, torch.zeros(1, *data.shape), fuse="always")
    before, labels = _predictions(network, data, setting)
    after, _ = _predictions(plain, data, setting)
    return {
        "converted": {
            "accuracy": float((after == labels).double().mean()),
            "same_predictions": int((before == after).sum()),
            "predictions": len(labels),
            "sums_removed": rmfx.report(plain).count("removed"),
        }
    }


def _predictions(network: nn.Module, data: Data, setting: Setting) -> tuple[Tensor, Tensor]:
    device = torch.device(setting.device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        batches = answers(network.to(device), data.test, 500, device)
        pairs = [(logits.argmax(1), labels) for logits, labels in batches]
    predictions, labels = (torch.cat(parts).cpu() for parts in zip(*pairs, strict=True))
    return predictions, labels


def _finetuned(network: nn.Module, data: Data, job: Job, setting: Setting) -> Row:
    """The paper's Figure 9: the converted network trained on, with its batch norms and with them folded."""
    epochs = 1 if setting.quick else FINETUNE_EPOCHS
    recipe = replace(job.recipe, epochs=epochs, learning_rate=FINETUNE_RATE, warmup=0.0)
    tuned = {
        name: finetune(network, data, recipe, fold_bn=fold, device=setting.device)
        for name, fold in (("with_bn", False), ("without_bn", True))
    }
    return {
        "finetuned": {name: [epoch.to_dict() for epoch in result.history] for name, result in tuned.items()},
        "starts": {name: asdict(result.start) for name, result in tuned.items()},
        "finetune_recipe": asdict(recipe),
    }
