"""What is known of values before anything runs is true for every input, of whatever batch and image size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from front import Lambda
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rmfx.front.aliasing import resolve_in_place
from rmfx.front.kind_table import infer_kinds
from rmfx.front.shapes import find_shapes
from rmfx.front.trace import trace
from rmfx.modules import ChannelPad, ChannelSlice

SIZES = ((2, 4, 8, 12), (3, 4, 12, 8), (1, 4, 16, 16))
ANY = None

# What is done with the six channels of a convolution, and the sizes that are fixed behind it.
FIXED: list[tuple[Callable[[Tensor], Any], tuple[int | None, ...]]] = [
    (lambda y: y, (ANY, 6, ANY, ANY)),
    (lambda y: y.relu() + 1, (ANY, 6, ANY, ANY)),
    (lambda y: y * y.mean((2, 3), keepdim=True), (ANY, 6, ANY, ANY)),
    (lambda y: y > y.mean((2, 3), keepdim=True), (ANY, 6, ANY, ANY)),
    (lambda y: y.mean((2, 3), keepdim=True), (ANY, 6, 1, 1)),
    (lambda y: y.mean(dim=(-1, -2)), (ANY, 6)),
    (lambda y: y.sum(1), (ANY, ANY, ANY)),
    (lambda y: y.permute(0, 2, 3, 1), (ANY, ANY, ANY, 6)),
    (lambda y: y.permute((1, 0, 3, 2)), (6, ANY, ANY, ANY)),
    (lambda y: y.transpose(1, -1), (ANY, ANY, ANY, 6)),
    (lambda y: y.flatten(2), (ANY, 6, ANY)),
    (lambda y: y.flatten(2).transpose(1, 2), (ANY, ANY, 6)),
    (lambda y: y.mean((2, 3), True).flatten(1), (ANY, 6)),
    (lambda y: y[:, 1:4], (ANY, 3, ANY, ANY)),
    (lambda y: y[:, :, 0], (ANY, 6, ANY)),
    (lambda y: y[:, None], (ANY, 1, 6, ANY, ANY)),
    (lambda y: y[..., 1:], (ANY, 6, ANY, ANY)),
    (lambda y: y[:, 2:, ..., 0], (ANY, 4, ANY)),
    (lambda y: y.chunk(4, 1)[2], (ANY, 2, ANY, ANY)),
    (lambda y: y.split(4, 1)[1], (ANY, 2, ANY, ANY)),
    (lambda y: y.tensor_split(4, 1)[3], (ANY, 1, ANY, ANY)),
    (lambda y: y.chunk(2, 2)[0], (ANY, ANY, ANY, ANY)),
    (lambda y: y.narrow(1, 2, 3), (ANY, 3, ANY, ANY)),
    (lambda y: torch.cat((y, y[:, :1]), 1), (ANY, 7, ANY, ANY)),
    (lambda y: torch.cat((y, y), 2), (ANY, 6, ANY, ANY)),
    (lambda y: torch.stack((y, y), 1), (ANY, 2, 6, ANY, ANY)),
    (lambda y: y.reshape(y.size(0), 2, 3, -1), (ANY, 2, 3, ANY)),
    (lambda y: y.reshape(y.size(0), 2, 3, -1).softmax(1).sum(1), (ANY, 3, ANY)),
    (lambda y: y.unsqueeze(1).expand(-1, 5, -1, -1, -1), (ANY, 5, 6, ANY, ANY)),
    (lambda y: y.mean(1, True).expand_as(y), (ANY, 6, ANY, ANY)),
    (lambda y: y.mean(1, True).squeeze(1), (ANY, ANY, ANY)),
    (lambda y: F.interpolate(y, scale_factor=2), (ANY, 6, ANY, ANY)),
    (lambda y: F.pad(y, (1, 1)), (ANY, 6, ANY, ANY)),
    (lambda y: F.pad(y, (0, 0, 0, 0, 1, 1)), (ANY, ANY, ANY, ANY)),
    (lambda y: torch.maximum(y, torch.ones(6, 1, 1)), (ANY, 6, ANY, ANY)),
]
LAYERS: list[tuple[nn.Module, tuple[int | None, ...]]] = [
    (nn.BatchNorm2d(6), (ANY, 6, ANY, ANY)),
    (nn.Conv2d(6, 3, 1), (ANY, 3, ANY, ANY)),
    (nn.ConvTranspose2d(6, 3, 1), (ANY, 3, ANY, ANY)),
    (nn.MaxPool2d(2), (ANY, 6, ANY, ANY)),
    (nn.AdaptiveAvgPool2d((3, None)), (ANY, 6, 3, ANY)),
    (nn.AdaptiveMaxPool2d(2), (ANY, 6, 2, 2)),
    (nn.ZeroPad2d(1), (ANY, 6, ANY, ANY)),
    (nn.Upsample(scale_factor=2), (ANY, 6, ANY, ANY)),
    (nn.GLU(1), (ANY, 3, ANY, ANY)),
    (nn.PixelUnshuffle(2), (ANY, 24, ANY, ANY)),
    (nn.ChannelShuffle(2), (ANY, 6, ANY, ANY)),
    (nn.Flatten(2), (ANY, 6, ANY)),
    (nn.GroupNorm(2, 6), (ANY, 6, ANY, ANY)),
    (ChannelSlice(1, 2), (ANY, 2, ANY, ANY)),
    (ChannelPad(1, 2), (ANY, 9, ANY, ANY)),
    (nn.Sequential(nn.Flatten(2), nn.ReflectionPad1d(1)), (ANY, 6, ANY)),
    (nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)), (ANY, 6, ANY, ANY)),
]


def checked(model: nn.Module) -> fx.GraphModule:
    """The traced graph of ``model``; at several sizes, all that is known of every value of it is seen to be true."""
    gm = trace(model.eval())
    resolve_in_place(gm)
    for known_shapes in (False, True):
        if known_shapes:
            find_shapes(gm, (torch.randn(SIZES[0]),))
        kinds = infer_kinds(gm)
        for size in SIZES:
            values = _Values(gm)
            with torch.no_grad():
                values.run(torch.randn(size))
            for node, kind in kinds.items():
                _check(kind, values.seen[node])
    return gm


def _check(kind: Any, value: Any) -> None:
    if not kind.tensor:
        assert not isinstance(value, Tensor)
        given = kind.value if isinstance(kind.value, tuple) else (kind.value,)
        values = value if isinstance(value, tuple) else (value,)
        assert kind.value is None or all(a in (None, b) for a, b in zip(given, values, strict=True))
    elif isinstance(value, Tensor):
        assert kind.rank in (None, value.dim())
        assert all(size in (None, real) for size, real in zip(kind.sizes, value.shape, strict=False))
        assert value.is_floating_point() or not kind.floating


class _Values(fx.Interpreter):
    """Keeps every value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def fixed(gm: fx.GraphModule) -> tuple[int | None, ...]:
    kinds = infer_kinds(gm)
    (result,) = list(gm.graph.nodes)[-1].all_input_nodes
    return kinds[result].sizes


