"""What is known of values before they are computed: shapes, channels, and intervals that hold them."""

from __future__ import annotations

import math
import operator
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_affine import signal
from test_pointwise import FLOAT64, INF, clamp, norm, prelu, samples
from torch import Tensor, fx, nn

from rmfx.algebra.pointwise import EVERYTHING, Range, image
from rmfx.front.trace import trace
from rmfx.graph.facts import annotate, channels_of, is_sum, module_of, module_range, range_of, shape_of
from rmfx.modules import ChannelAffine, ChannelPad, ChannelSlice, MaskedActivation, SizeGuard
from rmfx.passes.normalise import normalise

BOUNDS = (-INF, -60.0, -8.0, -3.0, -1.5, -0.4, 0.0, 0.25, 1.0, 2.9, 3.0, 6.0, 6.5, 45.0, INF)


def activations() -> st.SearchStrategy[nn.Module]:
    """Every known activation, with random arguments (those of ``image``'s known bugs left out)."""
    positive = st.sampled_from((0.1, 0.5, 1.0, 2.0))
    slopes = st.sampled_from((-0.5, 0.0, 0.01, 0.3, 1.0, 1.5))
    plain = (nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.LogSigmoid, nn.SiLU, nn.Mish,
             nn.Hardswish, nn.Tanhshrink)  # fmt: skip
    return st.one_of(
        st.sampled_from(plain).map(lambda cls: cls()),
        st.builds(nn.GELU, st.sampled_from(("none", "tanh"))),
        st.builds(nn.LeakyReLU, slopes),
        st.builds(lambda low, width: nn.RReLU(low, low + width).eval(), slopes, positive),
        st.builds(nn.Threshold, slopes, slopes),
        st.builds(nn.ELU, positive),
        st.builds(nn.CELU, positive),
        st.builds(nn.Softplus, positive),
        st.builds(nn.Softshrink, positive),
        st.builds(nn.Hardshrink, positive),
        st.builds(lambda low, width: nn.Hardtanh(low, low + width), slopes, positive),
        st.lists(slopes, min_size=6, max_size=6).map(lambda values: prelu(*values)),
        slopes.map(lambda low: clamp([low] * 6, [low + 2.5] * 6)),
        st.lists(st.booleans(), min_size=6, max_size=6).map(lambda m: MaskedActivation(nn.Tanh(), torch.tensor(m))),
    )  # fmt: skip


@settings(max_examples=400)
@given(activations(), st.tuples(st.sampled_from(BOUNDS), st.sampled_from(BOUNDS)).map(sorted))
def test_an_image_holds_all_outputs(module: nn.Module, bounds: list[float]) -> None:
    values = (bounds[0], bounds[1])
    low, high = image(module, values)
    assert low <= high
    if values in ((INF, INF), (-INF, -INF)):
        return
    outputs = module(samples(values))
    assert low - 1e-12 <= outputs.min() and outputs.max() <= high + 1e-12


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-2, 3), nn.ELU(0.7), nn.SELU(), nn.CELU(), nn.Sigmoid(), nn.Tanh(),
               nn.Hardsigmoid(), nn.LogSigmoid(), clamp([-2.0] * 6, [3.0] * 6), nn.LeakyReLU(2.0)]
)  # fmt: skip
@pytest.mark.parametrize("values", [(-5.0, -1.5), (-4.0, 2.0), (0.5, 9.0)])
def test_images_of_monotone_activations_are_tight(module: nn.Module, values: Range) -> None:
    if isinstance(module, nn.LeakyReLU) and values[1] < 0:
        values = (values[0], 0.0)
    outputs = module(samples(values))
    assert image(module, values) == (float(outputs.min()), float(outputs.max()))


@pytest.mark.parametrize("module", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.Hardswish()])
def test_dips_are_bounded_closely(module: nn.Module) -> None:
    low, high = image(module, (-7.0, 5.0))
    deepest = float(module(torch.linspace(-7, 0, 100_001, dtype=FLOAT64)).min())
    assert low <= deepest <= low + 5e-4 and high == 5.0
    assert image(module, (2.0, 5.0)) == (0.0, 5.0)


def test_a_softplus_is_bounded_on_both_sides() -> None:
    assert image(nn.Softplus(2.0), (-1.0, 3.0)) == (0.0, 3.0 + math.log(2) / 2)
    assert image(nn.Softplus(), (1.0, 3.0)) == (1.0, 3.0 + math.log(2))


