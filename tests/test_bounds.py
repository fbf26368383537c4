"""Bounds of channels hold every value, are as tight as they can be, and name the constant channels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from front import Lambda, hostile, normal_form
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import cbn, cbr, conv
from test_affine import run_affine
from test_facts import Recorder, activations
from test_pointwise import FLOAT64, INF, clamp, prelu
from torch import Tensor, fx, nn

from rmfx.algebra.affine import Affine, dirac, from_tensors
from rmfx.algebra.bounds import (
    TYPICAL,
    Bounds,
    activation_bounds,
    affine_bounds,
    join,
    padding_taps,
    product_bounds,
    sum_bounds,
)
from rmfx.algebra.grid import Axis, Grid
from rmfx.algebra.pointwise import EVERYTHING
from rmfx.errors import RmfxError
from rmfx.front.trace import trace
from rmfx.graph.bounds import GIVEN, bounds_of, give_ranges
from rmfx.graph.facts import annotate, range_of
from rmfx.graph.walk import ON_DEMAND
from rmfx.hostile import randomise
from rmfx.modules import ChannelAffine, MaskedActivation
from rmfx.passes.normalise import normalise


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=FLOAT64)


def bounds(*pairs: tuple[float, float]) -> Bounds:
    """One interval per channel."""
    return Bounds.of((vector(*(low for low, _ in pairs)), vector(*(high for _, high in pairs))))


def corners(x: Bounds, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Inputs within ``x``: at each position one of its ends, or something between: ``[N, C, *sizes]``."""
    random = torch.Generator().manual_seed(seed)
    low, high = (end.clamp(-1e3, 1e3).reshape(1, -1, *[1] * (len(shape) - 2)) for end in (x.low, x.high))
    mix = torch.rand(shape, dtype=FLOAT64, generator=random)
    mix = torch.where(torch.rand(shape, generator=random) < 0.8, mix.round(), mix)
    return low + mix * (high - low)


# -- maps --------------------------------------------------------------------------------------------------------------


