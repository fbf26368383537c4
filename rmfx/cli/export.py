"""``rmfx export``: write a network as ONNX, run it in onnxruntime and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from torch import Tensor

import rmfx
from rmfx.cli import console, options
from rmfx.cli.outcome import check_output
from rmfx.cli.source import example_for, open_model
from rmfx.deploy.precision import gap
from rmfx.deploy.triton import Serving

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "fp16", "bf16"]
Border = Literal["same", "half"]


def export(
    model: options.Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.onnx", help="Where to write; or give --triton.")
    ] = None,
    triton: Annotated[
        Path | None, typer.Option("--triton", metavar="DIR", help="Add it to this model repository of Triton.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the model in --triton DIR; default: that of MODEL.")
    ] = None,
    serve_on: Annotated[
        Literal["gpu", "cpu"] | None, typer.Option("--serve-on", help="Where Triton runs it; default: gpu.")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option("--max-batch", min=0, help="Of the batches that Triton makes; default: 32.")
    ] = None,
    device: Annotated[Device, typer.Option("--device", help="Where onnxruntime must run the file to compare.")] = "cpu",
    original: Annotated[
        bool, typer.Option("--original", help="Export the named network as it is, with its residual connections.")
    ] = False,
    precision: Annotated[
        Precision | None, typer.Option("--precision", help="Of weights and arithmetic; default: the network's own.")
    ] = None,
    io: Annotated[
        Border, typer.Option("--io", help="Whether inputs and outputs keep their type or are in --precision, too.")
    ] = "same",
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

    With --triton, the file is the next version of a model in a repository of NVIDIA's Triton Inference Server.

    Conversion options belong to `rmfx convert`, which writes ONNX, too.
    """
    place = output or triton
    if place is None or (output and (triton, name, serve_on, max_batch) != (None, None, None, None)):
        raise typer.BadParameter("give --output, or --triton and what belongs to it: --name, --serve-on, --max-batch")
    if output is not None:
        check_output(output, (".onnx",))
    chosen = options.model_options(weights, pretrained, size, input_shape, batch, dtype, seed)
    source = open_model(model, chosen)
    example = example_for(source, chosen)
    network = source.network
    if not source.saved and not original:
        with console.step(f"converting {model} and verifying the result"):
            network = rmfx.convert(network, example)
    with console.step(f"writing {place} and comparing it on {device}"):
        asked: dict[str, Any] = {"device": device, "like": source.like, "precision": precision, "io": io}
        if output is not None:
            rmfx.export(network, output, example, **asked)
        else:
            told = {"on": serve_on, "max_batch_size": max_batch}
            serving = Serving(**{key: value for key, value in told.items() if value is not None})  # type: ignore[arg-type]
            name = name or Path(model.rpartition(":")[2]).stem
            output = rmfx.export_triton(network, place, example, name=name, serving=serving, **asked)
    written = {"model": model, "output": str(output), "device": device, "bytes": output.stat().st_size}
    if precision is not None:
        inputs = [example] if isinstance(example, Tensor) else example
        file = None if io == "half" or _lacks(precision, device) else output
        off = gap(network, inputs, precision, file, device)
        written |= {"precision": precision, "io": io, "gap": off, "gap_in": "onnxruntime" if file else "torch"}
    if json:
        console.out_json(written)
        return
    console.out(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB); {_agrees(precision, device)}")
    if precision is not None:
        console.out(f"in {written['gap_in']}, {precision} is off by {written['gap']:.1e} of the largest output")


def _lacks(precision: Precision | None, device: Device) -> bool:
    return precision == "bf16" and device == "cpu"


def _agrees(precision: Precision | None, device: Device) -> str:
    if _lacks(precision, device):
        return "onnxruntime has no bfloat16 on cpu: with it made float32, the file agrees with torch"
    return f"onnxruntime on {device} agrees with torch"
