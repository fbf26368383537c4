"""``rmfx verify``: prove on hostile inputs that two networks compute the same function."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

import rmfx
from rmfx.cli import console, options
from rmfx.cli.source import example_for, is_saved, open_model


def verify(
    original: Annotated[str, typer.Argument(metavar="ORIGINAL", help="A MODEL: a name, or a .rmfx file.")],
    converted: Annotated[str, typer.Argument(metavar="CONVERTED", help="A MODEL: a name, or a .rmfx file.")],
    weights: options.WeightsOption = None,
    pretrained: options.PretrainedOption = False,
    size: options.SizeOption = None,
    input_shape: options.ShapeOption = None,
    batch: options.BatchOption = 1,
    dtype: options.DtypeOption = "float32",
    seed: options.SeedOption = 0,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also change one carried tap per place and see that it is noticed.")
    ] = False,
    json: options.JsonOption = False,
) -> None:
    """Compare two networks in float64 on hostile inputs; leave with code 1 where they differ.

    The options build whichever of the two is a name.
    """
    chosen = options.model_options(weights, pretrained, size, input_shape, batch, dtype, seed)
    first, second = open_model(original, chosen), open_model(converted, chosen)
    example = example_for(second if is_saved(original) and not is_saved(converted) else first, chosen)
    with console.step(f"comparing {original} and {converted}"):
        verification = rmfx.verify(first.network, second.network, example, seed=seed, probe=probe)
    if json:
        console.out_json(
            {"original": original, "converted": converted, "verification": dataclasses.asdict(verification)}
        )
    else:
        console.out(str(verification))
