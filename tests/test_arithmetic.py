"""Sums and scalings in normal form: two-tensor sums, per-channel layers, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from front import Lambda, assert_exact, conv, hostile, image, layer, normal_form, operations
from oracle import assert_equivalent, relative_difference
from torch import Tensor, nn

import rmfx
from rmfx import convert, report
from rmfx.front.trace import trace
from rmfx.modules import ChannelAffine
from rmfx.passes.normalise import normalise

C = torch.tensor([2.0, -0.5, 4.0, 0.25])

SUMS: list[tuple[Callable[[Lambda, Tensor], Tensor], list[str]]] = [
    (lambda m, y: y + m.x, ["add"]),
    (lambda m, y: torch.add(y, m.x), ["add"]),
    (lambda m, y: y.add(other=m.x), ["add"]),
    (lambda m, y: torch.add(y, m.x, alpha=-2), ["ChannelAffine", "add"]),
    (lambda m, y: y - m.x, ["ChannelAffine", "add"]),
    (lambda m, y: torch.sub(y, m.x, alpha=0.5), ["ChannelAffine", "add"]),
    (lambda m, y: torch.rsub(y, m.x), ["ChannelAffine", "add"]),
    (lambda m, y: y + y, ["add"]),
    (lambda m, y: y * 0.25, ["ChannelAffine"]),
    (lambda m, y: 2 * y, ["ChannelAffine"]),
    (lambda m, y: y / 4, ["ChannelAffine"]),
    (lambda m, y: torch.div(y, 2), ["ChannelAffine"]),
    (lambda m, y: -y, ["ChannelAffine"]),
    (lambda m, y: torch.neg(y), ["ChannelAffine"]),
    (lambda m, y: y + 3, ["ChannelAffine"]),
    (lambda m, y: 3 - y, ["ChannelAffine"]),
    (lambda m, y: y - 1.5, ["ChannelAffine"]),
    (lambda m, y: 0 + y, []),
    (lambda m, y: +(y * 1 - 0) / 1.0, []),
    (lambda m, y: y * m.c, ["ChannelAffine"]),
    (lambda m, y: m.c.view(1, -1, 1, 1) * y, ["ChannelAffine"]),
    (lambda m, y: y / m.c, ["ChannelAffine"]),
    (lambda m, y: y + m.c, ["ChannelAffine"]),
    (lambda m, y: m.c - y, ["ChannelAffine"]),
    (lambda m, y: torch.sub(y, m.c, alpha=2), ["ChannelAffine"]),
    (lambda m, y: torch.addcmul(m.c, m.c, y), ["ChannelAffine"]),
    (lambda m, y: m.c.addcmul(y, m.c), ["ChannelAffine"]),
    (lambda m, y: torch.addcmul(m.c, m.c, y, value=2), ["ChannelAffine"]),
    (lambda m, y: y.addcmul(m.c, m.c), ["ChannelAffine"]),
    (lambda m, y: y * m.c + 3, ["ChannelAffine", "ChannelAffine"]),
    (lambda m, y: (y * m.c + m.c) * m.c, ["ChannelAffine", "ChannelAffine"]),
    (lambda m, y: (y * m.c + m.last) + m.c, ["ChannelAffine", "ChannelAffine", "ChannelAffine"]),
    (lambda m, y: (y * m.c + m.c) + y * m.c, ["ChannelAffine", "ChannelAffine", "add"]),
    (lambda m, y: y * m.last, ["ChannelAffine"]),
    (lambda m, y: y * m.one, ["ChannelAffine"]),
    (lambda m, y: y * m.row, ["mul"]),
    (lambda m, y: y + m.full, ["add"]),
    (lambda m, y: y * m.x, ["mul"]),
    (lambda m, y: 1 / y, ["truediv"]),
    (lambda m, y: torch.div(y, 2, rounding_mode="floor"), ["div"]),
    (lambda m, y: y * y.size(1), ["ChannelAffine"]),
    (lambda m, y: y * y.size(2), ["size", "mul"]),
    (lambda m, y: y.size(-1) + y, ["size", "add"]),
    (lambda m, y: y * float("inf"), ["mul"]),
]


@pytest.mark.parametrize("index", range(len(SUMS)))
def test_sums_and_scalings(index: int) -> None:
    function, expected = SUMS[index]

    def forward(m: Lambda, x: Tensor) -> Tensor:
        m.__dict__["x"] = x
        return function(m, m.conv(x))

    constants = {"c": C.view(4, 1, 1), "last": torch.full((5,), 0.5), "one": torch.tensor([[[3.0]]])}
    more = {"row": torch.rand(7, 1), "full": torch.rand(4, 7, 5)}
    gm = assert_exact(Lambda(forward, conv=conv(), **constants, **more), image())
    assert operations(gm) == ["Conv2d", *expected]


def test_a_vector_is_along_the_last_axis_and_a_column_along_the_channels() -> None:
    model = Lambda(lambda m, x: (m.conv(x) * m.last) * m.c, conv=conv(), last=torch.rand(5), c=C.view(4, 1, 1))
    gm = assert_exact(model, image())
    assert [gm.get_submodule(name).axis for name in ("mul", "mul_1")] == [-1, 1]
    mlp = Lambda(lambda m, x: m.fc(x) * m.c, fc=nn.Linear(3, 4), c=C)
    assert layer(assert_exact(mlp, hostile(2, 3)), type(gm.get_submodule("mul"))).axis == -1


def test_one_channel_that_becomes_many_is_no_scaling() -> None:
    model = Lambda(lambda m, x: m.conv(x) * m.c, conv=conv(4, 1), c=C.view(4, 1, 1))
    assert operations(assert_exact(model, image())) == ["Conv2d", "mul"]
    pooled = Lambda(lambda m, x: m.pool(x) + m.last, pool=nn.AdaptiveAvgPool2d(1), last=torch.rand(5))
    assert operations(assert_exact(pooled, image())) == ["AdaptiveAvgPool2d", "add"]


@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 8), (8,)])
@pytest.mark.parametrize("known", [True, False])
def test_one_feature_that_becomes_many_converts(shape: tuple[int, ...], known: bool) -> None:
    model = Lambda(lambda m, x: m.fc(x) + m.c, fc=nn.Linear(8, 1), c=C).double().eval()
    x = hostile(*shape)
    converted = rmfx.convert(model, *([x] if known else []))
    assert converted(x).shape == model(x).shape
    assert relative_difference(model(x), converted(x)) <= 1e-15


def test_a_number_of_no_dimensions_becomes_a_vector() -> None:
    for vector in (C, torch.ones(1)):
        model = Lambda(lambda m, x: x.mean() * 2 + m.v, v=vector)
        x = hostile(2, 3)
        gm = normalise(trace(model.double().eval()), inputs=(x,))
        assert torch.equal(gm(x), model(x)) and gm(x).shape == vector.shape


def test_integers_stay_integers() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        index = (torch.argmax(x, 1) * 2 + 1) - torch.argmin(x, 1)
        return index.clamp(0, 3)

    gm = assert_exact(Lambda(forward), image())
    assert operations(gm) == ["argmax", "mul", "add", "argmin", "sub", "Hardtanh"]
    assert {node.target for node in gm.graph.nodes if node.name.startswith("add")} == {torch.add}


def test_a_float_makes_floats_of_integers() -> None:
    model = Lambda(lambda m, x: torch.argmax(x, 1) * 1.0 + 2).eval()
    gm = normal_form(model)
    assert operations(gm) == ["argmax", "mul", "ChannelAffine"]
    assert torch.equal(gm(image()), model(image()))
    assert gm(image()).dtype == model(image()).dtype == torch.float32


def test_constants_of_a_network_without_parameters_have_the_type_of_those_beside_them() -> None:
    for function in (lambda x: x + torch.full((3, 1, 1), 2.5), lambda x: torch.full((3, 1, 1), 0.1) - x * 0.3):
        model, x = Lambda(lambda m, x, f=function: f(x)).eval(), hostile(2, 3, 5, 4).float()
        gm = convert(model, x)
        assert gm(x).dtype == torch.float32
        torch.testing.assert_close(gm(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
def test_a_count_in_a_buffer_is_a_number(shape: tuple[int, ...]) -> None:
    model = Lambda(lambda m, x: m.conv(x) * m.n / m.n - m.n, conv=conv(), n=torch.full(shape, 4))
    gm = assert_exact(model, image())
    assert operations(gm) == ["Conv2d", "ChannelAffine", "ChannelAffine", "ChannelAffine"]
    many = Lambda(lambda m, x: m.conv(x) / m.n, conv=conv(), n=torch.tensor([[[2]], [[3]], [[4]], [[5]]]))
    assert operations(assert_exact(many, image())) == ["Conv2d", "truediv"]


def test_constants_have_the_type_of_the_model() -> None:
    def dtype(model: nn.Module) -> torch.dtype:
        return normal_form(model.eval()).get_buffer("mul.weight").dtype

    def scaled() -> nn.Module:
        return Lambda(lambda m, x: m.conv(x) * 0.1, conv=conv())

    assert [dtype(scaled()), dtype(scaled().double()), dtype(scaled().half())] == [
        torch.float32,
        torch.float64,
        torch.float32,
    ]


NORMALISATIONS: list[Callable[[Lambda, Tensor], Tensor]] = [
    lambda m, y: y - m.mean,
    lambda m, y: torch.sub(y, m.mean, alpha=0.3),
    lambda m, y: m.mean - y,
    lambda m, y: y / m.std,
    lambda m, y: (y - m.mean) / m.std,
]


@pytest.mark.parametrize("index", range(len(NORMALISATIONS)))
def test_parameters_go_on_training(index: int) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        x = NORMALISATIONS[index](m, x)
        return x + m.second(m.conv(x).relu())

    weights = {name: nn.Parameter(C.abs().view(1, 4, 1, 1)) for name in ("mean", "std")}
    model = Lambda(forward, conv=conv(), second=conv(), **weights).eval()
    gm = normalise(trace(model), inputs=(image().float(),))
    scale = next(part for part in gm.modules() if type(part) is ChannelAffine)
    assert [value.requires_grad and value.is_leaf for value in scale.parameters()] == [True]
    result = convert(model, image().float())  # compared within float32's rounding of what it computes
    assert report(result).count("removed") == 1
    assert_equivalent(model.double(), convert(model, image()), image())


@pytest.mark.filterwarnings("error")
def test_a_scale_that_trains_is_shown_without_a_warning() -> None:
    assert repr(ChannelAffine(nn.Parameter(torch.tensor(-0.5)))) == "ChannelAffine(-0.5, bias=False, axis=1)"
