"""Everything that a training needs to go on as if it had never stopped, in one file that is whole or not there."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmfx.errors import RmfxError
from rmfx.files.atomic import replacing
from rmfx.learn.data import Data
from rmfx.learn.metrics import Epoch, History
from rmfx.learn.objective import Objective
from rmfx.learn.recipe import Recipe

NAME = "checkpoint.pt"
_PROBE = 64  # test images that tell one dataset from another of the same name

Identity = Mapping[str, str | float | None]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a training at the end of an epoch.

    The position in the schedule is the number of epochs in ``history``. Random numbers have no state: each epoch
    begins by seeding them anew.

    Attributes:
        identity: what must not differ when training goes on (:func:`identity_of`).
        history: the epochs so far.
        model, optimiser: state dicts.
        ema, scaler: those of the averaged weights and of the gradient scaler of fp16, or None.
    """

    identity: Identity
    history: History
    model: dict[str, Any]
    optimiser: dict[str, Any]
    ema: dict[str, Any] | None
    scaler: dict[str, Any] | None


def identity_of(model: nn.Module, data: Data, recipe: Recipe, objective: Objective) -> Identity:
    """What a training is, by name: two that agree in all of it give the same network."""
    state = sorted((name, str(getattr(value, "shape", ""))) for name, value in model.state_dict().items())
    network = hashlib.sha256(repr(state).encode()).hexdigest()
    images, labels = next(data.test.batches(_PROBE))
    seen = hashlib.sha256(images.contiguous().numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    return {
        "network": f"{type(model).__name__} {network[:12]}",
        "data": f"{data.name}, {len(data.train)} + {len(data.test)} images, {seen[:12]}",
        **recipe.to_dict(),
        **objective.settings(),
    }


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write ``checkpoint.pt`` completely or not at all.

    Raises:
        RmfxError: when it cannot be written.
    """
    history = [epoch.to_dict() for epoch in checkpoint.history]
    with replacing(folder / NAME, RmfxError) as scratch:
        torch.save({**vars(checkpoint), "identity": dict(checkpoint.identity), "history": history}, scratch)


def load_checkpoint(folder: Path, identity: Identity) -> Checkpoint:
    """Read ``checkpoint.pt``, tensors on the CPU; nothing in it is executed.

    Args:
        folder: that training wrote to.
        identity: of the training that goes on; must be that of the one in the file.

    Raises:
        RmfxError: when there is none, it cannot be read, or it is of another training: names what differs.
    """
    path = folder / NAME
    if not path.is_file():
        raise RmfxError(f"there is no {path} to go on from: leave out resume (--resume) to begin")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        history = tuple(Epoch(**epoch) for epoch in stored.pop("history"))
        checkpoint = Checkpoint(history=history, **stored)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, TypeError, AttributeError) as error:
        raise RmfxError(f"{path} cannot be read as a checkpoint of rmfx: {str(error).splitlines()[0]}") from error
    differing = [
        f"{name} was {checkpoint.identity.get(name)!r} and is {identity.get(name)!r}"
        for name in sorted({*checkpoint.identity, *identity})
        if checkpoint.identity.get(name) != identity.get(name)
    ]
    if differing:
        raise RmfxError(f"{path} is of another training: {'; '.join(differing)}")
    return checkpoint


def check_unused(folder: Path) -> None:
    """Refuse a folder in which there is a training already.

    Raises:
        RmfxError: says what to do.
    """
    if (folder / NAME).exists():
        raise RmfxError(f"{folder} holds a training already: go on with it (--resume), or name another folder")
