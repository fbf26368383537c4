"""``rmfx plan``: decide what makes a network faster on a target, and write the decisions down."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated

import typer

import rmfx
from rmfx.cli import console, options
from rmfx.cli.outcome import check_output, without_warning
from rmfx.cli.source import example_for, open_model, shape_of
from rmfx.errors import PlanError


def plan(
    model: options.Model,
    target: options.TargetOption = "eager",
    threads: options.ThreadsOption = None,
    measure: options.MeasureOption = 60.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Where to write the plan.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="FOLDER", help="Of prices that were measured; ~/.cache/rmfx/prices."),
    ] = None,
    weights: options.WeightsOption = None,
    pretrained: options.PretrainedOption = False,
    size: options.SizeOption = None,
    input_shape: options.ShapeOption = None,
    batch: options.BatchOption = 1,
    dtype: options.DtypeOption = "float32",
    seed: options.SeedOption = 0,
    carrier: options.CarrierOption = "auto",
    json: options.JsonOption = False,
) -> None:
    """Decide place by place what is fastest on a target, by measuring. Changes nothing.

    Follow the plan with 'rmfx convert MODEL --plan FILE.json', also for other weights of the same architecture.
    """
    if output is not None:
        check_output(output, (".json",))
    chosen = options.model_options(weights, pretrained, size, input_shape, batch, dtype, seed)
    source = open_model(model, chosen)
    example = example_for(source, chosen)
    if example is None:
        raise PlanError("a plan needs an input: give --size or --input-shape")
    with console.TimeBar(f"planning {model}", measure) as bar, without_warning():
        made = rmfx.make_plan(
            source.network,
            example,
            target=options.parse_target(target, threads),
            measure=measure,
            carrier=carrier,
            cache=cache or True,
            on_step=bar,
        )
    if output is not None:
        made.save(output)
    if json:
        document = {"model": model, "input_shape": shape_of(example), "output": output and str(output)}
        console.out_json({**document, "plan": json_text.loads(made.to_json())})
    else:
        console.out(str(made))