HARD_IMAGES: dict[str, tuple[nn.Module, Range]] = {
    "Softsign": (nn.Softsign(), EVERYTHING),  # inf / inf is NaN
    "ELU": (nn.ELU(-1.0), (-5.0, 1.0)),  # not monotone
    "Softplus": (nn.Softplus(threshold=0.5), (0.0, 0.51)),  # drops where its threshold switches to x
    "Softplus that is x above -2": (nn.Softplus(threshold=-2), (-4.0, -1.0)),
    "Softplus above": (nn.Softplus(threshold=0.5), (0.49, 0.6)),
    "Softplus below zero": (nn.Softplus(-1.0), (-3.0, 3.0)),  # a negative beta
    "RReLU": (nn.RReLU(0.1, 0.9).train(), (-4.0, 1.0)),  # a random slope each time
    "RReLU falling": (nn.RReLU(-0.9, 0.1).train(), (-4.0, 1.0)),
    "LeakyReLU falling": (nn.LeakyReLU(-2.0), (-4.0, 1.0)),
    "LeakyReLU below": (nn.LeakyReLU(0.5), (-4.0, -2.0)),
    "Threshold below": (nn.Threshold(1.0, -7.0), (-4.0, 0.0)),
    "Threshold across": (nn.Threshold(-2.0, 3.0), (-4.0, 1.0)),
    "Hardshrink everywhere": (nn.Hardshrink(-2.0), (1.0, 4.0)),
    "Softshrink above": (nn.Softshrink(2.0), (1.0, 4.0)),
    "Tanhshrink": (nn.Tanhshrink(), (-4.0, -2.0)),
    "clamp high": (clamp([0.0, -INF], [1.0, INF]), (5.0, 9.0)),  # one channel ends below the interval
    "clamp low": (clamp([3.0, -INF], [4.0, INF]), (-9.0, -5.0)),  # one channel ends above it
}


@pytest.mark.parametrize("name", HARD_IMAGES)
def test_an_image_holds_all_outputs_here_too(name: str) -> None:
    module, values = HARD_IMAGES[name]
    outputs = module(samples(values, 2))
    low, high = image(module, values)
    assert low <= outputs.min() and outputs.max() <= high


# -- facts of whole networks -------------------------------------------------------------------------------------------

LAYERS = st.one_of(
    activations(), activations(), activations(),
    st.builds(nn.MaxPool2d, st.just(3), st.integers(1, 2), st.integers(0, 1)),
    st.builds(lambda *a, counts: nn.AvgPool2d(*a, count_include_pad=counts), st.just(2), st.integers(1, 2),
              st.integers(0, 1), counts=st.booleans()),
    st.sampled_from((0.0, 0.5, -1.0, -3.0)).map(lambda factor: ChannelAffine(torch.tensor(factor, dtype=FLOAT64))),
    st.just(ChannelAffine(torch.tensor(2.0, dtype=FLOAT64), torch.tensor(-1.0, dtype=FLOAT64))),
    st.sampled_from((1, 2)).map(lambda stride: nn.Conv2d(6, 6, 3, stride, 1, dtype=FLOAT64)),
    st.builds(lambda: norm(4, 6, 0)),
    st.sampled_from((nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3), nn.ZeroPad2d(1), nn.ReflectionPad2d(1),
                     nn.ReplicationPad2d(1), nn.GroupNorm(2, 6, dtype=FLOAT64), nn.Dropout())),
)  # fmt: skip


class Program(nn.Module):
    """A chain of layers; behind each, a sum with the latest earlier value of its shape where ``sums`` says so."""

    def __init__(self, layers: list[nn.Module], sums: list[bool]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.sums = sums

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x]
        for layer, adds in zip(self.layers, self.sums, strict=True):
            values.append(layer(values[-1]))
            if adds:
                keeps = not isinstance(
                    layer,
                    nn.MaxPool2d
                    | nn.AvgPool2d
                    | nn.Conv2d
                    | nn.AdaptiveAvgPool2d
                    | nn.AdaptiveMaxPool2d
                    | nn.ZeroPad2d
                    | nn.ReflectionPad2d
                    | nn.ReplicationPad2d,
                )
                values.append(values[-1] + values[-2 if keeps else -1])
        return values[-1], torch.cat([values[-1], values[-1].relu()], 1)


