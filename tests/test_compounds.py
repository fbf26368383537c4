"""Operations that hide a sum are sums of the normal form, and residual connections written with them are removed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from front import Lambda, assert_exact, conv, hostile, image, normal_form, operations
from oracle import assert_equivalent, relative_difference
from torch import Tensor, nn

import rmfx
from rmfx.hostile import randomise

C = torch.tensor([2.0, -0.5, 4.0, 0.25])
Form = Callable[[Lambda, Tensor, Tensor], Tensor]

# What a block makes of its input and its branch, and what that is in normal form.
SUMS: dict[str, tuple[Form, list[str]]] = {
    "lerp": (lambda m, x, y: torch.lerp(x, y, 0.3), ["ChannelAffine", "ChannelAffine", "add"]),
    "lerp as a method": (lambda m, x, y: x.lerp(end=y, weight=0.3), ["ChannelAffine", "ChannelAffine", "add"]),
    "lerp in place": (lambda m, x, y: y.lerp_(x, 0.3), ["ChannelAffine", "ChannelAffine", "add"]),
    "lerp by a parameter": (lambda m, x, y: torch.lerp(x, y, m.w), ["ChannelAffine", "ChannelAffine", "add"]),
    "lerp by channels": (lambda m, x, y: x.lerp(y, m.c.sigmoid()), ["ChannelAffine", "ChannelAffine", "add"]),
    "addcmul": (lambda m, x, y: torch.addcmul(x, y, m.c), ["ChannelAffine", "add"]),
    "addcmul in place": (lambda m, x, y: y.addcmul_(m.c, x, value=-2), ["ChannelAffine", "add"]),
    "addcmul with a factor": (lambda m, x, y: x.addcmul(y, m.c, value=0.5), ["ChannelAffine", "add"]),
    "addcdiv": (lambda m, x, y: torch.addcdiv(x, y, m.c), ["ChannelAffine", "add"]),
    "addcdiv with a factor": (lambda m, x, y: x.addcdiv(y, m.c, value=3), ["ChannelAffine", "ChannelAffine", "add"]),
    "sum of a stack": (lambda m, x, y: torch.stack([x, y]).sum(0), ["add"]),
    "sum of a stack of channels": (lambda m, x, y: torch.stack((x, y), 1).sum(dim=1), ["add"]),
    "sum of a stack of features": (lambda m, x, y: torch.stack((x, y), -1).sum((4,)), ["add"]),
    "sum of three": (lambda m, x, y: torch.sum(torch.stack([x, y, x], dim=2), [2]), ["add", "add"]),
    "mean of a stack": (lambda m, x, y: torch.stack((x, y), dim=0).mean(dim=0), ["add", "ChannelAffine"]),
}

# What stays as it is.
OTHERS: dict[str, tuple[Form, list[str]]] = {
    "a dimension is kept": (lambda m, x, y: torch.stack([x, y]).sum(0, keepdim=True), ["stack", "sum"]),
    "another axis": (lambda m, x, y: torch.stack([x, y]).sum(1), ["stack", "sum"]),
    "two axes": (lambda m, x, y: torch.stack([x, y]).sum((0, 1)), ["stack", "sum"]),
    "all axes": (lambda m, x, y: torch.stack([x, y]).mean(), ["stack", "mean"]),
    "another type": (lambda m, x, y: torch.stack([x, y]).sum(0, dtype=torch.float64), ["stack", "sum"]),
    "too many": (lambda m, x, y: torch.stack([x, y] * 9).sum(0), ["stack", "sum"]),
    "another reduction": (lambda m, x, y: torch.stack([x, y]).amax(0), ["stack", "amax"]),
}


def block(form: Form) -> Lambda:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        x = torch.relu(m.stem(x))
        return torch.relu(form(m, x, m.second(torch.relu(m.first(x)))))

    scale = nn.Parameter(torch.tensor(0.3))
    return Lambda(forward, stem=conv(), first=conv(4, 4), second=conv(4, 4), c=C.view(4, 1, 1), w=scale)


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    form, expected = SUMS[name]
    model = block(form).double().eval()
    gm = normal_form(model)
    assert relative_difference(model(image()), gm(image())) < 1e-15  # torch rounds these operations as it likes
    assert operations(gm) == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d", *expected, "ReLU"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_sum_of_tensors_stays(name: str) -> None:
    form, expected = OTHERS[name]
    gm = assert_exact(block(form), image())
    assert operations(gm) == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d", *expected, "ReLU"]


@pytest.mark.parametrize("entry", ["fx", "export"])
@pytest.mark.parametrize("name", SUMS)
def test_residual_connections_are_removed(name: str, entry: str) -> None:
    model = randomise(block(SUMS[name][0]).double(), hostile(4, 4, 7, 5), 0).eval()
    x = hostile(2, 4, 7, 5)
    entered = torch.export.export(model, (x,)) if entry == "export" else model
    plain = rmfx.convert(entered, x)
    report = rmfx.report(plain)
    assert (report.count("removed"), report.count("refused")) == (1 + (name == "sum of three"), 0), report
    assert_equivalent(model, plain, hostile(2, 4, 7, 5) * 8)


def test_a_gate_that_is_written_as_lerp_is_one() -> None:
    model = block(lambda m, x, y: torch.lerp(x, y, torch.sigmoid(y))).double().eval()
    x = image()
    plain = rmfx.convert(model, x)
    assert rmfx.report(plain).count("removed") == 1
    assert_equivalent(model, plain, x)


def test_integers_are_summed_as_before() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        first, second = x.argmax(1).int(), x.argmin(1).int()
        return torch.stack([first, second]).sum(0) + torch.addcmul(first, first, second)

    model = Lambda(forward).eval()
    gm, x = normal_form(model), image()
    assert torch.equal(gm(x), model(x)) and gm(x).dtype == model(x).dtype == torch.int64
    assert "stack" in operations(gm)


GLUS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "function": ((2, 6, 9, 7), lambda y: nn.functional.glu(y, 1)),
    "layer": ((2, 6, 9, 7), nn.GLU(-3)),
    "sequence": ((2, 6, 9), nn.GLU(dim=1)),
    "features": ((2, 6), nn.functional.glu),
}


@pytest.mark.parametrize("name", GLUS)
def test_gated_linear_units_of_channels_are_products(name: str) -> None:
    shape, glu = GLUS[name]
    layers = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d}[len(shape) - 2]
    more: tuple[int, ...] = (1,) if len(shape) > 2 else ()
    model = Lambda(
        lambda m, x: m.stem(x) + m.second(glu(m.first(x))),
        stem=layers(6, 6, *more), first=layers(6, 10, *more), second=layers(5, 6, *more),
    )  # fmt: skip
    x = hostile(*shape)
    model = randomise(model.double(), x / 8)
    plain = rmfx.convert(model, x)
    assert rmfx.report(plain).count("removed") == 1
    assert_equivalent(model, plain, x)


def test_gated_linear_units_of_positions_stay() -> None:
    model = Lambda(lambda m, x: nn.functional.glu(m.conv(x), -1), conv=conv())
    assert operations(assert_exact(model, hostile(2, 4, 5, 6))) == ["Conv2d", "glu"]
