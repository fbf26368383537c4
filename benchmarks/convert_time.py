"""How long a conversion takes: against the least it could do, and as networks get deeper.

``rmfx.convert(resnet152, verify=False)`` over the sum of two things no conversion can go below by much:
``torch.fx.experimental.optimization.fuse`` on the same network (a copy, a trace, batch norms folded), and allocating
and zeroing tensors of the converted network's sizes. The three are timed in turn, in every repeat; medians count.

Then CIFAR ResNet-110 (54 blocks) and ResNet-1202 (600 blocks, both with projection shortcuts): time per block may
not grow 1.5-fold, else something is quadratic in the depth.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import rmfx
from benchmarks.common import Figure, finish, options, tensors_of, torchvision_model, tracked
from rmfx.hostile import randomise
from rmfx.vision import import_torchvision

LIMIT_OVER_LEAST = 3.0
LIMIT_PER_BLOCK = 1.5
REPEATS = 7
DEEP_REPEATS = 3


class CifarResNet(nn.Module):
    """He et al.'s CIFAR network of ``6n + 2`` layers, made of torchvision's own basic blocks."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        blocks: list[nn.Module] = []
        width = 16
        for out, stride in ((16, 1), (32, 2), (64, 2)):
            for index in range(n):
                blocks.append(_block(width, out, stride if index == 0 else 1))
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def _block(width: int, out: int, stride: int) -> nn.Module:
    shortcut = None
    if stride != 1 or width != out:
        shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    return import_torchvision().models.resnet.BasicBlock(width, out, stride, shortcut)


def allocate_like(model: nn.Module) -> Callable[[], list[Tensor]]:
    """A function that allocates and zeroes tensors of the sizes of ``model``'s."""
    shapes = [(tensor.shape, tensor.dtype) for tensor in tensors_of(model)]
    return lambda: [torch.empty(shape, dtype=dtype).zero_() for shape, dtype in shapes]


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call; what it returns is freed after the clock stops."""
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time all functions once per repeat, after one untimed round."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in tracked(range(repeats + 1), repeats + 1):
        for name, function in functions.items():
            elapsed = seconds(function)
            if repeat:
                samples[name].append(elapsed)
    return samples


def over_least() -> tuple[Figure, dict[str, list[float]]]:
    """ResNet-152: the conversion against fuse + allocation."""
    model = torchvision_model("resnet152")
    functions = {
        "convert": lambda: rmfx.convert(model, verify=False),
        "fuse": lambda: fuse(model),
        "allocate": allocate_like(rmfx.convert(model, verify=False)),
    }
    samples = interleaved(functions, REPEATS)
    median = {name: statistics.median(values) for name, values in samples.items()}
    ratio = median["convert"] / (median["fuse"] + median["allocate"])
    return Figure("resnet152", "time to convert / (fuse + allocate)", ratio, LIMIT_OVER_LEAST), samples


def per_block() -> tuple[Figure, dict[str, list[float]]]:
    """CIFAR ResNet-110 against ResNet-1202."""
    x = torch.randn(4, 3, 32, 32)
    models = {n: randomise(CifarResNet(n), x) for n in (18, 200)}
    functions = {f"resnet{6 * n + 2}": lambda m=m: rmfx.convert(m, verify=False) for n, m in models.items()}
    samples = interleaved(functions, DEEP_REPEATS)
    shallow, deep = (
        statistics.median(samples[f"resnet{6 * n + 2}"]) / len(model.blocks) for n, model in models.items()
    )
    return Figure("CIFAR resnet110 -> resnet1202", "time per block, growth", deep / shallow, LIMIT_PER_BLOCK), samples


def main() -> None:
    """Run the benchmark."""
    arguments = options(__doc__)
    least, samples = over_least()
    growth, deep_samples = per_block()
    finish("convert_time", [least, growth], {"seconds": samples | deep_samples}, write=not arguments.no_write)


if __name__ == "__main__":
    main()