def affine(weight: Tensor, bias: Tensor | None, grid: Grid, groups: int = 1) -> Affine:
    return from_tensors(weight, bias, grid, groups)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Affine, Bounds]:
    """A map with some zero weights, and bounds of its input; some ends infinite, some channels constant."""
    dims, groups = draw(st.integers(0, 2)), draw(st.sampled_from((1, 2)))
    groups = groups if dims else 1
    spans = [
        Axis(draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2)), before, before)
        for before in (draw(st.integers(0, 2)) for _ in range(dims))
    ]
    grid = Grid(tuple(spans), draw(st.sampled_from(("zeros", "circular"))) if dims else "zeros")
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weight = torch.randn(4, 4 // groups, *grid.kernel, dtype=FLOAT64, generator=random)
    weight *= torch.rand(weight.shape, generator=random) < draw(st.sampled_from((0.3, 1.0)))
    bias = torch.randn(4, dtype=FLOAT64, generator=random) if draw(st.booleans()) else None
    ends = st.tuples(*(st.sampled_from((-INF, -3.0, -0.5, 0.0, 0.25, 2.0, INF)) for _ in range(2)))
    pairs = [draw(ends.map(sorted).filter(lambda pair: pair not in ([INF, INF], [-INF, -INF]))) for _ in range(4)]
    return affine(weight, bias, grid, groups), bounds(*((low, high) for low, high in pairs))


@settings(max_examples=300)
@given(convolutions())
def test_a_map_stays_within_its_bounds(drawn: tuple[Affine, Bounds]) -> None:
    layer, x = drawn
    got = affine_bounds(layer, x)
    assert (got.low <= got.high).all()
    for seed in range(3):
        y = run_affine(layer, corners(x, (8, 4, *[7] * layer.grid.dims), seed)).transpose(0, 1).flatten(1)
        inside = (got.low <= y.amin(1)) & (y.amax(1) <= got.high)
        assert (inside | got.constant).all()  # one number is not widened by what may round
        flat = y[got.constant] - got.low[got.constant][:, None]
        assert not flat.numel() or flat.abs().max() <= 1e-13


@settings(max_examples=100)
@given(convolutions())
def test_bounds_of_a_map_are_reached(drawn: tuple[Affine, Bounds]) -> None:
    """The signs of the weights say which input is the worst; padding may only be in the way where there is some."""
    layer, x = drawn
    got = affine_bounds(layer, x)
    weight, bias = layer.weights()
    dense = torch.zeros(4, 4, layer.grid.taps, dtype=FLOAT64)
    width = 4 // layer.groups
    for row in range(4):
        first = row // width * width
        dense[row, first : first + width] = weight[row].reshape(width, -1)
    padded = padding_taps(layer.grid)
    low = torch.where(padded, x.low.clamp(max=0)[:, None], x.low[:, None])
    high = torch.where(padded, x.high.clamp(min=0)[:, None], x.high[:, None])
    worst = torch.where(dense > 0, dense * high, torch.where(dense < 0, dense * low, 0.0)).sum((1, 2))
    worst = worst if bias is None else worst + bias
    finite = worst.isfinite()
    torch.testing.assert_close(got.high[finite], worst[finite], rtol=1e-12, atol=1e-12)
    assert torch.equal(got.high[~finite], worst[~finite])


def test_zero_padding_is_within_the_bounds() -> None:
    """All inputs are 2 and all weights 1: a corner reads 4 ones, the middle 9."""
    weight = torch.ones(1, 1, 3, 3, dtype=FLOAT64)
    for mode, expected in (("zeros", (2.0, 18.0)), ("reflect", (18.0, 18.0)), ("circular", (18.0, 18.0))):
        got = affine_bounds(affine(weight, None, Grid.of((3, 3), padding=(1, 1), mode=mode)), bounds((2.0, 2.0)))
        assert got.range == pytest.approx(expected, rel=1e-12)
        assert bool(got.constant) == (mode != "zeros")
    valid = affine_bounds(affine(weight, None, Grid.of((3, 3))), bounds((2.0, 2.0)))
    assert valid.constant.all() and valid.range == (18.0, 18.0)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))
def test_padding_taps_are_those_that_read_padding(k: int, s: int, d: int, before: int, after: int) -> None:
    axis = Axis(k, s, d, before, after)
    read = [False] * k
    for size in range(1, 30):
        for position in range(max(axis.out_size(size), 0)):
            for tap in range(k):
                at = position * s + tap * d - before
                read[tap] |= not 0 <= at < size
    assert padding_taps(Grid((axis,))).tolist() == read
    assert not padding_taps(Grid((axis,), "circular")).any()


def test_a_tap_outside_on_either_axis_reads_padding() -> None:
    grid = Grid((Axis(3, 1, 1, 1, 1), Axis(1)))
    assert padding_taps(grid).tolist() == [True, False, True]
    assert padding_taps(Grid.of((3, 3), padding=(1, 1))).tolist() == [True] * 4 + [False] + [True] * 4
    assert padding_taps(Grid()).tolist() == [False]


def test_an_identity_keeps_bounds_to_the_last_digit() -> None:
    x = bounds((-1.1, 2.2), (0.0, 6.0), (-INF, 0.3))
    got = affine_bounds(dirac(3, Grid.sampling((2, 2))), x)
    assert torch.equal(got.low, x.low) and torch.equal(got.high, x.high) and torch.equal(got.rms, x.rms)


def test_sums_of_what_is_not_negative_are_not_negative() -> None:
    weight = torch.rand(5, 4, 3, 3, dtype=FLOAT64)
    got = affine_bounds(affine(weight, None, Grid.of((3, 3), padding=(1, 1))), Bounds.of((0.0, 0.1)))
    assert (got.low == 0).all()


