"""``rmfx explain``: what would be removed, what not and why, and what it costs; changes nothing."""

from __future__ import annotations

import rmfx
from rmfx.cli import console, options
from rmfx.cli.outcome import leave_if_partial, leave_if_refused, without_warning
from rmfx.cli.source import example_for, open_model, shape_of


def explain(
    model: options.Model,
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
    concat: options.ConcatOption = False,
    drop_dead_channels: options.DropDeadOption = False,
    shift_bits: options.ShiftBitsOption = 2.0,
    partial: options.PartialOption = True,
    strict: options.StrictOption = False,
    json: options.JsonOption = False,
) -> None:
    """Show what would be removed, what not and why, and what it costs. Changes nothing."""
    chosen = options.model_options(weights, pretrained, size, input_shape, batch, dtype, seed)
    source = open_model(model, chosen)
    example = example_for(source, chosen)
    with console.step(f"analysing {model}"), without_warning():
        report = rmfx.explain(
            source.network,
            example,
            policy=options.parse_policy(policy),
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
    if json:
        console.out_json({"model": model, "input_shape": shape_of(example), "report": report.to_dict()})
    else:
        console.show_report(report)
    leave_if_partial(report)
    leave_if_refused(report, strict)