class Recorder(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[fx.Node, object] = {}

    def run_node(self, n: fx.Node) -> object:
        self.values[n] = super().run_node(n)
        return self.values[n]


def test_every_value_lies_in_its_range_and_has_its_shape() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=80)
    @given(st.lists(st.tuples(LAYERS, st.booleans()), min_size=1, max_size=6))
    def check(steps: list[tuple[nn.Module, bool]]) -> None:
        gm = normalise(trace(Program([layer for layer, _ in steps], [adds for _, adds in steps]).eval()))
        x = signal(0, 6, 13, 12)
        annotate(gm, (x,))
        for scale in (1.0, 1e-2, 1e3):
            recorder = Recorder(gm)
            with torch.no_grad():
                recorder.run(x * scale)
            for node, value in recorder.values.items():
                if not isinstance(value, Tensor):
                    continue
                assert shape_of(node) == value.shape
                low, high = range_of(node)
                slack = 1e-12 * float(value.abs().max())
                assert low - slack <= value.min() and value.max() <= high + slack, node.format_node()
                seen["finite low"] += math.isfinite(low)
                seen["finite high"] += math.isfinite(high)
                seen["sum"] += is_sum(node) and math.isfinite(low)
                seen["cat"] += node.target is torch.cat and math.isfinite(low)

    check()
    assert min(seen[key] for key in ("finite low", "finite high", "sum", "cat")) >= 20, seen


def facts(module: nn.Module, x: Tensor | None) -> list[fx.Node]:
    """The nodes of ``module`` in normal form, annotated."""
    gm = normalise(trace(module.double().eval()))
    annotate(gm, None if x is None else (x,))
    return list(gm.graph.nodes)


@pytest.mark.parametrize(("module", "values", "expected"), [
    (nn.ReLU(), (-3.0, 2.0), (0.0, 2.0)), (nn.MaxPool2d(2), (1.0, 2.0), (1.0, 2.0)),
    (nn.AvgPool2d(2), (1.0, 2.0), (0.0, 2.0)), (nn.AvgPool2d(2), (-3.0, -2.0), (-3.0, 0.0)),
    (nn.ZeroPad2d(1), (1.0, 2.0), (0.0, 2.0)), (nn.ReflectionPad2d(1), (1.0, 2.0), (1.0, 2.0)),
    (nn.AdaptiveAvgPool2d(1), (1.0, 2.0), (1.0, 2.0)), (SizeGuard((3, 3), "why"), (1.0, 2.0), (1.0, 2.0)),
    (ChannelAffine(torch.tensor(-2.0)), (1.0, 3.0), (-6.0, -2.0)),
    (ChannelAffine(torch.tensor(2.0)), EVERYTHING, EVERYTHING),
    (ChannelAffine(torch.tensor(0.0)), EVERYTHING, (0.0, 0.0)),
    (ChannelAffine(torch.tensor(2.0), torch.tensor(1.0)), (0.0, 1.0), EVERYTHING),
    (ChannelAffine(torch.tensor([2.0, 3.0])), (0.0, 1.0), EVERYTHING),
    (nn.Conv2d(1, 1, 1), (0.0, 1.0), EVERYTHING), (nn.BatchNorm2d(1), (0.0, 1.0), EVERYTHING),
    (nn.AvgPool2d(2, divisor_override=1), (0.0, 6.0), EVERYTHING),
])  # fmt: skip
def test_module_range(module: nn.Module, values: Range, expected: Range) -> None:
    assert module_range(module, values) == expected


def test_a_pool_of_another_divisor_leaves_the_range() -> None:
    pool, x = nn.AvgPool2d(2, divisor_override=1), torch.full((1, 1, 2, 2), 6.0)
    assert pool(x).item() == 24.0
    low, high = module_range(pool, (0.0, 6.0))
    assert low <= 24.0 <= high