def test_rounding_does_not_escape() -> None:
    """0.1 + 0.2 is more than 0.3 in float64, and ten times 0.1 less than 1."""
    ones = torch.ones(1, 10, dtype=FLOAT64)
    got = affine_bounds(affine(ones, None, Grid()), bounds(*[(-0.1, 0.1)] * 10))
    assert float(got.low) <= -1.0 and float(got.high) >= 1.0
    assert float(got.high) <= 1.0 + 1e-14


def test_zero_weights_make_constants_of_anything() -> None:
    weight = vector(0.0, 0.0, 0.0, 1.0).reshape(2, 2)
    got = affine_bounds(affine(weight, vector(0.1, 0.2), Grid()), Bounds.of(EVERYTHING))
    assert got.constant.tolist() == [True, False] and float(got.low[0]) == 0.1
    mixed = affine_bounds(affine(vector(2.0, 3.0).reshape(1, 2), vector(0.5), Grid()), bounds((0.1, 0.1), (0.2, 0.2)))
    assert mixed.constant.all() and float(mixed.low) == pytest.approx(1.3, rel=1e-15)


def test_infinite_and_undefined_weights_bound_nothing() -> None:
    for bad in (math.nan, INF):
        got = affine_bounds(affine(vector(bad, 1.0).reshape(2, 1), None, Grid()), bounds((0.0, 1.0)))
        assert float(got.low[0]) in (-INF, 0.0) and float(got.high[0]) == INF and not got.constant.any()
        assert float(got.high[1]) == 1.0


def test_sizes_are_estimated_as_if_channels_were_independent() -> None:
    x = torch.randn(200_000, 3, dtype=FLOAT64) * vector(1.0, 2.0, 0.5)
    weight, bias = torch.randn(4, 3, dtype=FLOAT64), torch.randn(4, dtype=FLOAT64)
    wide = Bounds.of((vector(-99.0, -99.0, -99.0), vector(99.0, 99.0, 99.0)), vector(1.0, 2.0, 0.5))
    got = affine_bounds(affine(weight, bias, Grid()), wide).rms
    true = (x @ weight.T + bias).square().mean(0).sqrt()
    assert torch.allclose(got, true, rtol=0.02, atol=0)


# -- the values themselves ---------------------------------------------------------------------------------------------


def test_the_estimate_of_size_lies_within_the_bounds() -> None:
    assert float(Bounds.of((-9.0, 9.0)).rms) == TYPICAL
    assert float(Bounds.of((-0.5, 0.2)).rms) == 0.5
    assert float(Bounds.of((3.0, 9.0)).rms) == 3.0 and float(Bounds.of((-9.0, -3.0)).rms) == 3.0
    assert float(Bounds.of((-9.0, 9.0), 20.0).rms) == 9.0


def test_within() -> None:
    got = bounds((-1.0, 5.0), (0.0, 1.0)).within(bounds((0.0, 9.0), (2.0, 3.0)))
    assert (got.low.tolist(), got.high.tolist()) == ([0.0, 0.0], [5.0, 1.0]), "what contradicts itself is not believed"


def test_hull_join_and_constant() -> None:
    both = join([(bounds((-1.0, 2.0), (0.5, 0.5)), 2), (Bounds.of((3.0, 3.0)), 3)])
    assert both.low.tolist() == [-1.0, 0.5, 3.0, 3.0, 3.0] and both.constant.tolist() == [False] + [True] * 4
    assert both.range == both.hull().range == (-1.0, 3.0) and both.hull().low.dim() == 0
    assert not Bounds.of((INF, INF)).constant


ENDS = st.sampled_from((-INF, -3.0, -0.7, 0.0, 0.1, 2.0, INF))
INTERVALS = st.tuples(ENDS, ENDS).map(sorted).filter(lambda pair: pair[0] < pair[1] or math.isfinite(pair[0]))


