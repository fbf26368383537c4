"""Converted torchvision networks: no residual sum left, and the same function.

For each network, random weights and hostile batch-norm statistics (``rmfx.hostile``):

* joins of two data tensors (``rmfx.check.plain``) in the graph that ``torch.export`` gives of the converted network,
  and in its unoptimised ONNX file (as a control, both counts are also taken of the original, and must see some);
* the relative difference to the original in float64, largest over the inputs, against the larger of 1e-12 and
  100 times the network's own noise floor: the change of the original's output when every parameter moves by one
  unit in the last place, up or down at random;
* the float32 error of the converted network over that of the original, both against the float64 original as the
  truth, in the largest and in the root-mean-square deviation. Both must hold; each is pooled over the inputs.

Inputs are batches of two: 64x64 of standard deviation 1 and 65x65 of standard deviation 8.
"""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import rmfx
from benchmarks.common import Figure, finish, options, torchvision_model, tracked
from rmfx.check.plain import Join, count_joins, count_onnx_joins

MODELS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"),
    *("resnext50_32x4d", "resnext101_32x8d"),
    *(f"regnet_x_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")),
    *("mobilenet_v2", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"),
)
TOLERANCE = 1e-12
NOISE_FACTOR = 100  # of the network's own noise floor, where that is larger than the tolerance
FLOAT32_FACTOR = 4
NOISE_DRAWS = 2


def inputs() -> list[Tensor]:
    """Two float32 batches, at an even and at an odd size."""
    random = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 64, 64, generator=random), torch.randn(2, 3, 65, 65, generator=random) * 8]


@torch.no_grad()
def run(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Outputs in float64, computed in the model's own precision."""
    dtype = next(model.parameters()).dtype
    return [model(x.to(dtype)).double() for x in batches]


def largest(truth: list[Tensor], others: list[Tensor]) -> float:
    """Largest deviation over the largest value, worst over the batches."""
    return max(float((t - o).abs().max() / t.abs().max()) for t, o in zip(truth, others, strict=True))


def mean_square(truth: list[Tensor], others: list[Tensor]) -> float:
    """Root mean square of the deviation, relative, pooled over the batches."""
    squares = [float((t - o).square().sum() / t.square().sum()) for t, o in zip(truth, others, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


@torch.no_grad()
def noise_floor(model: nn.Module, truth: list[Tensor], batches: list[Tensor]) -> float:
    """The relative change of the outputs when every parameter moves by one ulp in a random direction."""
    random = torch.Generator().manual_seed(2)
    worst = 0.0
    for _ in range(NOISE_DRAWS):
        moved = copy.deepcopy(model)
        for parameter in moved.parameters():
            up = torch.rand(parameter.shape, generator=random) < 0.5
            towards = torch.where(up, math.inf, -math.inf).to(parameter.dtype)
            parameter.copy_(torch.nextafter(parameter, towards))
        worst = max(worst, largest(truth, run(moved, batches)))
    return worst


def joins_in_onnx(model: nn.Module, x: Tensor) -> tuple[Join, ...]:
    """Joins in the file that ``torch.onnx`` writes with its optimiser off."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(model, (x,), path, dynamo=True, optimize=False, external_data=True, verbose=False)
        return count_onnx_joins(path)


def measure(name: str) -> tuple[list[Figure], dict[str, object]]:
    """Everything about one network; two conversions, one per precision, never both in memory with their originals."""
    batches = inputs()
    model = torchvision_model(name)
    control = [len(count_joins(model, batches[0])), len(joins_in_onnx(model, batches[0]))]
    if not all(control):
        raise SystemExit(f"{name}: the counters see {control} joins in the original, so a 0 would mean nothing")
    converted = rmfx.convert(model, verify=False)
    joins = count_joins(converted, batches[0])
    onnx_joins = joins_in_onnx(converted, batches[0])
    single, converted_single = run(model, batches), run(converted, batches)
    report = rmfx.report(converted)
    del converted
    model.double()
    truth = run(model, batches)
    floor = noise_floor(model, truth, batches)
    difference = largest(truth, run(rmfx.convert(model, verify=False), batches))
    errors = [(of(truth, single), of(truth, converted_single)) for of in (largest, mean_square)]
    figures = [
        Figure(name, "joins left in the exported graph", len(joins), 0),
        Figure(name, "joins left in the ONNX file", len(onnx_joins), 0),
        Figure(name, "relative difference, float64", difference, max(TOLERANCE, NOISE_FACTOR * floor)),
        Figure(name, "float32 error, ratio of largest", errors[0][1] / errors[0][0], FLOAT32_FACTOR),
        Figure(name, "float32 error, ratio of RMS", errors[1][1] / errors[1][0], FLOAT32_FACTOR),
    ]
    statuses = {status: report.count(status) for status in ("removed", "kept", "refused")}
    samples = {
        "joins_before": control,
        "noise_floor": floor,
        "float32_errors": errors,
        "sums": statuses,
        "joins_left": [str(j) for j in (*joins, *onnx_joins)],
    }
    return figures, samples


def main() -> None:
    """Run the benchmark."""
    arguments = options(__doc__, MODELS)
    figures: list[Figure] = []
    samples: dict[str, object] = {}
    for name in tracked(arguments.models, len(arguments.models)):
        rows, samples[name] = measure(name)
        figures += rows
    finish("exactness", figures, samples, write=not arguments.no_write)


if __name__ == "__main__":
    main()
