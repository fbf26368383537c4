"""The training loop: on a CPU or a GPU, in one process or several, from the start or from a checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rmfx.errors import DivergedError, RmfxError
from rmfx.files.atomic import replacing
from rmfx.learn.averaging import Average
from rmfx.learn.checkpoint import (
    Checkpoint,
    Identity,
    check_unused,
    identity_of,
    load_checkpoint,
    save_checkpoint,
)
from rmfx.learn.data import Data
from rmfx.learn.evaluate import check_fits, evaluate, logits_of, placed
from rmfx.learn.machine import Machine, open_machine
from rmfx.learn.metrics import Epoch, History, Journal
from rmfx.learn.objective import Objective
from rmfx.learn.recipe import Recipe
from rmfx.learn.schedule import rate_at

OnStep = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)
OnEpoch = Callable[[Epoch], None]

_DEFAULT = Recipe()
_ORDERS = 1_000_003  # more epochs than anybody trains: seeds of different recipes do not meet


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe = _DEFAULT,
    *,
    folder: Path | None = None,
    resume: bool = False,
    objective: Objective | None = None,
    device: str | None = None,
    first: Epoch | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
) -> History:
    """Train ``model`` to tell the classes of ``data`` apart.

    Several processes (``accelerate launch``, ``torchrun``) share each batch, and batch norms use the statistics of the
    whole batch, so that their number does not matter. On a CPU the result depends on the arguments alone, bit by bit.

    Args:
        model: takes ``[n, C, H, W]`` and gives ``[n, classes]``; changed in place. It comes back where it was, in eval
            mode, with the averaged weights if the recipe asks for any.
        data: what to learn.
        recipe: how.
        folder: made if need be; gets ``checkpoint.pt`` and ``metrics.jsonl`` after each epoch, ``recipe.json``, and
            ``model.safetensors`` at the end. The files are written by the first process.
        resume: go on from the checkpoint in ``folder``.
        objective: what is minimised besides cross entropy, for example :class:`rmfx.learn.distill.Distillation`.
        device: ``"cpu"`` or ``"cuda"``; by default CUDA where there is any.
        first: a record of the network before training, for the history to begin with.
        on_step, on_epoch: called in the first process only.

    Returns:
        A record of every epoch.

    Raises:
        RmfxError: when network and data do not fit, or the folder is that of another training.
        DivergedError: when the loss is no finite number any more.
        RuntimeUnavailableError: when accelerate, or the device asked for, is not there.

    >>> from rmfx.demo import DigitNet
    >>> from rmfx.learn.sources import open_data
    >>> history = train(DigitNet(), open_data("digits"), Recipe(epochs=1, batch=64))
    >>> history[0].epoch, history[0].test_accuracy > 0.5
    (1, True)
    """
    if folder is None and resume:
        raise RmfxError("resume needs the folder that holds the checkpoint")
    objective = objective or Objective()
    machine = open_machine(recipe.precision, device)
    check_fits(model, data)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RmfxError("all parameters of the network are frozen: call model.requires_grad_(True)")
    _check_batch(data, recipe, machine)
    identity = identity_of(model, data, recipe, objective)
    loaded = load_checkpoint(folder, identity) if folder is not None and resume else None
    if folder is not None and not resume:
        check_unused(folder)
    machine.wait()  # all have looked into the folder
    with machine.hosting(model):
        run = _Run(model, data, recipe, machine, objective, () if first is None else (first,))
        if loaded is not None:
            run.load(loaded)
        output = _Output(folder, identity, run.history) if folder is not None and machine.is_main else None
        begun = 0 if first is None else 1
        while len(run.history) - begun < recipe.epochs:
            record = run.epoch(len(run.history) - begun, on_step if machine.is_main else None)
            if output is not None:
                output.add(record, run)
            if on_epoch is not None and machine.is_main:
                on_epoch(record)
        run.finish()
        if output is not None:
            output.finish(model)
    machine.wait()  # the files are there
    return run.history


class _Run:
    """A training under way, in one process."""

    def __init__(
        self, model: nn.Module, data: Data, recipe: Recipe, machine: Machine, objective: Objective, history: History
    ) -> None:
        self.model, self.data, self.recipe, self.machine, self.objective = model, data, recipe, machine, objective
        self.history = history
        self._network = machine.parallel(model)
        self._optimiser = machine.accelerator.prepare_optimizer(_optimiser(model, recipe))
        self._average = None if recipe.ema is None else Average(model, recipe.ema)
        self._steps = len(data.train) // recipe.batch
        objective.start(model)

    def epoch(self, index: int, on_step: OnStep | None) -> Epoch:
        """Train for one epoch, counted from 0, and measure."""
        begun, recipe, machine = time.perf_counter(), self.recipe, self.machine
        machine.seed(recipe.seed, index)
        self.model.train()
        totals = torch.zeros(2, dtype=torch.float64, device=machine.device)
        order = recipe.seed * _ORDERS + index
        batches = self.data.train.batches(recipe.batch, order=order, share=machine.share, device=machine.device)
        for step, (images, labels) in enumerate(batches, start=index * self._steps):
            self._step(step, images, labels, totals)
            if on_step is not None:
                on_step("training", step + 1, recipe.epochs * self._steps)
        loss, correct = (total / (self._steps * recipe.batch) for total in machine.sum(totals))
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} in epoch {index + 1}: lower the learning rate, warm up, or clip")
        self.objective.progress(self.model, (index + 1) / recipe.epochs)
        test_loss, test_accuracy = evaluate(self.model, self.data.test, recipe.batch, machine)
        rate = rate_at(recipe, (index + 1) * self._steps - 1, self._steps)
        averaged, seconds = self._averaged_accuracy(), time.perf_counter() - begun
        record = Epoch(index + 1, rate, loss, correct, test_loss, test_accuracy, averaged, seconds)
        self.history = (*self.history, record)
        return record

    def _step(self, step: int, images: Tensor, labels: Tensor, totals: Tensor) -> None:
        """One step; loss and right answers are added to ``totals`` where they are, since reading them would wait."""
        recipe, accelerator = self.recipe, self.machine.accelerator
        self.objective.progress(self.model, step / (self._steps * recipe.epochs))
        for group in self._optimiser.param_groups:
            group["lr"] = rate_at(recipe, step, self._steps)
        images = placed(images, self.model)
        with accelerator.autocast():
            logits = logits_of(self._network, images)
            hard = F.cross_entropy(logits, labels, label_smoothing=recipe.smoothing)
            loss = self.objective.loss(hard, logits, images)
        self._optimiser.zero_grad()
        accelerator.backward(loss)
        if recipe.clip is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self._optimiser.step()
        if self._average is not None:
            self._average.update()
        totals[0].add_(loss.detach(), alpha=len(labels))
        totals[1].add_((logits.detach().argmax(1) == labels).sum())

    def _averaged_accuracy(self) -> float | None:
        if self._average is None:
            return None
        with self._average.applied():
            return evaluate(self.model, self.data.test, self.recipe.batch, self.machine)[1]

    def finish(self) -> None:
        """Leave the network as the recipe wants it."""
        if self._average is not None:
            self._average.apply()

    def checkpoint(self, identity: Identity) -> Checkpoint:
        """The state at the end of the epoch."""
        scaler, average = self.machine.accelerator.scaler, self._average
        return Checkpoint(
            identity=identity,
            history=self.history,
            model=self.model.state_dict(),
            optimiser=self._optimiser.state_dict(),
            ema=None if average is None else average.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from there."""
        self.history = checkpoint.history
        self.model.load_state_dict(checkpoint.model)
        self._optimiser.load_state_dict(checkpoint.optimiser)
        if self._average is not None and checkpoint.ema is not None:
            self._average.load_state_dict(checkpoint.ema)
        if self.machine.accelerator.scaler is not None and checkpoint.scaler is not None:
            self.machine.accelerator.scaler.load_state_dict(checkpoint.scaler)


