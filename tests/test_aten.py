"""The operators of ATen become functions of torch, and writes into views slices and concats; unknown ones stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from front import hostile
from oracle import relative_difference
from programs import assert_equal, decomposed, exported
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn import functional as F

from rmfx.front.aten import spell_aten
from rmfx.front.doors import enter
from rmfx.front.exported import program_graph
from rmfx.front.normal import check_normal
from rmfx.hostile import randomise
from rmfx.passes.normalise import normalise

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
OPERATORS: list[Any] = [
    lambda m, x: F.hardtanh(x, -2, 3) + F.elu(x) + F.selu(x) + F.celu(x, 2.0),
    lambda m, x: F.elu_(x * 1) - F.leaky_relu(x, 0.3) + F.gelu(x, approximate="tanh") * F.mish(x),
    lambda m, x: F.max_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    lambda m, x: F.adaptive_max_pool2d(x, 2) + F.adaptive_avg_pool2d(x, (2, 2)),
    lambda m, x: F.adaptive_max_pool2d(x, 2, return_indices=True)[1],
    lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
    lambda m, x: F.interpolate(x, size=(5, 9), mode="nearest"),
    lambda m, x: F.pad(x, (1, 2, 0, 1), mode="reflect") + F.pad(x, (1, 2, 0, 1), "replicate") + F.pad(x, (1, 2, 0, 1)),
    lambda m, x: F.layer_norm(x, x.shape[-1:]) + F.group_norm(x, 2) + F.instance_norm(x),
    lambda m, x: F.linear(x.mean((2, 3)), m.weight, m.bias) + x.mean((2, 3)) @ m.weight.t(),
    lambda m, x: torch.addmm(m.bias, x.mean((2, 3)), m.weight.t()),
    lambda m, x: F.conv_transpose2d(x, m.kernel, stride=2, padding=1, output_padding=1),
    lambda m, x: F.conv2d(x, m.kernel, padding="same") + F.conv2d(x, m.kernel[:, :1], padding=1, groups=4),
    lambda m, x: torch.cat([part * i for i, part in enumerate(x.chunk(2, 1))] + list(x.split([1, 3], 1)), 1),
    lambda m, x: x[:, 1:3, ::2] + x[:, -2:, 1:8:2].flip(1) + x.select(1, 0)[:, None, ::2],
    lambda m, x: (
        F.scaled_dot_product_attention(x, x, x, scale=0.3) + torch.einsum("bcij,bckj->bcik", x, x).sum(3, True)
    ),
    lambda m, x: x.to(torch.float32).softmax(1).to(x.dtype) + F.log_softmax(x, 1),
    lambda m, x: (
        x + torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) + torch.ones_like(x) + m.bias[:, None, None]
    ),
    lambda m, x: F.embedding(x.abs().long() % 4, m.weight) + torch.where(x > 0, x, -x)[..., None],
    lambda m, x: torch.rsub(x, 2.0) + torch.sub(x, x.relu(), alpha=3) - x.clamp(-1, 2).masked_fill(x > 1, 0.5),
    lambda m, x: F.unfold(x, 3).sum(2) + F.pixel_shuffle(x, 2).flatten(1)[:, :36],
    lambda m, x: F.prelu(x, m.bias) + F.softplus(x, 2.0, 5.0) + F.hardswish(x) * F.hardsigmoid(x) + F.silu(x.tanh()),
]


class Operators(nn.Module):
    """All of them, with some weights to use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.rand(4))
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [function(self, x) for function in OPERATORS]


@pytest.mark.parametrize("how", ["not", "core"])
def test_operators_of_aten(how: str) -> None:
    model, image = Operators().double().eval(), hostile(2, 4, 8, 8)
    gm = program_graph(decomposed(exported(model, image), how))
    with torch.no_grad():
        wanted, spelled = model(image), gm(image)
        gm = normalise(gm)
        check_normal(gm)
        for line, (want, *given) in enumerate(zip(wanted, spelled, gm(image), strict=True)):
            assert all(relative_difference(want, got) < 1e-13 for got in given), f"line {line} of the list"


def test_an_unknown_operator_stays() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.linalg_vector_norm.default, (x,)))
    spelled = fx.GraphModule(nn.Module(), spell_aten(graph))
    assert torch.equal(spelled(torch.ones(4)), torch.tensor(2.0))
    assert any(isinstance(node.target, OpOverload) for node in spelled.graph.nodes)


class PartialSum(nn.Module):
    """A sum of some channels only, written into a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :4] += x[:, :4]
        return y.relu()


class Overwritten(PartialSum):
    """Reads a tensor before and after another view of it is written."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        before = y.sum(1)
        y[:, 1:3] = 0.5
        y.mul_(2)[:, 3].add_(before)
        return torch.cat([y, before[:, None]], 1)


@pytest.mark.parametrize("cls", [PartialSum, Overwritten])
def test_writes_into_views(cls: type[nn.Module]) -> None:
    image = hostile(2, 4, 7, 5)
    model = randomise(cls().double(), image / 8)
    kept = copy.deepcopy(model.state_dict())
    gm = normalise(enter(model, (image,), {}).gm)
    check_normal(gm)
    assert not any(isinstance(node.target, OpOverload) for node in gm.graph.nodes)
    for other in (image, hostile(3, 4, 7, 5)):
        assert_equal(model, gm, other)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_a_partial_sum_is_slices_and_a_concat() -> None:
    image = hostile(2, 4, 7, 5)
    gm = enter(randomise(PartialSum().double(), image / 8), (image,), {}).gm
    (concat,) = (node for node in gm.graph.nodes if node.target is torch.cat)
    assert concat.args[1] == 1 and len(concat.args[0]) == 2
