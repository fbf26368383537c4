"""Layers between a permutation and its inverse become layers of channels, whichever way these are written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from front import Lambda, conv, hostile, image, operations
from oracle import FLOAT64_TOLERANCE, relative_difference
from torch import Tensor, fx, nn
from torch.nn import functional as F

import rmfx
from rmfx.front.normal import check_normal
from rmfx.front.trace import trace
from rmfx.hostile import randomise
from rmfx.passes.normalise import normalise

Branch = Callable[[Lambda, Tensor], Tensor]

# What stands on channels last, and what becomes of it.
FORMS: dict[str, tuple[Branch, list[str]]] = {
    "permute": (lambda m, y: m.l(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), ["Conv2d"]),
    "torch.permute": (lambda m, y: torch.permute(m.l(torch.permute(y, (0, 2, 3, 1))), (0, 3, 1, 2)), ["Conv2d"]),
    "movedim": (lambda m, y: m.l(y.movedim(1, -1)).movedim(-1, 1), ["Conv2d"]),
    "moveaxis": (lambda m, y: torch.moveaxis(m.l(torch.movedim(y, 1, 3)), 3, 1), ["Conv2d"]),
    "transpose": (lambda m, y: m.l(y.transpose(1, 3)).transpose(1, -1), ["Conv2d"]),
    "a mixture": (lambda m, y: m.l(y.permute(0, 2, 3, 1).contiguous()).movedim(3, 1), ["Conv2d"]),
    "functional": (lambda m, y: F.linear(y.movedim(1, -1), m.l.weight).movedim(-1, 1), ["Conv2d"]),
    "two layers": (
        lambda m, y: m.k(F.gelu(m.l(y.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2),
        ["Conv2d", "GELU", "Conv2d"],
    ),
    "a scale": (
        lambda m, y: (2 * m.l(y.movedim(1, -1)) * m.g).movedim(-1, 1),
        ["Conv2d", "ChannelAffine", "ChannelAffine"],
    ),
    "pointwise": (lambda m, y: F.silu(y.permute(3, 0, 1, 2)).permute(1, 2, 3, 0), ["SiLU"]),
    "nothing": (lambda m, y: y.permute(0, 2, 3, 1).permute(0, 3, 1, 2), []),
    "flattened": (
        lambda m, y: m.l(y.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (7, 5)),
        ["Flatten", "Conv1d", "unflatten"],
    ),
}
STAYING: dict[str, Branch] = {
    "not the inverse": lambda m, y: m.l(y.permute(0, 2, 3, 1)).permute(0, 3, 2, 1).reshape(y.shape),
    "a norm": lambda m, y: F.layer_norm(m.l(y.permute(0, 2, 3, 1)), (4,)).permute(0, 3, 1, 2),
    "another reader": lambda m, y: (z := m.l(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2) * z.sum(),
    "slopes of rows": lambda m, y: m.p(y.movedim(1, -1)).movedim(-1, 1),
    "columns": lambda m, y: m.w(y.permute(0, 1, 3, 2)).permute(0, 1, 3, 2),
    "a mean": lambda m, y: y.permute(0, 2, 3, 1).mean((1, 2), keepdim=True).permute(0, 3, 1, 2),
}


def network(branch: Branch) -> Lambda:
    """A residual block with the branch behind its convolution."""

    def forward(m: Lambda, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        return F.relu(x + branch(m, F.relu(m.conv(x))))

    layers = {"l": nn.Linear(4, 4), "k": nn.Linear(4, 4), "w": nn.Linear(7, 7), "p": nn.PReLU(7)}
    model = Lambda(forward, stem=conv(), conv=conv(), **layers, g=nn.Parameter(torch.rand(4)))
    return randomise(model.double(), image(), 0).eval()


def behind_the_block(model: nn.Module, inputs: tuple[Tensor, ...] | None) -> tuple[fx.GraphModule, list[str]]:
    gm = normalise(trace(model), inputs=inputs)
    check_normal(gm)
    return gm, operations(gm)[4:-2]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("inputs", [None, (image(),)], ids=["no inputs", "inputs"])
def test_forms(name: str, inputs: tuple[Tensor, ...] | None) -> None:
    branch, expected = FORMS[name]
    model = network(branch)
    gm, found = behind_the_block(model, inputs)
    assert found == expected
    for x in (image(), image(1)):
        assert relative_difference(model(x), gm(x)) <= FLOAT64_TOLERANCE


@pytest.mark.parametrize("name", STAYING)
def test_what_stays(name: str) -> None:
    model = network(STAYING[name])
    gm, found = behind_the_block(model, (image(),))
    assert {"permute", "movedim"} & set(found) and not {"Conv1d", "Conv2d"} & set(found)
    assert torch.equal(model(image()), gm(image()))


@pytest.mark.parametrize("door", ["fx", "export"])
@pytest.mark.parametrize("name", ["permute", "movedim", "transpose", "two layers", "a scale"])
def test_residual_connections_are_removed(name: str, door: str) -> None:
    model = network(FORMS[name][0])
    converted = rmfx.convert(torch.export.export(model, (image(),)) if door == "export" else model, image())
    assert rmfx.report(converted).count("removed") == 1
    assert relative_difference(model(image()), converted(image())) <= FLOAT64_TOLERANCE


def test_volumes_and_weights_that_train() -> None:
    model = nn.Sequential(
        nn.Conv3d(3, 4, 1), Lambda(lambda m, x: m.l(x.movedim(1, -1)).movedim(-1, 1), l=nn.Linear(4, 5))
    )
    gm = normalise(trace(model.double().eval()), keep_dropout=True)
    made = gm.get_submodule("1.l")
    assert operations(gm) == ["Conv3d", "Conv3d"] and made.weight.requires_grad
    assert made.weight.data_ptr() == model[1].l.weight.data_ptr() and made.weight.shape == (5, 4, 1, 1, 1)
    x = hostile(2, 3, 4, 5, 2)
    assert relative_difference(model(x), gm(x)) <= FLOAT64_TOLERANCE
