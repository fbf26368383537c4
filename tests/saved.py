"""Networks to save, and what it means that one came back."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rmfx.front.tracer import Tracer
from rmfx.modules import ChannelAffine, ChannelClamp, MaskedActivation, SizeGuard
from rmfx.report import META_KEY, Entry, Report, Totals

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Pair = namedtuple("Pair", "first second")


class Everything(nn.Module):
    """One of each thing that a file must keep."""

    def __init__(self) -> None:
        super().__init__()
        mask = torch.arange(8) % 2 == 0
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            MaskedActivation(nn.SiLU(), mask),
            MaskedActivation(nn.PReLU(8, 0.1), ~mask),
            ChannelClamp(torch.full((8,), -torch.inf), torch.linspace(1, 8, 8)),
            ChannelAffine(torch.rand(8), torch.rand(8)),
            ChannelAffine(torch.tensor(0.5)),
            SizeGuard((9, 7), "a test"),
        )
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.rand(5))
        self.register_buffer("passing", torch.rand(5), persistent=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Any]:
        x = self.body(x)
        x = self.second(self.first(x) + x)
        pooled = torch.flatten(x.mean((2, 3), keepdim=True), 1).clamp(-float("inf"), 1e30)
        z = self.head(pooled) * self.scale + self.passing
        rows = x.contiguous(memory_format=torch.channels_last)[..., None].to(torch.float64)
        return {"z": z, "rest": (rows[:, ::2], [torch.cat([z, z], dim=1), x.shape[2]])}


def traced(model: nn.Module) -> fx.GraphModule:
    model.eval()
    return fx.GraphModule(model, Tracer().trace(model), type(model).__name__)


def everything() -> tuple[fx.GraphModule, Tensor]:
    network = traced(Everything())
    network.register_buffer("passing", network.passing, persistent=False)  # fx makes every buffer persistent
    network.first.to(memory_format=torch.channels_last)
    network.head.bias.requires_grad_(False)
    entry = Entry("a", "add", "identity", "removed", carried_taps=(("w", (0, 1)),), size_conditions=("even",))
    norms = {"body.1": (2, 3)}
    report = Report((entry,), Totals(3, 4, 5, 6), parameter_map={"a": ("b",)}, notes=("n",), carried_norms=norms)
    network.meta[META_KEY] = report
    return network, torch.randn(2, 3, 9, 7) * 8


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal in every bit: tells -0.0 from 0.0, and finds a NaN equal to itself."""
    if first.dtype != second.dtype or first.shape != second.shape or first.stride() != second.stride():
        return False
    bits = BITS[first.element_size()]
    return torch.equal(first.contiguous().view(bits), second.contiguous().view(bits))


def state(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))


def steps(network: fx.GraphModule) -> list[tuple[Any, ...]]:
    """The graph without type annotations, which are not kept."""
    return [(n.op, n.name, n.target, str(n.args), str(n.kwargs), n.meta.get("place")) for n in network.graph.nodes]


def assert_same_network(before: fx.GraphModule, after: fx.GraphModule) -> None:
    assert steps(after) == steps(before) and type(after).__name__ == type(before).__name__
    assert list(after.state_dict()) == list(before.state_dict())
    mine, theirs = state(before), state(after)
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert same_bits(tensor, theirs[name]), name
        assert type(tensor) is type(theirs[name]) and tensor.requires_grad == theirs[name].requires_grad, name
    modes = {name: module.training for name, module in before.named_modules()}
    assert modes == {name: module.training for name, module in after.named_modules()}


def assert_same_outputs(before: nn.Module, after: nn.Module, *inputs: Tensor) -> None:
    first, second = pytree.tree_flatten(before(*inputs)), pytree.tree_flatten(after(*inputs))
    assert first[1] == second[1]
    pairs = list(zip(first[0], second[0], strict=True))
    assert pairs and all(same_bits(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
