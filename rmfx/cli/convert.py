"""``rmfx convert``: write the network without its residual connections to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import fx

import rmfx
from rmfx.cli import console, options
from rmfx.cli.outcome import (
    check_output,
    leave_if_partial,
    leave_if_refused,
    one_output,
    tell_written,
    without_warning,
)
from rmfx.cli.source import example_for, open_model, shape_of
from rmfx.errors import RmfxError

# What a plan decides. Names are those of the parameters below.
_DECIDED = (
    *("policy", "runs_on", "threads", "measure", "carrier", "downsample", "fuse"),
    *("max_growth", "keep_bn", "concat", "drop_dead_channels", "shift_bits"),
)


def convert(
    context: typer.Context,
    model: options.Model,
    target: Annotated[
        Path | None, typer.Argument(metavar="[OUTPUT]", help="Where to write: FILE.rmfx or FILE.onnx.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="The same as OUTPUT.")] = None,
    weights: options.WeightsOption = None,
    pretrained: options.PretrainedOption = False,
    size: options.SizeOption = None,
    input_shape: options.ShapeOption = None,
    batch: options.BatchOption = 1,
    dtype: options.DtypeOption = "float32",
    seed: options.SeedOption = 0,
    policy: options.PolicyOption = "all",
    plan: options.PlanOption = None,
    runs_on: options.TargetOption = "eager",
    threads: options.ThreadsOption = None,
    measure: options.MeasureOption = 60.0,
    carrier: options.CarrierOption = "auto",
    downsample: options.DownsampleOption = "cheaper",
    fuse: options.FuseOption = "cheaper",
    max_growth: options.MaxGrowthOption = None,
    keep_bn: options.KeepBnOption = False,
    concat: options.ConcatOption = False,
    drop_dead_channels: options.DropDeadOption = False,
    shift_bits: options.ShiftBitsOption = 2.0,
    partial: options.PartialOption = True,
    strict: options.StrictOption = False,
    json: options.JsonOption = False,
) -> None:
    """Remove the residual connections, verify the result in float64, and write it to a file."""
    output = one_output(target, output)
    check_output(output, (".rmfx", ".onnx"))
    if plan is not None:
        _demand_alone(context)
    chosen = options.model_options(weights, pretrained, size, input_shape, batch, dtype, seed)
    source = open_model(model, chosen)
    example = example_for(source, chosen)
    with console.step(f"converting {model} and verifying the result"), without_warning():
        plain = rmfx.convert(
            source.network,
            example,
            policy=options.parse_policy(policy) if plan is None else rmfx.Plan.load(plan),
            target=options.parse_target(runs_on, threads),
            measure=measure,
            carrier=carrier,
            downsample=downsample,
            fuse=fuse,
            max_growth=max_growth,
            keep_bn=keep_bn,
            concat=concat,
            drop_dead_channels=drop_dead_channels,
            shift_bits=shift_bits,
            partial=partial,
        )
    report = rmfx.report(plain)
    if not isinstance(plain, fx.GraphModule) and output.suffix != ".onnx":
        raise RmfxError(
            f"{output} cannot hold a network of which only parts were converted: its own code goes on calling them. "
            "Write FILE.onnx, or call rmfx.convert in Python"
        )
    with console.step(f"writing {output}"):
        if isinstance(plain, fx.GraphModule) and output.suffix != ".onnx":
            rmfx.save(plain, output)
        else:
            rmfx.export(plain, output, example, like=source.like)
    if json:
        document = {"model": model, "input_shape": shape_of(example), "output": str(output)}
        console.out_json({**document, "report": report.to_dict()})
    else:
        console.show_report(report)
        tell_written(output, source.signature)
    leave_if_partial(report)
    leave_if_refused(report, strict)


def _demand_alone(context: typer.Context) -> None:
    """Refuse what ``--plan`` would silently overrule."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in _DECIDED and getattr(context.get_parameter_source(parameter.name), "name", "") != "DEFAULT"
    ]
    if given:
        raise typer.BadParameter(f"--plan decides that already: leave out {', '.join(given)}")