class _Output:
    """The folder of a training, written by one process."""

    def __init__(self, folder: Path, identity: Identity, known: History) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RmfxError(f"{folder} cannot be made a folder: {error.strerror}") from error
        self._folder, self._identity = folder, identity
        self._journal = Journal(folder, known)
        with replacing(folder / "recipe.json", RmfxError) as scratch:
            scratch.write_text(json.dumps(dict(identity), indent=2) + "\n")

    def add(self, record: Epoch, run: _Run) -> None:
        save_checkpoint(run.checkpoint(self._identity), self._folder)
        self._journal.add(record)

    def finish(self, model: nn.Module) -> None:
        tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        with replacing(self._folder / "model.safetensors", RmfxError) as scratch:
            save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, scratch)


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Weight decay acts on weights of layers only: norms, biases and slopes have one dimension or none."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, recipe.learning_rate, recipe.momentum, nesterov=recipe.nesterov)


def _check_batch(data: Data, recipe: Recipe, machine: Machine) -> None:
    if recipe.batch > len(data.train):
        raise RmfxError(f"a batch of {recipe.batch} images is more than the {len(data.train)} to train on")
    if recipe.batch % machine.share.count:
        raise RmfxError(f"a batch of {recipe.batch} images cannot be shared out among {machine.share.count} processes")