def test_channels_are_known_from_shapes_or_from_layers() -> None:
    x = signal(0, 3, 5, 5)
    chain = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 7)
    )
    assert [channels_of(node, 2) for node in facts(chain, x)[:5]] == [3, 4, 4, 4, 4]
    assert [channels_of(node, 2) for node in facts(chain, None)[:5]] == [None, 4, 4, 4, 4]
    assert channels_of(facts(chain, None)[5], 2) is None, "flattening changes the channels"
    features = facts(nn.Sequential(nn.Linear(3, 6), nn.GELU()), signal(0, 5, 3))
    assert [channels_of(node, 0) for node in features[:3]] == [3, 6, 6]
    assert [channels_of(node, 0) for node in facts(nn.Sequential(nn.Linear(3, 6), nn.GELU()), None)[1:3]] == [6, 6]


def test_without_example_inputs_there_are_ranges_but_no_shapes() -> None:
    nodes = facts(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.MaxPool2d(2)), None)
    assert all(shape_of(node) is None for node in nodes)
    assert [range_of(node) for node in nodes[:4]] == [EVERYTHING, EVERYTHING, (0.0, 6.0), (0.0, 6.0)]


def test_readers() -> None:
    nodes = facts(Program([nn.ReLU(), nn.Tanh()], [True, False]), None)
    assert [type(module_of(node)).__name__ for node in nodes if module_of(node)][:2] == ["ReLU", "Tanh"]
    assert module_of(nodes[0]) is None
    sums = [node for node in nodes if is_sum(node)]
    assert len(sums) == 1 and sums[0].target is operator.add and range_of(sums[0]) == EVERYTHING


JOINED = [
    (lambda a, b: a * b, (-2.0, 3.0), (0.0, 1.0), (-2.0, 3.0)),
    (lambda a, b: a * b, (-2.0, 3.0), (-5.0, 4.0), (-15.0, 12.0)),
    (lambda a, b: a * b, (0.0, math.inf), (0.0, 1.0), (0.0, math.inf)),
    (lambda a, b: a * b, (-math.inf, math.inf), (0.0, 0.0), (0.0, 0.0)),
    (lambda a, b: torch.cat((a, b), 1), (-2.0, 3.0), (0.0, 5.0), (-2.0, 5.0)),
]


@pytest.mark.parametrize("index", range(len(JOINED)))
def test_ranges_of_what_is_joined(index: int) -> None:
    function, *ranges, expected = JOINED[index]
    gm = normalise(trace(_Two(function, *ranges).eval()))
    annotate(gm, None)
    (last,) = list(gm.graph.nodes)[-1].all_input_nodes
    assert range_of(last) == expected


class _Two(nn.Module):
    """Two inputs within ranges, and a function of them."""

    def __init__(self, function: Any, first: tuple[float, float], second: tuple[float, float]) -> None:
        super().__init__()
        self.function = function
        self.low, self.high = (_clamp(*bounds) for bounds in (first, second))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(self.low(a), self.high(b))


def _clamp(low: float, high: float) -> nn.Module:
    if low == high:
        return nn.Sequential(nn.ReLU(), nn.Hardtanh(-1.0, 0.0))
    return nn.Hardtanh(low, high)


MOVED = [
    (ChannelSlice(0, 1), (1.0, 2.0)), (ChannelPad(0, 1), (0.0, 2.0)), (nn.ChannelShuffle(2), (1.0, 2.0)),
    (nn.CircularPad2d(1), (1.0, 2.0)), (nn.ConstantPad2d(1, 9.0), (1.0, 9.0)), (nn.ZeroPad2d(1), (0.0, 2.0)),
    (nn.Upsample(scale_factor=2), (1.0, 2.0)), (nn.Upsample(scale_factor=2, mode="bilinear"), (1.0, 2.0)),
    (nn.Upsample(scale_factor=2, mode="bicubic"), (-math.inf, math.inf)),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(MOVED)))
def test_ranges_of_what_is_moved(index: int) -> None:
    module, expected = MOVED[index]
    assert module_range(module, (1.0, 2.0)) == expected
    values = module(torch.rand(2, 4, 5, 5, dtype=torch.float64) + 1)
    assert expected[0] <= values.min() and values.max() <= expected[1]


def test_channels_of_what_picks_channels() -> None:
    conv = nn.Conv2d(4, 6, 1)
    for module, channels in ((ChannelSlice(1, 2), 2), (ChannelPad(1, 2), 9), (nn.ReflectionPad2d(1), 6)):
        gm = normalise(trace(nn.Sequential(conv, module).eval()))
        assert channels_of(list(gm.graph.nodes)[-2], 2) == channels
