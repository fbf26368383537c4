"""``rmfx export``: write a network as ONNX, run it in onnxruntime and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import rmfx
from rmfx.cli import console, options
from rmfx.cli.outcome import check_output
from rmfx.cli.source import example_for, open_model

Device = Literal["cpu", "cuda"]


def export(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.onnx", help="Where to write.")],
    device: Annotated[Device, typer.Option("--device", help="Where onnxruntime must run the file to compare.")] = "cpu",
    original: Annotated[
        bool, typer.Option("--original", help="Export the named network as it is, with its residual connections.")
    ] = False,
    weights: options.WeightsOption = None,
    pretrained: options.PretrainedOption = False,
    size: options.SizeOption = None,
    input_shape: options.ShapeOption = None,
    batch: options.BatchOption = 1,
    dtype: options.DtypeOption = "float32",
    seed: options.SeedOption = 0,
    json: options.JsonOption = False,
) -> None:
    """Write MODEL as ONNX, run the file in onnxruntime, and compare. A name is converted first, a .rmfx file is not.

    Conversion options belong to `rmfx convert`, which writes ONNX, too.
    """
    check_output(output, (".onnx",))
    chosen = options.model_options(weights, pretrained, size, input_shape, batch, dtype, seed)
    source = open_model(model, chosen)
    example = example_for(source, chosen)
    network = source.network
    if not source.saved and not original:
        with console.step(f"converting {model} and verifying the result"):
            network = rmfx.convert(network, example)
    with console.step(f"writing {output} and comparing it on {device}"):
        rmfx.export(network, output, example, device=device, like=source.like)
    if json:
        console.out_json({"model": model, "output": str(output), "device": device, "bytes": output.stat().st_size})
    else:
        console.out(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB); onnxruntime on {device} agrees with torch")