@pytest.mark.parametrize("index", range(len(FIXED)))
def test_functions(index: int) -> None:
    function, sizes = FIXED[index]
    gm = checked(Lambda(lambda m, x: function(m.conv(x)), conv=nn.Conv2d(4, 6, 1)))
    assert fixed(gm) == sizes


@pytest.mark.parametrize("index", range(len(LAYERS)))
def test_layers(index: int) -> None:
    module, sizes = LAYERS[index]
    assert fixed(checked(nn.Sequential(nn.Conv2d(4, 6, 1), module))) == sizes


def test_numbers() -> None:
    def forward(m: Lambda, x: Tensor) -> Any:
        y = m.conv(x)
        batch, channels, *_ = (y.shape[0], y.shape[1])
        numbers = (
            channels // 2,
            channels**-0.5,
            y.dim() + channels,
            y.shape[1:2],
            y.size(2) * 2,
            batch,
            channels / 0.5,
        )
        return y, numbers

    gm = checked(Lambda(forward, conv=nn.Conv2d(4, 6, 1)))
    kinds = infer_kinds(gm)
    numbers = list(gm.graph.nodes)[-1].args[0][1]  # type: ignore[index]
    values = [kinds[number].value for number in numbers]  # type: ignore[union-attr, index]
    assert values == [3, 6**-0.5, 10, (6,), None, None, 12.0]


def test_readers_tell_of_what_they_read() -> None:
    gm = trace(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 1)).eval())
    assert [kind.sizes for kind in infer_kinds(gm).values()][0] == (None, 4, None, None)
    image = trace(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 1)).eval())
    find_shapes(image, (torch.ones(4, 5, 5),))  # without a batch, dimension 1 is no channel
    assert [kind.sizes for kind in infer_kinds(image).values()][:3] == [(None,) * 3] * 3


def test_a_network_that_does_not_run_has_no_shapes() -> None:
    gm = trace(nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(5, 6, 1)).eval())
    assert not find_shapes(gm, (torch.ones(1, 4, 5, 5),))
    assert not any("shape" in node.meta or "val" in node.meta for node in gm.graph.nodes)
