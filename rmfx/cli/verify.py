"""``rmfx verify``: prove on hostile inputs that two networks compute the same function."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import torch
import typer
from torch.utils import _pytree as pytree

import rmfx
from rmfx.cli import console, options
from rmfx.cli.source import example_for, is_saved, open_model
from rmfx.errors import RuntimeUnavailableError, VerificationError


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
    gaps: Annotated[
        bool, typer.Option("--gaps", help="Also the errors of both in float32, TF32, bfloat16 and float16.")
    ] = False,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="With --gaps: those of each layer, too.")] = False,
    device: Annotated[options.Device, typer.Option("--device", help="Where torch runs both.")] = "cpu",
    json: options.JsonOption = False,
) -> None:
    """Compare two networks in float64 on hostile inputs; leave with code 1 where they differ.

    The options build whichever of the two is a name. Gaps are measured on inputs of unit size.
    """
    if per_layer and not gaps:
        raise typer.BadParameter("--per-layer belongs to --gaps: give both")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailableError("torch sees no CUDA device here: leave out --device, or see `rmfx doctor`")
    chosen = options.model_options(weights, pretrained, size, input_shape, batch, dtype, seed)
    first, second = open_model(original, chosen), open_model(converted, chosen)
    example = example_for(second if is_saved(original) and not is_saved(converted) else first, chosen)
    networks = (first.network.to(device), second.network.to(device))
    example = pytree.tree_map_only(torch.Tensor, lambda value: value.to(device), example)
    found: dict[str, Any] = {"original": original, "converted": converted}
    try:
        with console.step(f"comparing {original} and {converted}"):
            verification = rmfx.verify(*networks, example, seed=seed, probe=probe)
    except VerificationError as error:
        if json:
            console.out_json({**found, "verification": None, "difference": str(error)})
        raise
    found["verification"] = dataclasses.asdict(verification)
    lines = [str(verification)]
    if gaps:
        with console.step("running both in other precisions"):
            measured = rmfx.precision_gaps(*networks, example, per_layer=per_layer)
        found["gaps"] = measured.to_dict()
        lines.append(str(measured))
    if json:
        console.out_json(found)
    else:
        console.out("\n".join(lines))
