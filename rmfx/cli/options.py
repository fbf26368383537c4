"""The options that several commands share: how they are spelled, parsed and explained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from rmfx.learn.recipe import Precision, Schedule
from rmfx.measure.target import RUNTIMES, Target

Carrier = Literal["auto", "direct", "masked", "split", "shift"]
Downsample = Literal["cheaper", "conv", "input"]
Fuse = Literal["cheaper", "always", "never"]
Dtype = Literal["float32", "float64", "float16", "bfloat16"]
Device = Literal["cpu", "cuda"]


def parse_shape(text: str) -> tuple[int, ...]:
    """Read ``3,32,32`` or ``3x32x32``.

    Raises:
        typer.BadParameter: for anything else, or a size below 1.

    >>> parse_shape("3,32,32")
    (3, 32, 32)
    """
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no shape: write the sizes without the batch, like 3,224,224") from None
    if min(shape) < 1:
        raise typer.BadParameter(f"{text!r} holds a size below 1")
    return shape


def parse_policy(text: str) -> str | list[str]:
    """Read ``all``, ``auto``, ``none``, or places separated by commas.

    >>> parse_policy("layer1.0, layer1.1")
    ['layer1.0', 'layer1.1']
    """
    if text in ("all", "auto"):
        return text
    return [] if text == "none" else [place.strip() for place in text.split(",") if place.strip()]


def parse_target(text: str, threads: int | None) -> Target:
    """Read ``onnxruntime`` or ``onnxruntime:cuda``.

    >>> parse_target("eager", 1)
    Target(runtime='eager', device='cpu', threads=1)
    """
    return replace(Target.of(text), threads=threads)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, rmfx:NAME, path/to/file.py:FACTORY, or a .rmfx or .onnx file.",
    ),
]
NamedModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="torchvision:NAME, timm:NAME, rmfx:NAME, or path/to/file.py:FACTORY.")
]
SavedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="torchvision:NAME, timm:NAME, rmfx:NAME, path/to/file.py:FACTORY, or a .rmfx file."
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="State dict to load: .safetensors, or .pt without code in it."),
]
PretrainedOption = Annotated[
    bool, typer.Option("--pretrained", help="Download the weights that torchvision or timm publish.")
]
SizeOption = Annotated[
    int | None, typer.Option("--size", min=1, help="Height and width of the input; default: the published ones.")
]
ShapeOption = Annotated[
    str | None,
    typer.Option("--input-shape", metavar="C,H,W", help="Whole input shape without the batch, like 3,224,224."),
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Batch size of the example input.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Dtype the network is cast to first.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of random weights and random inputs.")]

PolicyOption = Annotated[
    str,
    typer.Option("--policy", metavar="all|auto|none|PLACES", help="What to remove; places as in 'rmfx explain'."),
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="RUNTIME[:DEVICE]",
        help=f"One of {', '.join(RUNTIMES)}; ':cuda' behind for a GPU.",
    ),
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Of the runtime, on a CPU.")]
MeasureOption = Annotated[
    float, typer.Option("--measure", min=0.0, help="Seconds for timing candidates; 0 goes by estimates.")
]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE.json", help="Follow this plan of 'rmfx plan'.")
]
CarrierOption = Annotated[Carrier, typer.Option("--carrier", help="How carried channels pass the activations.")]
DownsampleOption = Annotated[
    Downsample, typer.Option("--downsample", help="Where a projection shortcut is applied: first conv or last.")
]
FuseOption = Annotated[Fuse, typer.Option("--fuse", help="Whether to compose consecutive linear convs.")]
MaxGrowthOption = Annotated[
    float | None, typer.Option("--max-growth", min=0.0, help="Refuse regions whose MACs grow beyond this factor.")
]
KeepBnOption = Annotated[bool, typer.Option("--keep-bn", help="Keep batch norms, for training the plain network.")]
ConcatOption = Annotated[bool, typer.Option("--concat", help="Remove dense and other concat skips, too.")]
DropDeadOption = Annotated[
    bool, typer.Option("--drop-dead-channels", help="Drop channels that are never read or always constant.")
]
ShiftBitsOption = Annotated[
    float, typer.Option("--shift-bits", min=0.0, help="Bits of precision that '--carrier shift' may cost.")
]
PartialOption = Annotated[
    bool,
    typer.Option(
        "--partial/--no-partial", help="Convert the parts that can be followed (code 4) where the whole cannot be."
    ),
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Leave with code 3 when a residual sum is refused.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="digits, digits32, cifar10, cifar100, or folder:PATH with images in PATH/train/CLASS and PATH/val/CLASS.",
    ),
]
DataRootOption = Annotated[
    Path | None, typer.Option("--data-root", metavar="FOLDER", help="Where the files of CIFAR are.")
]
FolderOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the results go; made if need be.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in FOLDER.")]
EpochsOption = Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training images.")]
TrainBatchOption = Annotated[int, typer.Option("--batch", min=1, help="Images of one step, over all processes.")]
RateOption = Annotated[float, typer.Option("--learning-rate", "--lr", help="The highest learning rate.")]
MomentumOption = Annotated[float, typer.Option("--momentum", help="Of the gradient.")]
NesterovOption = Annotated[bool, typer.Option("--nesterov", help="Nesterov's momentum.")]
DecayOption = Annotated[float, typer.Option("--weight-decay", help="Of weights, but not of norms and biases.")]
ScheduleOption = Annotated[Schedule, typer.Option("--schedule", help="How the learning rate falls.")]
StepEveryOption = Annotated[int, typer.Option("--step-every", help="Epochs between steps of '--schedule step'.")]
StepFactorOption = Annotated[float, typer.Option("--step-factor", help="By which '--schedule step' multiplies.")]
WarmupOption = Annotated[float, typer.Option("--warmup", help="Epochs in which the learning rate rises first.")]
SmoothingOption = Annotated[float, typer.Option("--smoothing", help="Of the labels, 0 to 1.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="bf16 and fp16 are mixed precision.")]
EmaOption = Annotated[
    float | None, typer.Option("--ema", help="Average the weights with this decay, like 0.999, and end with those.")
]
ClipOption = Annotated[float | None, typer.Option("--clip", help="The largest norm of the gradient.")]
DeviceOption = Annotated[Device | None, typer.Option("--device", help="Default: cuda where there is any.")]


@dataclass(frozen=True)
class ModelOptions:
    """How to build the named network and its example input."""

    weights: Path | None = None
    pretrained: bool = False
    size: int | None = None
    shape: tuple[int, ...] | None = None
    batch: int = 1
    dtype: torch.dtype = torch.float32
    seed: int = 0


def model_options(
    weights: Path | None, pretrained: bool, size: int | None, shape: str | None, batch: int, dtype: str, seed: int
) -> ModelOptions:
    """Gather parsed command-line values.

    Raises:
        typer.BadParameter: for a malformed shape, or options that exclude each other.
    """
    if size is not None and shape is not None:
        raise typer.BadParameter("--size and --input-shape exclude each other: give one of them")
    if weights is not None and pretrained:
        raise typer.BadParameter("--weights and --pretrained exclude each other: give one of them")
    parsed = None if shape is None else parse_shape(shape)
    return ModelOptions(weights, pretrained, size, parsed, batch, getattr(torch, dtype), seed)
