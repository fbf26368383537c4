"""``rmfx train``: train a network by name on a dataset by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import fx

import rmfx
from rmfx.cli import console, learning, options
from rmfx.learn.data import Data
from rmfx.learn.distill import Distillation
from rmfx.learn.objective import Objective
from rmfx.learn.recipe import Recipe
from rmfx.learn.slimming import Slimming
from rmfx.learn.trainer import train as train_network
from rmfx.pruning.scales import scale_shortcuts

_DEFAULT = Recipe()


def train(
    model: options.SavedModel,
    output: options.FolderOption,
    data: options.DataOption = "digits",
    data_root: options.DataRootOption = None,
    resume: options.ResumeOption = False,
    weights: options.WeightsOption = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL", help="Learn from this network, too (ResDistill).")
    ] = None,
    teacher_weights: Annotated[
        Path | None, typer.Option("--teacher-weights", metavar="FILE", help="The teacher's state dict.")
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", min=0.0, metavar="FACTOR", help="L1 on scales of norms, to prune afterwards."),
    ] = None,
    shortcut_sparsity: Annotated[
        float | None,
        typer.Option("--shortcut-sparsity", min=0.0, metavar="FACTOR", help="The same on shortcuts, which get scales."),
    ] = None,
    epochs: options.EpochsOption = _DEFAULT.epochs,
    batch: options.TrainBatchOption = _DEFAULT.batch,
    learning_rate: options.RateOption = _DEFAULT.learning_rate,
    momentum: options.MomentumOption = _DEFAULT.momentum,
    nesterov: options.NesterovOption = _DEFAULT.nesterov,
    weight_decay: options.DecayOption = _DEFAULT.weight_decay,
    schedule: options.ScheduleOption = _DEFAULT.schedule,
    step_every: options.StepEveryOption = _DEFAULT.step_every,
    step_factor: options.StepFactorOption = _DEFAULT.step_factor,
    warmup: options.WarmupOption = _DEFAULT.warmup,
    smoothing: options.SmoothingOption = _DEFAULT.smoothing,
    precision: options.PrecisionOption = _DEFAULT.precision,
    ema: options.EmaOption = _DEFAULT.ema,
    clip: options.ClipOption = _DEFAULT.clip,
    seed: options.SeedOption = _DEFAULT.seed,
    device: options.DeviceOption = None,
    json: options.JsonOption = False,
) -> None:
    """Train a network; FOLDER gets its weights, a checkpoint to resume from, and the metrics of each epoch.

    Several processes, also on several machines, share each batch: accelerate launch -m rmfx train ...
    Give FOLDER/model.safetensors to the other commands with --weights; a .rmfx file becomes FOLDER/model.rmfx. Needs
    pip install 'rmfx[train]'.
    """
    recipe = Recipe(
        *(epochs, batch, learning_rate, momentum, nesterov, weight_decay, schedule, step_every, step_factor),
        *(warmup, smoothing, precision, ema, clip, seed),
    )
    asked = learning.Asked(model, data, output, recipe, device)
    if teacher_weights is not None and teacher is None:
        raise typer.BadParameter("--teacher-weights are of no use without --teacher MODEL")
    if teacher is not None and (sparsity, shortcut_sparsity) != (None, None):
        raise typer.BadParameter("--teacher and --sparsity are objectives of their own: give one of them")
    with learning.processes(asked) as speaks:
        images = learning.open_named(data, data_root)
        objective = Objective()
        if teacher is not None:
            objective = Distillation(learning.network_for(teacher, images, teacher_weights, seed))
        network = learning.network_for(model, images, weights, seed)
        if shortcut_sparsity is not None:
            network = scale_shortcuts(network, torch.zeros(1, *images.shape))
        if sparsity is not None or shortcut_sparsity is not None:
            objective = Slimming(sparsity or 0.0, shortcut_sparsity)
            if speaks:
                _tell_reach(objective, recipe, images)
        with learning.progress() as on_step:
            history = train_network(
                network,
                images,
                recipe,
                folder=output,
                resume=resume,
                objective=objective,
                device=device,
                on_step=on_step,
                on_epoch=learning.tell_epoch,
            )
        if not speaks:
            return
        written = "model.safetensors"
        if isinstance(network, fx.GraphModule):  # its layers are in no code that weights could be loaded into
            written = "model.rmfx"
            rmfx.save(network, output / written)
        learning.tell_result(asked, history, written, json)


def _tell_reach(slimming: Slimming, recipe: Recipe, images: Data) -> None:
    """Say of each L1 that has been asked for how far it can bring scales down: 1 switches them off."""
    for name, moved in zip(
        ("norms", "shortcuts"), slimming.reach(recipe, len(images.train) // recipe.batch), strict=True
    ):
        if moved:
            few = "" if moved >= 1 else ", which is too little to get from 1 to 0: raise the factor or train longer"
            console.note(f"L1 brings scales of {name} that nothing holds down by {moved:.2g}{few}")