@settings(max_examples=300)
@given(INTERVALS, INTERVALS)
def test_sums_and_products_stay_within_their_bounds(first: list[float], second: list[float]) -> None:
    a, b = (Bounds.of((low, high)) for low, high in (first, second))
    x, y = (torch.linspace(max(low, -1e4), min(high, 1e4), 41, dtype=FLOAT64) for low, high in (first, second))
    for got, values in (
        (sum_bounds(a, b), x[:, None] + y[None]),
        (product_bounds(a, b), x[:, None] * y[None]),
    ):
        low, high = got.range
        assert low <= values.min() and values.max() <= high
        assert not got.constant or values.max() == values.min() == low
        if all(math.isfinite(end) for end in (*first, *second)):
            assert (low, high) == pytest.approx((float(values.min()), float(values.max())), rel=1e-14)


# -- activations -------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(activations(), st.lists(INTERVALS, min_size=6, max_size=6))
def test_an_activation_stays_within_its_bounds(module: nn.Module, pairs: list[list[float]]) -> None:
    x = bounds(*((low, high) for low, high in pairs))
    got = activation_bounds(module, x)
    y = module(corners(x, (40, 6)))
    assert (got.low - 1e-12 <= y.amin(0)).all() and (y.amax(0) <= got.high + 1e-12).all()
    fixed = x.constant
    assert got.constant[fixed].all(), "a constant stays one"
    torch.testing.assert_close(
        got.low[fixed], module(x.low.nan_to_num(0, 0, 0)[None])[0][fixed], rtol=1e-15, atol=1e-300
    )


def test_each_channel_has_its_own_slope_clamp_and_mask() -> None:
    x = bounds((-2.0, 4.0), (-2.0, -1.0), (1.0, 4.0))
    slopes = activation_bounds(prelu(0.5, -1.0, 3.0), x)
    assert list(zip(slopes.low.tolist(), slopes.high.tolist(), strict=True)) == [(-1.0, 4.0), (1.0, 2.0), (1.0, 4.0)]
    clamped = activation_bounds(clamp([0.0, -1.5, 5.0], [1.0, 9.0, 6.0]), x)
    assert list(zip(clamped.low.tolist(), clamped.high.tolist(), strict=True)) == [(0.0, 1.0), (-1.5, -1.0), (5.0, 5.0)]
    masked = activation_bounds(MaskedActivation(nn.ReLU(), torch.tensor([True, False, True])), x)
    assert list(zip(masked.low.tolist(), masked.high.tolist(), strict=True)) == [(0.0, 4.0), (-2.0, -1.0), (1.0, 4.0)]


def test_what_never_passes_zero_is_constant_behind_a_relu() -> None:
    got = activation_bounds(nn.ReLU(), bounds((-3.0, -1.0), (-3.0, 0.0), (-3.0, 1e-9)))
    assert got.constant.tolist() == [True, True, False]


def test_a_random_slope_makes_no_constant() -> None:
    x = bounds((-1.0, -1.0))
    assert not activation_bounds(nn.RReLU().train(), x).constant
    assert activation_bounds(nn.RReLU().eval(), x).constant


def test_slopes_on_the_meta_device_bound_nothing() -> None:
    assert activation_bounds(nn.PReLU(2, device="meta"), bounds((-1.0, 1.0), (0.0, 1.0))).range == EVERYTHING


# -- graphs ------------------------------------------------------------------------------------------------------------


def graph(model: nn.Module, x: Tensor | None = None, **given_ranges: tuple[float, float]) -> fx.GraphModule:
    """The annotated normal form."""
    gm = normal_form(model.double().eval())
    give_ranges(gm, given_ranges)
    annotate(gm, None if x is None else (x,))
    return gm


def node_of(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.name == name or node.target == name)


def last(gm: fx.GraphModule) -> fx.Node:
    return next(node for node in reversed(gm.graph.nodes) if node.op == "output").all_input_nodes[0]


