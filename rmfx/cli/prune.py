"""``rmfx prune``: remove the channels that say least, in one go or in rounds with training between them."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import fx, nn

import rmfx
from rmfx.cli import console, learning, options
from rmfx.cli.outcome import check_output, without_warning
from rmfx.cli.source import is_saved
from rmfx.learn.data import Data
from rmfx.learn.evaluate import check_fits
from rmfx.learn.finetune import RECIPE
from rmfx.learn.recipe import Recipe
from rmfx.learn.rounds import batches_of, prune_in_rounds

Measure = Literal["taylor", "bn", "l1", "l2"]


def prune(
    model: options.SavedModel,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT.rmfx", help="Where to write.")],
    data: options.DataOption = "digits",
    data_root: options.DataRootOption = None,
    weights: options.WeightsOption = None,
    macs: Annotated[float | None, typer.Option("--macs", metavar="PART", help="How much of the MACs is left.")] = None,
    amount: Annotated[
        float | None, typer.Option("--amount", metavar="PART", help="How much of all channels goes.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", metavar="SCORE", help="Channels that score below it go.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option("--latency-ms", metavar="MS", help="How long an image may take on '--target'.")
    ] = None,
    target: options.TargetOption = "onnxruntime",
    threads: options.ThreadsOption = None,
    importance: Annotated[Measure, typer.Option("--importance", help="What ranks channels.")] = "taylor",
    images: Annotated[int, typer.Option("--images", min=1, help="Of DATA, to rank channels by.")] = 1024,
    layerwise: Annotated[bool, typer.Option("--layerwise", help="'--amount' of each layer, not of all.")] = False,
    round_to: Annotated[int, typer.Option("--round-to", min=1, help="Widths are multiples of it.")] = 1,
    drop_constants: Annotated[
        bool, typer.Option("--drop-constants", help="Leave out what removed channels emitted without their weights.")
    ] = False,
    reconstruct: Annotated[
        bool,
        typer.Option("--reconstruct", help="Make up for what is gone, by least squares on '--images'."),
    ] = False,
    lower: Annotated[
        bool, typer.Option("--lower", help="Turn what is left of shortcuts back into shortcuts, where that is cheaper.")
    ] = False,
    residual: Annotated[
        bool, typer.Option("--residual", help="Prune a named network as it is, without converting it first.")
    ] = False,
    rounds: Annotated[
        int, typer.Option("--rounds", min=0, help="Reach '--macs' in so many steps, training after each.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the rounds beside OUTPUT.")] = False,
    epochs: options.EpochsOption = RECIPE.epochs,
    batch: options.TrainBatchOption = RECIPE.batch,
    learning_rate: options.RateOption = RECIPE.learning_rate,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = None,
    json: options.JsonOption = False,
) -> None:
    """Remove channels, physically, and write what is left. A name is converted first, a .rmfx file is not.

    With --rounds, checkpoints and metrics go to the folder OUTPUT-rounds. Train the result on with rmfx train
    OUTPUT.rmfx: shortcuts that --lower has not restored by then train as ordinary filters. Several processes share each
    batch of the rounds: accelerate launch -m rmfx prune ...
    """
    check_output(output, (".rmfx",))
    if rounds and (macs is None or (amount, threshold, latency, layerwise, lower) != (None, None, None, False, False)):
        raise typer.BadParameter(
            "--rounds go with --macs PART, and with none of the other measures, --layerwise or --lower"
        )
    _demand_goal(macs, amount, threshold, latency, layerwise)
    source = learning.open_named(data, data_root)
    network = learning.network_for(model, source, weights, seed)
    check_fits(network, source)
    if not (residual or is_saved(model)):
        with console.step(f"converting {model}"), without_warning():
            network = _converted(network, source, batch, images, seed)
    if rounds:
        assert macs is not None
        recipe = Recipe(epochs=epochs, batch=batch, learning_rate=learning_rate, seed=seed)
        asked = learning.Asked(model, data, output.with_name(f"{output.stem}-rounds"), recipe, device)
        with learning.processes(asked) as speaks, learning.progress() as on_step:
            network, done = prune_in_rounds(
                *(network, source, recipe),
                rounds=rounds,
                macs=macs,
                folder=asked.folder,
                importance=importance,
                round_to=round_to,
                ranking_batches=max(1, images // batch),
                reconstruct=reconstruct,
                keep_constants=not drop_constants,
                resume=resume,
                device=device,
                on_step=on_step,
                on_epoch=learning.tell_epoch,
                on_round=_tell_round if speaks else None,
            )
        if not speaks:
            return
        assert isinstance(network, fx.GraphModule)
        rmfx.save(network, output)
        records = [{**each.pruned, "history": [epoch.to_dict() for epoch in each.history]} for each in done]
        _tell(output, {"rounds": records}, f"test accuracy {done[-1].history[-1].test_accuracy:.2%}", json)
        return
    budget: dict[str, Any] | None = None if macs is None else {"macs": macs}
    if latency is not None:
        budget = {**(budget or {}), "latency_ms": latency, "target": options.parse_target(target, threads)}
    [(examples, _)] = batches_of(source, network, batch, 1, seed)
    batches = partial(batches_of, source, network, batch, max(1, images // batch), seed)
    with console.step("ranking channels and removing them"):
        pruned = rmfx.prune(
            network,
            examples if latency is None else examples[:1],
            amount=amount,
            threshold=threshold,
            budget=budget,
            importance=importance,
            data=batches(),
            scope="layer" if layerwise else "global",
            round_to=round_to,
            keep_constants=not drop_constants,
            calibration=batches() if reconstruct else None,
            lower=lower,
        )
    rmfx.save(pruned.network, output)
    _tell(output, pruned.to_dict(), str(pruned), json)


def _demand_goal(
    macs: float | None, amount: float | None, threshold: float | None, latency: float | None, layerwise: bool
) -> None:
    """Refuse what cannot be reached before anything is converted."""
    if sum(goal is not None for goal in (amount, threshold, latency if macs is None else macs)) != 1:
        raise typer.BadParameter("give one goal: --macs and --latency-ms, alone or together, --amount, or --threshold")
    if (macs is not None and not 0 < macs <= 1) or (amount is not None and not 0 <= amount < 1):
        raise typer.BadParameter("--macs is above 0 and up to 1, --amount from 0 to less than 1")
    if latency is not None and not 0 < latency < math.inf:
        raise typer.BadParameter(f"--latency-ms is above 0, got {latency}")
    if layerwise and amount is None:
        raise typer.BadParameter("--layerwise is for --amount: of every layer so much")


def _converted(network: nn.Module, data: Data, batch: int, images: int, seed: int) -> nn.Module:
    """The plain network with its norms, which fit what they carry: training starts from there."""
    like = next(network.parameters())
    example = torch.zeros(2, *data.shape, dtype=like.dtype, device=like.device)
    plain = rmfx.convert(network, example, keep_bn=True, partial=False)
    assert isinstance(plain, fx.GraphModule)
    if rmfx.report(plain).carried_norms:
        rmfx.calibrate(plain, (x for x, _ in batches_of(data, plain, batch, max(1, images // batch), seed)))
    return plain


def _tell_round(number: int, told: dict[str, Any]) -> None:
    console.note(f"round {number}: MACs {told['macs'][0]} -> {told['macs'][1]}")


def _tell(output: Path, document: dict[str, Any], text: str, json: bool) -> None:
    if json:
        console.out_json({"output": str(output), **document})
        return
    console.out(text)
    console.out(f"wrote {output}")
