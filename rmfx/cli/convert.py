"""``rmfx convert``: write the network without its residual connections to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import rmfx
from rmfx.cli import console, options
from rmfx.cli.outcome import check_output, leave_if_refused
from rmfx.cli.source import example_for, open_model


def convert(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write: FILE.rmfx or FILE.onnx.")
    ],
    weights: options.WeightsOption = None,
    pretrained: options.PretrainedOption = False,
    size: options.SizeOption = None,
    input_shape: options.ShapeOption = None,
    batch: options.BatchOption = 1,
    dtype: options.DtypeOption = "float32",
    seed: options.SeedOption = 0,
    policy: options.PolicyOption = "all",
    carrier: options.CarrierOption = "auto",
    downsample: options.DownsampleOption = "cheaper",
    fuse: options.FuseOption = "cheaper",
    max_growth: options.MaxGrowthOption = None,
    keep_bn: options.KeepBnOption = False,
    strict: options.StrictOption = False,
    json: options.JsonOption = False,
) -> None:
    """Remove the residual connections, verify the result in float64, and write it to a file."""
    check_output(output, (".rmfx", ".onnx"))
    chosen = options.model_options(weights, pretrained, size, input_shape, batch, dtype, seed)
    source = open_model(model, chosen)
    example = example_for(source, chosen)
    with console.step(f"converting {model} and verifying the result"):
        plain = rmfx.convert(
            source.network,
            example,
            policy=options.parse_policy(policy),
            carrier=carrier,
            downsample=downsample,
            fuse=fuse,
            max_growth=max_growth,
            keep_bn=keep_bn,
        )
    with console.step(f"writing {output}"):
        if output.suffix == ".onnx":
            rmfx.export(plain, output, example)
        else:
            rmfx.save(plain, output)
    report = rmfx.report(plain)
    if json:
        document = {"model": model, "input_shape": list(example.shape), "output": str(output)}
        console.out_json({**document, "report": report.to_dict()})
    else:
        console.show_report(report)
        console.out(f"wrote {output}")
    leave_if_refused(report, strict)