class Mixed(nn.Module):
    """Sums, products, concats, constants and layers of every kind that bounds know."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = cbr(3, 6), cbn(6, 6, 3, 2)
        self.depthwise = conv(6, 6, groups=6, bias=True)
        self.scale = ChannelAffine(torch.randn(6), torch.randn(6))
        self.slopes, self.pool = nn.PReLU(6), nn.AvgPool2d(3, 1, 1)
        self.average, self.up = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Upsample(scale_factor=2)
        self.pad = nn.ZeroPad2d(1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(6, 6, 1, bias=True), nn.Sigmoid())
        self.wide, self.head = conv(12, 6, 1), nn.Linear(6, 4)
        self.offset = nn.Parameter(torch.randn(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.clamp(-2, 2))
        y = self.slopes(self.scale(self.depthwise(x)))
        y = nn.functional.relu6(y + x) + self.offset
        y = y * self.gate(y) + self.pool(x) - 0.5 * self.average(x)
        y = self.wide(torch.cat([nn.functional.max_pool2d(self.pad(y), 3, 1), x], 1)).relu() + 1.5
        y = nn.functional.max_pool2d(self.up(self.down(y)), 3, 2, 1)
        return self.head(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)).sigmoid()


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("fully", [False, True])
def test_every_value_of_a_network_lies_within_its_bounds(sized: bool, fully: bool) -> None:
    x = hostile(3, 3, 8, 8)
    gm = graph(randomise(Mixed().double(), x / 8), x if sized else None)
    finite = 0
    for inputs in (x, x / 100, x.abs(), hostile(2, 3, 8, 8, seed=1)):
        recorder = Recorder(gm)
        with torch.no_grad():
            recorder.run(inputs)
        for node, value in recorder.values.items():
            if not isinstance(value, Tensor) or node.op == "output":
                continue
            dims = 2 if value.dim() == 4 else 0
            got = bounds_of(node, dims, fully=fully)
            assert got.low.numel() in (1, value.shape[1]), node
            rows = value.transpose(0, 1).flatten(1) if got.low.dim() else value.reshape(1, -1)
            slack = 1e-12 * (1 + float(value.abs().max()))
            assert (got.low - slack <= rows.amin(1)).all() and (rows.amax(1) <= got.high + slack).all(), node
            finite += bool(got.low.isfinite().all() and got.high.isfinite().all())
    assert finite >= 40


def test_bounds_are_per_channel_through_the_whole_network() -> None:
    x = hostile(3, 3, 8, 8)
    gm = graph(randomise(Mixed().double(), x / 8), x)
    wide = [node for node in gm.graph.nodes if node.target in ("wide", "slopes", "head", "pool", "down.0")]
    assert len(wide) == 5
    for node in wide:
        got = bounds_of(node, 0 if node.target == "head" else 2, fully=True)
        assert got.low.numel() > 1 and got.low.isfinite().all() and len(got.high.unique()) > 1


def test_only_what_is_needed_is_read() -> None:
    model = nn.Sequential(conv(3, 4), nn.ReLU6(), conv(4, 4), nn.ReLU())
    gm = graph(model)
    got = bounds_of(last(gm), 2)
    assert got.low.shape == (4,) and got.high.isfinite().all()
    assert ON_DEMAND not in node_of(gm, "0").meta, "a ReLU6 bounds its values by itself"
    bounds_of(last(gm), 2, fully=True)
    assert "bounds_fully" in node_of(gm, "0").meta[ON_DEMAND]


def test_bounds_are_kept() -> None:
    gm = graph(nn.Sequential(nn.ReLU6(), conv(3, 4)))
    assert bounds_of(last(gm), 2) is bounds_of(last(gm), 2)


def test_ranges_that_the_user_gives() -> None:
    model = nn.Sequential(conv(3, 4, 1), nn.ReLU(), conv(4, 4, 1))
    unknown = bounds_of(last(graph(model)), 2)
    assert unknown.range == EVERYTHING
    known = bounds_of(last(graph(model, input=(-1.0, 1.0))), 2)
    assert all(math.isfinite(end) for end in known.range)
    inside = graph(model, _1=(0.1, 0.7))  # no float32 numbers
    assert bounds_of(node_of(inside, "_1"), 2).range == (0.1, 0.7)
    each = graph(model, _1=(vector(0.0, 1.0, 0.0, 0.0), vector(1.0, 1.0, 2.0, 3.0)))  # type: ignore[arg-type]
    assert bounds_of(node_of(each, "_1"), 2).constant.tolist() == [False, True, False, False]
    annotate(each, None)
    assert range_of(node_of(each, "_1")) == (0.0, 3.0) and GIVEN in node_of(each, "_1").meta
    assert range_of(node_of(each, "_0")) == EVERYTHING


@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        ({"inptu": (0.0, 1.0)}, "value_ranges names 'inptu', which is no input and no node of the network"),
        ({"input": (1.0, 0.0)}, "value_ranges gives 'input' an interval whose low end is not below its high end"),
        ({"input": (math.nan, 0.0)}, "value_ranges gives 'input' an interval whose low end is not below its high end"),
    ],
)
def test_ranges_that_cannot_be_are_refused(ranges: dict[str, tuple[float, float]], reason: str) -> None:
    with pytest.raises(RmfxError) as error:
        give_ranges(normal_form(nn.Sequential(nn.ReLU()).eval()), ranges)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        ((vector(0.0, 0.0), vector(1.0, 1.0)), "value_ranges gives 'input', which has 3 channels, 2 numbers"),
        ((torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)), r"ends of shapes \(1, 3, 1, 1\) and \(1, 3, 1, 1\)"),
        ((0.0, vector(1.0, 1.0, 1.0)), r"ends of shapes \(\) and \(3,\): give two numbers, or two one-dimensional"),
    ],
)
@pytest.mark.parametrize("sized", [True, False])
def test_there_is_an_interval_for_each_channel(ends: Any, reason: str, sized: bool) -> None:
    inputs = (torch.zeros(2, 3, 7, 5),) if sized else None
    gm = normalise(trace(nn.Sequential(conv(3, 4, 1), nn.ReLU()).eval()), inputs=inputs)
    with pytest.raises(RmfxError, match=reason):
        give_ranges(gm, {"input": ends})
    give_ranges(gm, {"input": (vector(0.0, 0.0, 0.0), vector(1.0, 1.0, 1.0))})


def test_weights_on_the_meta_device_bound_nothing() -> None:
    gm = graph(nn.Sequential(nn.ReLU6(), nn.Conv2d(3, 4, 1)))
    node_of(gm, "1")
    gm.get_submodule("1").to("meta")
    assert bounds_of(last(gm), 2).range == EVERYTHING


def test_other_axes_than_the_channels_have_no_bounds_of_their_own() -> None:
    """A linear layer reads the last axis of an image, not its channels; a PReLU has its slopes on axis 1."""
    image = hostile(2, 4, 6, 4)
    gm = graph(nn.Sequential(nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)), image)
    assert bounds_of(node_of(gm, "1"), 2).low.shape == (4,) and bounds_of(node_of(gm, "1"), 0).low.shape == ()
    tokens = graph(nn.Sequential(nn.ReLU6(), nn.Linear(4, 5), nn.PReLU(3)), hostile(2, 3, 4))
    assert bounds_of(last(tokens), 0).range == EVERYTHING
    summed = graph(
        Lambda(lambda m, x: m.a(x) + m.b, a=nn.Sequential(nn.ReLU6(), conv(4, 4, 1)), b=torch.ones(4)), image
    )
    assert bounds_of(last(summed), 2).low.shape == (), "the constant is broadcast along the last axis"


def test_deep_networks_need_no_recursion() -> None:
    gm = graph(nn.Sequential(*(layer for _ in range(800) for layer in (nn.BatchNorm2d(2, affine=False), nn.ReLU()))))
    assert bounds_of(last(gm), 2, fully=True).range == (0.0, INF)
