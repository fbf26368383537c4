"""What the commands that train share: data and network by name, progress, and what is said at the end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed
import typer
from torch import nn

from rmfx import zoo
from rmfx.cli import console, options
from rmfx.cli.source import is_saved, open_model
from rmfx.learn.data import Data
from rmfx.learn.machine import open_machine
from rmfx.learn.metrics import Epoch, History
from rmfx.learn.recipe import Recipe
from rmfx.learn.sources import open_data
from rmfx.learn.trainer import OnStep


@dataclass(frozen=True)
class Asked:
    """A training as a command line asks for it."""

    model: str
    data: str
    folder: Path
    recipe: Recipe
    device: str | None = None


@contextlib.contextmanager
def processes(asked: Asked) -> Iterator[bool]:
    """Join the other processes, if there are any, until the block ends; yield whether this one is to speak.

    Raises:
        RuntimeUnavailableError: when accelerate, or the device asked for, is not there.
        typer.BadParameter: for a file where the folder should be.
    """
    if asked.folder.exists() and not asked.folder.is_dir():
        raise typer.BadParameter(f"{asked.folder}: this is a file; name a folder")
    try:
        yield open_machine(asked.recipe.precision, asked.device).is_main
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def progress() -> Iterator[OnStep]:
    """A progress bar on standard error; what libraries print meanwhile goes there, too."""
    with contextlib.redirect_stdout(sys.stderr), console.StepBars() as bars:
        yield bars


def open_named(name: str, root: Path | None) -> Data:
    """The dataset called ``name``; the same one whatever the seed of the training."""
    with console.step(f"opening {name}"):
        return open_data(name, root=root)


def network_for(name: str, data: Data, weights: Path | None, seed: int) -> nn.Module:
    """The network called ``name``, with the channels and classes of ``data`` where its builder takes them; or saved."""
    with console.step(f"building {name}"):
        if is_saved(name):
            if weights is not None:
                raise typer.BadParameter(f"--weights: {name} holds its own")
            return open_model(name, options.ModelOptions()).network
        arguments = zoo.arguments_for(name, data.shape[0], data.classes)
        return zoo.build(name, weights=weights, seed=seed, arguments=arguments)


def tell_epoch(epoch: Epoch) -> None:
    """One line about an epoch on standard error."""
    console.note(str(epoch))


def tell_result(asked: Asked, history: History, written: str, json: bool, **more: Any) -> None:
    """What came out, on standard output: as text, or with ``json`` as one document with ``more`` in it."""
    if json:
        records = [epoch.to_dict() for epoch in history]
        document = {"model": asked.model, "data": asked.data, "folder": str(asked.folder)}
        console.out_json({**document, "recipe": asked.recipe.to_dict(), **more, "history": records})
        return
    last = history[-1]
    averaged = "" if last.ema_test_accuracy is None else f", {last.ema_test_accuracy:.2%} with averaged weights"
    console.out(f"test accuracy after {last.epoch} epochs: {last.test_accuracy:.2%}{averaged}")
    console.out(f"wrote {asked.folder / written}")
