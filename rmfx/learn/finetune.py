"""Fine-tuning of a converted network, the paper's appendix A.3 and Figure 9.

Conversion brings parameters in that a residual network does not have, so that training can go on from exactly the same
function. With its batch norms kept and calibrated it learns better than with them folded into the convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from rmfx.check.compare import float32_arithmetic
from rmfx.convert import convert
from rmfx.copying import deep_copy
from rmfx.errors import RmfxError, VerificationError
from rmfx.learn.data import Data, Split
from rmfx.learn.evaluate import answers, check_fits, evaluate, placed
from rmfx.learn.machine import open_machine
from rmfx.learn.metrics import Epoch, History
from rmfx.learn.recipe import Recipe
from rmfx.learn.trainer import OnEpoch, OnStep, train
from rmfx.report import report
from rmfx.training import calibrate

RECIPE = Recipe(epochs=10, learning_rate=0.01)
_ROUNDINGS = 1000  # of the largest logit: two that are nearer than so many may change places


@dataclass(frozen=True)
class Start:
    """How the converted network answers the test images before training, beside the original one."""

    images: int
    same: int  # predictions
    original_accuracy: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A converted network after fine-tuning, in eval mode; the first record of ``history`` is before it, epoch 0."""

    network: fx.GraphModule
    start: Start
    history: History


def finetune(
    model: nn.Module,
    data: Data,
    recipe: Recipe = RECIPE,
    *,
    fold_bn: bool = False,
    calibration: int | None = None,
    folder: Path | None = None,
    resume: bool = False,
    device: str | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
) -> FineTuned:
    """Remove the residual connections of a trained network, and train what results on.

    Args:
        model: trained, in eval mode; left untouched.
        data, recipe, folder, resume, device, on_step, on_epoch: as for :func:`rmfx.learn.trainer.train`.
        fold_bn: fold the batch norms first, as for inference; the paper's worse variant.
        calibration: batches of training images that the statistics of carried channels come from, taken at even
            distances; by default all, as in the paper.

    Raises:
        RmfxError: when nothing is removed, or as in :func:`rmfx.learn.trainer.train`.
        VerificationError: when the converted network gives a test image another class, and not for rounding.
        UnsupportedModelError, TraceError: as in :func:`rmfx.convert`.
    """
    machine = open_machine(recipe.precision, device)
    original = deep_copy(model).eval()
    check_fits(original, data)
    network = _converted(original, data, fold_bn)
    with machine.hosting(original), machine.hosting(network):
        if report(network).carried_norms:
            calibrate(network, _calibrating(network, data.train, recipe.batch, calibration, machine.device))
        start = _compare(original, network, data.test, recipe.batch, machine.device)
        first = Epoch(0, 0.0, None, None, *evaluate(network, data.test, recipe.batch, machine))
    del original
    history = train(
        network,
        data,
        recipe,
        folder=folder,
        resume=resume,
        device=device,
        first=first,
        on_step=on_step,
        on_epoch=on_epoch,
    )
    return FineTuned(network, start, history)


def _converted(model: nn.Module, data: Data, fold_bn: bool) -> fx.GraphModule:
    """The plain network, all of whose parameters can be trained: one that is only run is often frozen."""
    like = next(model.parameters())
    example = torch.zeros(1, *data.shape, dtype=like.dtype, device=like.device)
    network = convert(model, example, keep_bn=not fold_bn, partial=False)
    assert isinstance(network, fx.GraphModule)
    if not report(network).count("removed"):
        raise RmfxError("conversion removes nothing from this network: train it as it is (rmfx train)")
    return network.requires_grad_()


def _calibrating(
    network: nn.Module, split: Split, size: int, wanted: int | None, device: torch.device
) -> Iterator[Tensor]:
    batches = split.batches(size, device=device)
    if wanted is not None:
        every = max(1, len(split) // size // wanted)  # the images may lie in order of their classes
        batches = islice(batches, 0, every * (wanted - 1) + 1, every)
    for images, _ in batches:
        yield placed(images, network)


def _compare(original: nn.Module, network: nn.Module, split: Split, size: int, device: torch.device) -> Start:
    """Count equal predictions, in full precision also on a GPU.

    Raises:
        VerificationError: when one differs that rounding does not explain.
    """
    same, right, right_before = 0, 0, 0
    with float32_arithmetic():
        before, after = (answers(each, split, size, device) for each in (original, network))
        for (expected, labels), (actual, _) in zip(before, after, strict=True):
            old, new = expected.argmax(1), actual.argmax(1)
            lead = (expected.gather(1, old[:, None]) - expected.gather(1, new[:, None])).squeeze(1)
            allowed = _ROUNDINGS * torch.finfo(expected.dtype).eps * expected.abs().amax(1)
            if int((lead > allowed).sum()):
                raise VerificationError(
                    "the converted network gives a test image another class than the original: this is a bug in rmfx, "
                    "please report it with the output of `rmfx doctor`"
                )
            same += int((old == new).sum())
            right += int((new == labels).sum())
            right_before += int((old == labels).sum())
    return Start(len(split), same, right_before / len(split), right / len(split))
