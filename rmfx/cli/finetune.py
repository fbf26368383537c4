"""``rmfx finetune``: remove the residual connections of a trained network, and train it on."""

from __future__ import annotations

from typing import Annotated

import typer

import rmfx
from rmfx.cli import console, learning, options
from rmfx.learn.finetune import RECIPE
from rmfx.learn.finetune import finetune as finetune_network
from rmfx.learn.recipe import Recipe


def finetune(
    model: options.NamedModel,
    output: options.FolderOption,
    data: options.DataOption = "digits",
    data_root: options.DataRootOption = None,
    resume: options.ResumeOption = False,
    weights: options.WeightsOption = None,
    fold_bn: Annotated[
        bool, typer.Option("--fold-bn", help="Train with batch norms folded; learns worse than with them kept.")
    ] = False,
    calibration: Annotated[
        int | None,
        typer.Option("--calibration", min=1, metavar="N", help="Batches to calibrate batch norms on; default: all."),
    ] = None,
    epochs: options.EpochsOption = RECIPE.epochs,
    batch: options.TrainBatchOption = RECIPE.batch,
    learning_rate: options.RateOption = RECIPE.learning_rate,
    momentum: options.MomentumOption = RECIPE.momentum,
    nesterov: options.NesterovOption = RECIPE.nesterov,
    weight_decay: options.DecayOption = RECIPE.weight_decay,
    schedule: options.ScheduleOption = RECIPE.schedule,
    step_every: options.StepEveryOption = RECIPE.step_every,
    step_factor: options.StepFactorOption = RECIPE.step_factor,
    warmup: options.WarmupOption = RECIPE.warmup,
    smoothing: options.SmoothingOption = RECIPE.smoothing,
    precision: options.PrecisionOption = RECIPE.precision,
    ema: options.EmaOption = RECIPE.ema,
    clip: options.ClipOption = RECIPE.clip,
    seed: options.SeedOption = RECIPE.seed,
    device: options.DeviceOption = None,
    json: options.JsonOption = False,
) -> None:
    """Convert a trained network, show that it answers as before, and train it on as a plain network.

    FOLDER gets model.rmfx, a checkpoint to resume from, and the metrics of each epoch. Its batch norms are still there:
    fold them with rmfx convert FOLDER/model.rmfx OUTPUT. Several processes share each batch: accelerate launch -m rmfx
    finetune ... Needs pip install 'rmfx[train]'.
    """
    recipe = Recipe(
        *(epochs, batch, learning_rate, momentum, nesterov, weight_decay, schedule, step_every, step_factor),
        *(warmup, smoothing, precision, ema, clip, seed),
    )
    asked = learning.Asked(model, data, output, recipe, device)
    with learning.processes(asked) as speaks:
        images = learning.open_named(data, data_root)
        network = learning.network_for(model, images, weights, seed)
        with learning.progress() as on_step:
            tuned = finetune_network(
                network,
                images,
                recipe,
                fold_bn=fold_bn,
                calibration=calibration,
                folder=output,
                resume=resume,
                device=device,
                on_step=on_step,
                on_epoch=learning.tell_epoch,
            )
        if not speaks:
            return
        rmfx.save(tuned.network, output / "model.rmfx")
        if not json:
            console.out(
                f"after conversion: {tuned.start.same} of {tuned.start.images} predictions as before, test accuracy "
                f"{tuned.start.accuracy:.2%}"
            )
        learning.tell_result(asked, tuned.history, "model.rmfx", json, start=vars(tuned.start))
