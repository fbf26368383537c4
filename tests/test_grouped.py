"""Sums over groups of channels, as in split attention, become sums of slices; what is none stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from front import Lambda, conv, hostile, operations
from torch import Tensor, nn

from rmfx.front.normal import check_normal
from rmfx.front.trace import trace
from rmfx.passes.normalise import normalise

SIZES = ((2, 4, 7, 5), (3, 4, 2, 6))


class SplitAttention(nn.Module):
    """ResNeSt: groups of channels, weighted by a softmax over the groups, summed."""

    def __init__(self, radix: int) -> None:
        super().__init__()
        self.radix, self.conv, self.fc = radix, nn.Conv2d(4, 6 * radix, 3, padding=1), nn.Conv2d(6, 6 * radix, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch, channels, height, width = x.shape
        x = x.reshape((batch, self.radix, channels // self.radix, height, width))
        gate = self.fc(x.sum(dim=1).mean((2, 3), keepdim=True))
        gate = gate.view(batch, self.radix, -1).softmax(1).reshape(batch, -1).view(batch, -1, 1, 1)
        out = (x * gate.reshape((batch, self.radix, channels // self.radix, 1, 1))).sum(dim=1)
        return out.contiguous()


class SelectiveKernel(nn.Module):
    """SKNet: paths stacked, weighted by a softmax over the paths, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Conv2d(4, 6, 2 * k + 1, padding=k) for k in range(3))
        self.fc = nn.Conv2d(6, 18, 1)

    def forward(self, x: Tensor) -> Tensor:
        paths = torch.stack([path(x) for path in self.paths], dim=1)
        gate = self.fc(paths.sum(1).mean((2, 3), keepdim=True))
        batch, channels, height, width = gate.shape
        gate = gate.view(batch, 3, channels // 3, height, width).softmax(dim=1)
        return torch.sum(paths * gate, dim=1)


def exact(model: nn.Module, sized: bool = True) -> list[str]:
    """The operations of the normal form, which is seen to give what the model gives."""
    model = model.double().eval()
    gm = normalise(trace(model), inputs=(hostile(*SIZES[0]),) if sized else None)
    check_normal(gm)
    for size in SIZES:
        want, got = model(hostile(*size)), gm(hostile(*size))
        assert want.shape == got.shape and (want - got).abs().max() <= 1e-12 * want.abs().max()
    return [name for name in operations(gm) if name not in ("getattr", "getitem", "size")]


@pytest.mark.parametrize("radix", [2, 3])
@pytest.mark.parametrize("sized", [True, False])
def test_split_attention(radix: int, sized: bool) -> None:
    found = exact(SplitAttention(radix), sized)
    assert "sum" not in found and "contiguous" not in found
    assert found.count("ChannelSlice") == 2 * radix and found.count("add") == 2 * (radix - 1)
    assert found[-2 * radix :] == ["mul", *["ChannelSlice"] * radix, *["add"] * (radix - 1)]


def test_selective_kernels() -> None:
    found = exact(SelectiveKernel())
    assert "sum" not in found and "stack" not in found
    assert found[:5] == ["Conv2d", "Conv2d", "Conv2d", "add", "add"]
    assert found[-8:] == ["cat", "Flatten", "mul", *["ChannelSlice"] * 3, "add", "add"]


@pytest.mark.parametrize(("groups", "expected"), [(2, "Conv2d ReLU add"), (4, "Conv2d ReLU" + " ChannelSlice" * 4)])
def test_groups_of_a_concat(groups: int, expected: str) -> None:
    """They are the operands, or parts of them, so that no concat is left."""

    def forward(m: Lambda, x: Tensor) -> Tensor:
        y = m.conv(x)
        y = torch.cat([y, y.relu()], 1)
        batch, channels, height, width = y.shape
        return y.view(batch, groups, channels // groups, height, width).sum(1)

    found = exact(Lambda(forward, conv=nn.Conv2d(4, 6, 3, padding=1)))
    assert sorted(found) == sorted([*expected.split(), *["add"] * (3 if groups == 4 else 0)])


def test_shapes_of_what_was_made_are_known() -> None:
    for model in (SplitAttention(2), SelectiveKernel()):
        x = hostile(*SIZES[0])
        gm = normalise(trace(model.double().eval()), inputs=(x,))
        values = _Shapes(gm)
        values.run(x)
        known = {node.name: node.meta["shape"] for node in gm.graph.nodes if "shape" in node.meta}
        assert known == {name: values.seen[name] for name in known}
        assert {node.name for node in gm.graph.nodes if "ChannelSlice" in str(node.meta)} <= known.keys()
        assert len(known) > len(values.seen) - 2


class _Shapes(torch.fx.Interpreter):
    """Keeps the shape of every tensor."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[str, torch.Size] = {}

    def run_node(self, n: torch.fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen[n.name] = value.shape
        return value


STAYS: list[Callable[[Tensor], Tensor]] = [
    lambda y: y.sum(1),
    lambda y: y.sum(1, keepdim=True),
    lambda y: y.reshape(y.size(0), 2, 3, y.size(2), y.size(3)).sum(2),
    lambda y: y.reshape(y.size(0), 2, 3, y.size(2), y.size(3)).sum(1, keepdim=True),
    lambda y: y.reshape(y.size(0), 2, 3, y.size(2), y.size(3)).sum((1, 2)),
    lambda y: y.reshape(y.size(0), 2, 3, y.size(3), y.size(2)).sum(1),
    lambda y: y.reshape(y.size(0), 2, 3, y.size(2), y.size(3)).relu().sum(1),
    lambda y: torch.stack((y, y), 0).sum(1),
    lambda y: y.reshape(y.size(0), 2, 3, y.size(2), y.size(3)).mul(y[:, None, :3]).sum(1),
]


@pytest.mark.parametrize("index", range(len(STAYS)))
def test_other_sums_stay(index: int) -> None:
    found = exact(Lambda(lambda m, x: STAYS[index](m.conv(x)), conv=conv(4, 6)))
    assert found[-1] == "sum"
