"""Activations: where they are the identity, when two are alike, and how several become one layer.

What they do to ranges of values is in ``test_facts.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_affine import signal
from torch import Tensor, nn

from rmfx.algebra.pointwise import (
    CARRIED,
    POINTWISE,
    Part,
    Range,
    combine,
    identity_norm,
    identity_range,
    image,
    is_identity_on,
    is_per_channel,
    is_pointwise,
    same_function,
    split_constant,
    split_is_stable,
)
from rmfx.modules import ChannelAffine, ChannelClamp, Elementwise, MaskedActivation, along_channels

INF = math.inf
FLOAT64 = torch.float64


def prelu(*slopes: float) -> nn.PReLU:
    """A PReLU with these slopes, in float64."""
    layer = nn.PReLU(len(slopes), dtype=FLOAT64)
    layer.weight.data = torch.tensor(slopes, dtype=FLOAT64)
    return layer.requires_grad_(False)


def clamp(low: list[float], high: list[float], axis: int = 1) -> ChannelClamp:
    """A clamp per channel, in float64."""
    return ChannelClamp(torch.tensor(low, dtype=FLOAT64), torch.tensor(high, dtype=FLOAT64), axis)


IDENTITIES: list[tuple[nn.Module, Range | None]] = [
    (nn.ReLU(), (0.0, INF)), (nn.LeakyReLU(0.3), (0.0, INF)), (prelu(-0.5), (0.0, INF)), (nn.ELU(2.0), (0.0, INF)),
    (nn.CELU(0.5), (0.0, INF)), (nn.ReLU6(), (0.0, 6.0)), (nn.Hardtanh(), (-1.0, 1.0)),
    (nn.Hardtanh(-2.5, 7.0), (-2.5, 7.0)), (nn.Hardswish(), (3.0, INF)),
    (clamp([-4.0, -INF, 1.0], [2.0, 9.0, INF]), (1.0, 2.0)),
    (MaskedActivation(nn.ReLU6(), torch.tensor([True, False])), (0.0, 6.0)),
    (nn.RReLU(), (0.0, INF)), (nn.Threshold(0.5, 0.5), (0.5, INF)),
    (nn.Threshold(-0.5, 3.0), None), (nn.Softplus(threshold=0.5), None),
    (Elementwise("square"), None), (Elementwise("pow", 1.5), None),
    *((cls(), None) for cls in (nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.SELU, nn.Softplus, nn.Hardsigmoid,
                                nn.Softsign, nn.Tanhshrink, nn.LogSigmoid, nn.Softshrink, nn.Hardshrink)),
]  # fmt: skip


def samples(values: Range, channels: int = 6) -> Tensor:
    """Finite numbers of the interval, its finite ends among them: ``[N, channels]``."""
    low, high = (max(values[0], -1e4), min(values[1], 1e4))
    near = torch.linspace(max(low, -9.0), max(min(high, 9.0), max(low, -9.0)), 301, dtype=FLOAT64)
    wide = torch.linspace(low, high, 101, dtype=FLOAT64)
    ends = torch.tensor([low, high], dtype=FLOAT64)
    return torch.cat([near, wide, ends]).clamp(low, high)[:, None].repeat(1, channels)


@pytest.mark.parametrize(("module", "inside"), IDENTITIES)
def test_identity_range(module: nn.Module, inside: Range | None) -> None:
    assert identity_range(module) == inside
    width = 3 if isinstance(module, ChannelClamp) else 2
    if inside is None:
        x = samples((-1.0, 1.0), width)
        assert not torch.allclose(module(x), x, atol=1e-3)
        return
    x = samples(inside, width)
    torch.testing.assert_close(module(x), x, rtol=1e-15, atol=0)
    for end, outwards in zip(inside, (-0.5, 0.5), strict=True):
        beyond = torch.full((1, width), end + outwards, dtype=FLOAT64)
        assert math.isinf(end) or not torch.allclose(module(beyond), beyond, rtol=1e-10, atol=0)


def test_is_identity_on() -> None:
    assert is_identity_on(nn.ReLU6(), (0.0, 6.0)) and is_identity_on(nn.ReLU(), (1.0, INF))
    assert not is_identity_on(nn.ReLU6(), (0.0, 6.1)) and not is_identity_on(nn.ReLU(), (-1e-9, 1.0))
    assert not is_identity_on(nn.GELU(), (0.0, 1.0))


SPLITTING = [
    (nn.ReLU(), 1.0), (nn.SiLU(), 1.0), (nn.GELU(), 1.0), (nn.GELU("tanh"), 1.0), (nn.Hardswish(), 1.0),
    (nn.LogSigmoid(), 1.0), (nn.LeakyReLU(0.2), 1.2), (nn.LeakyReLU(-0.5), 0.5), (nn.LeakyReLU(1.0), 2.0),
    (prelu(0.25), 1.25), (prelu(-3.0), -2.0), (nn.RReLU(0.1, 0.3).eval(), 1.2),
]  # fmt: skip
NOT_SPLITTING = [
    nn.ReLU6(), nn.Mish(), nn.ELU(), nn.Softplus(), nn.CELU(), nn.SELU(), nn.Hardtanh(), nn.Sigmoid(), nn.Tanh(),
    nn.Hardsigmoid(), nn.Softsign(), nn.Softshrink(), nn.Hardshrink(), nn.Tanhshrink(), nn.Threshold(0.5, 0.0),
    MaskedActivation(nn.ReLU6(), torch.ones(6, dtype=torch.bool)), clamp([0.0] * 6, [6.0] * 6), Elementwise("sin"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "k"), SPLITTING)
def test_what_may_be_split(module: nn.Module, k: float) -> None:
    assert split_constant(module) == pytest.approx(k, rel=1e-15)

    @given(st.floats(-1e6, 1e6))
    def recombines(t: float) -> None:
        pair = module(torch.tensor([[t], [-t]], dtype=FLOAT64)).flatten()
        assert abs(float(pair[0] - pair[1]) - k * t) <= 1e-14 * max(1.0, abs(t))

    recombines()


@pytest.mark.parametrize("module", NOT_SPLITTING)
def test_what_may_not_be_split(module: nn.Module) -> None:
    t = samples((-40.0, 40.0))
    odd = module(t) - module(-t)
    assert split_constant(module) is None
    assert not torch.allclose(odd, t * odd[-1] / t[-1], rtol=0, atol=1e-10), "no k fits"


def test_what_has_no_single_k_may_not_be_split() -> None:
    assert split_constant(prelu(0.1, 0.2)) is None, "several slopes"
    assert split_constant(nn.RReLU()) is None, "a random slope in training"
    for module in (nn.LeakyReLU(-1.0), prelu(-1.0)):
        assert split_constant(module) is None, "|t| forgets the sign of t"
    assert split_constant(nn.PReLU(device="meta")) is None, "a slope that is not known"
    assert split_constant(type("Louder", (nn.ReLU,), {})()) is None, "another forward"


@pytest.mark.parametrize("module", [module for module, _ in SPLITTING])
def test_a_stable_pair_passes_again(module: nn.Module) -> None:
    once = [module(sign * samples((-9.0, 9.0))) for sign in (1, -1)]
    unchanged = all(torch.allclose(module(half), half, rtol=0, atol=1e-12) for half in once)
    assert unchanged or not split_is_stable(module)
    falling = isinstance(module, nn.LeakyReLU) and module.negative_slope < 0  # makes what is positive, as a ReLU does
    assert split_is_stable(module) == (type(module) is nn.ReLU or falling)


def test_what_cannot_be_split_is_not_stable() -> None:
    assert not split_is_stable(nn.ReLU6()), "although a ReLU6 changes nothing that it has made"


def test_every_activation_of_torch_is_known_or_mixes_elements() -> None:
    mixing = {nn.GLU, nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax}
    exported = {getattr(nn, name) for name in nn.modules.activation.__all__}
    assert exported - mixing == {cls for cls in POINTWISE if cls.__module__ == "torch.nn.modules.activation"}


@pytest.mark.parametrize("function", sorted(Elementwise.FUNCTIONS - {"pow"}))
def test_functions_of_single_elements(function: str) -> None:
    layer, x = Elementwise(function), samples((-3.0, 3.0))
    assert torch.equal(layer(x).nan_to_num(), getattr(torch, function)(x).nan_to_num())
    low, high = image(layer, (-3.0, 3.0))
    assert bool(((layer(x) >= low) & (layer(x) <= high) | layer(x).isnan()).all())
    assert bool(layer(torch.zeros(1)).isfinite()), "channels that nothing reads hold zeros"


def test_functions_that_there_are_not() -> None:
    for function, exponent in (("log", None), ("relu", None), ("pow", None), ("pow", -1), ("pow", 0), ("square", 2)):
        with pytest.raises(ValueError, match="no function of single elements that is finite at 0"):
            Elementwise(function, exponent)


def test_is_pointwise_goes_by_the_exact_type() -> None:
    assert all(is_pointwise(cls.__new__(cls)) for cls in POINTWISE)
    assert not is_pointwise(type("Louder", (nn.ReLU,), {})())
    for module in (nn.Softmax(1), nn.BatchNorm2d(2), nn.Conv2d(1, 1, 1), nn.GLU(), ChannelAffine(torch.tensor(2.0))):
        assert not is_pointwise(module)


def test_same_function() -> None:
    same = [(nn.ReLU(), nn.ReLU()), (nn.GELU("tanh"), nn.GELU("tanh")), (prelu(0.1, 0.2), prelu(0.1, 0.2)),
            (clamp([0.0], [1.0]), clamp([0.0], [1.0])), (nn.BatchNorm2d(2), nn.BatchNorm2d(2))]  # fmt: skip
    assert all(same_function(first, second) for first, second in same)
    other = [(nn.ReLU(), nn.ReLU6()), (nn.ReLU6(), nn.Hardtanh(0.0, 6.0)),
             (nn.GELU(), nn.GELU("tanh")),
             (nn.ELU(1.0), nn.ELU(1.5)), (nn.LeakyReLU(0.1), nn.LeakyReLU(0.10001)), (prelu(0.1), prelu(0.2)),
             (nn.Softplus(1.0), nn.Softplus(2.0)), (nn.Hardtanh(0, 1), nn.Hardtanh(0, 2)),
             (prelu(0.1), prelu(0.1, 0.1)), (clamp([0.0], [1.0]), clamp([0.0], [2.0])),
             (clamp([0.0], [1.0]), clamp([0.0], [1.0], axis=-1)), (nn.BatchNorm2d(2), nn.BatchNorm2d(2, eps=1e-3)),
             (nn.Softshrink(0.5), nn.Softshrink(0.4)), (nn.CELU(1.0), nn.CELU(2.0))]  # fmt: skip
    assert not any(same_function(first, second) for first, second in other)


def test_masks_of_different_activations_differ() -> None:
    assert not same_function(*(MaskedActivation(act, torch.tensor([True])) for act in (nn.GELU(), nn.SiLU())))


# -- several activations as one ----------------------------------------------------------------------------------------

Maker = Callable[[int, int], nn.Module | None]
UNIFORM_ONLY = (nn.Sigmoid,)  # does not keep 0 at 0: as it is, on all channels, dead ones too
MAKERS: dict[str, Maker] = {
    "identity": lambda width, axis: None, "ReLU": lambda width, axis: nn.ReLU(),
    "ReLU6": lambda width, axis: nn.ReLU6(), "Hardtanh": lambda width, axis: nn.Hardtanh(-2.1, 1.3),
    "LeakyReLU": lambda width, axis: nn.LeakyReLU(0.3), "PReLU": lambda width, axis: prelu(0.25),
    "PReLUs": lambda width, axis: prelu(*(0.1 * i - 0.5 for i in range(width))),
    "clamp": lambda width, axis: clamp([-1.0 - i for i in range(width)], [2.0 + i for i in range(width)], axis),
    "masked": lambda width, axis: MaskedActivation(nn.GELU(), torch.arange(width) % 2 == 0, axis),
    "Hardswish": lambda width, axis: nn.Hardswish(), "SiLU": lambda width, axis: nn.SiLU(),
    "GELU": lambda width, axis: nn.GELU(), "ELU": lambda width, axis: nn.ELU(0.5),
    "Sigmoid": lambda width, axis: nn.Sigmoid(), "square": lambda width, axis: Elementwise("square"),
}  # fmt: skip
KINDRED = [("identity", "ReLU", "LeakyReLU", "PReLU", "PReLUs"), ("identity", "ReLU", "ReLU6", "Hardtanh", "clamp"),
           *(("identity", name) for name in MAKERS if name != "identity"), ("identity", "GELU", "masked"),
           tuple(MAKERS)]  # fmt: skip


@st.composite
def partitions(draw: st.DrawFn, axis: int) -> tuple[list[Part], int]:
    """Disjoint channel sets with activations, one at least not ``None``, and the width of the stack."""
    family = draw(st.sampled_from([[n for n in kin if axis == 1 or n != "PReLUs"] for kin in KINDRED]))
    names = draw(st.lists(st.sampled_from(family), min_size=1, max_size=3).filter(lambda n: set(n) != {"identity"}))
    widths = [draw(st.integers(1, 3)) for _ in names]
    channels = sum(widths) + draw(st.integers(0, 2))
    order = torch.tensor(draw(st.permutations(range(channels))))
    starts = [sum(widths[:i]) for i in range(len(widths))]
    spans = zip(names, starts, widths, strict=True)
    return [Part(MAKERS[name](width, axis), order[start : start + width]) for name, start, width in spans], channels


def expected(part: Part, x: Tensor, axis: int) -> Tensor:
    """The part's own channels; what rounds is run on all of ``x``, as vectorised code rounds its own way."""
    own, activation = x.index_select(axis, part.positions), part.activation
    if activation is None:
        return own
    if isinstance(activation, MaskedActivation):
        inner = activation.activation(x).index_select(axis, part.positions)
        return torch.where(along_channels(activation.mask, x.dim(), axis), inner, own)
    if isinstance(activation, ChannelClamp | nn.PReLU):
        return activation(own)
    return activation(x).index_select(axis, part.positions)


@pytest.mark.parametrize("axis", [1, -1])
def test_combine_applies_each_activation_to_its_channels(axis: int) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=400)
    @given(partitions(axis))
    def check(drawn: tuple[list[Part], int]) -> None:
        parts, channels = drawn
        layer = combine(parts, channels, axis)
        seen[type(layer).__name__] += 1
        if layer is None:
            assert len({type(part.activation) for part in parts if part.activation is not None}) > 1 or axis == -1
            return
        assert all(layer is not part.activation for part in parts)
        x = torch.randn(2, 3, 5, channels, dtype=FLOAT64, generator=torch.Generator().manual_seed(channels)) * 8
        x = x.transpose(1, -1) if axis == 1 else x
        covered = torch.cat([part.positions for part in parts])
        dead = torch.tensor([i for i in range(channels) if i not in covered], dtype=torch.long)
        x = x.index_fill(axis, dead, 0.0)
        got = layer(x)
        for part in parts:
            assert torch.equal(got.index_select(axis, part.positions), expected(part, x, axis))
        assert not got.index_select(axis, dead).any() or isinstance(layer, UNIFORM_ONLY)
        seen["dead"] += len(dead) > 0

    check()
    wanted = ["NoneType", "ChannelClamp", "MaskedActivation", "ReLU", "GELU", "dead", *(["PReLU"] if axis == 1 else [])]
    assert min(seen[key] for key in wanted) >= 3, seen


def part(activation: nn.Module | None, *positions: int) -> Part:
    """A part of a stack."""
    return Part(activation, torch.tensor(positions))


def test_the_family_of_a_combination() -> None:
    slopes, masks = (nn.ReLU(), nn.LeakyReLU(0.1), prelu(0.1, 0.2)), (nn.SiLU(), nn.ELU(), nn.Hardswish(), nn.GELU())
    bounds = (nn.ReLU6(), nn.Hardtanh(), clamp([0.0] * 2, [1.0] * 2))
    for family, members in ((nn.PReLU, slopes), (ChannelClamp, bounds), (MaskedActivation, masks)):
        for activation in members:
            assert type(combine([part(activation, 0, 1), part(None, 2, 3)], 4, 1)) is family
    assert type(combine([part(nn.ReLU(), 0), part(None, 1)], 2, -1)) is ChannelClamp, "PReLU has no axis"
    assert combine([part(nn.ReLU(), 0), part(nn.SiLU(), 1)], 2, 1) is None
    assert combine([part(nn.ELU(1.0), 0), part(nn.ELU(2.0), 1)], 2, 1) is None
    assert combine([part(nn.ReLU6(), 0), part(prelu(0.1), 1)], 2, 1) is None
    assert combine([part(prelu(0.1, 0.2), 0, 1), part(None, 2)], 3, -1) is None, "PReLU has its channels in dimension 1"


def test_one_slope_for_all_channels_stays_one() -> None:
    layer = combine([part(prelu(0.2), 0, 1), part(prelu(0.2), 2)], 3, 1)
    assert isinstance(layer, nn.PReLU) and layer.num_parameters == 1 and not is_per_channel(layer)
    assert is_per_channel(prelu(0.2, 0.3))


def test_slopes_train_where_those_they_are_made_of_do() -> None:
    trains = nn.PReLU(dtype=FLOAT64)
    assert combine([part(trains, 0), part(None, 1)], 2, 1).weight.requires_grad
    assert not combine([part(prelu(0.2), 0), part(None, 1)], 2, 1).weight.requires_grad
    assert not combine([part(nn.ReLU(), 0), part(None, 1)], 2, 1).weight.requires_grad


def test_masks_of_one_channel_keep_their_activations() -> None:
    acts = nn.GELU(), nn.SiLU()
    layer = combine([part(MaskedActivation(act, torch.tensor([True])), i) for i, act in enumerate(acts)], 2, 1)
    x = torch.ones(2, 2, 3, dtype=FLOAT64)
    assert layer is None or torch.equal(layer(x), torch.cat([acts[0](x[:, :1]), acts[1](x[:, 1:])], 1))


# -- norms of the training form ----------------------------------------------------------------------------------------

NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def norm(rank: int, width: int, seed: int, affine: bool = True, **options: float) -> nn.Module:
    """A batch norm for tensors of ``rank`` dimensions with hostile statistics, in float64 and eval mode."""
    random = torch.Generator().manual_seed(seed)
    layer = NORMS[rank](width, affine=affine, dtype=FLOAT64, **options).eval().requires_grad_(False)
    layer.running_var.copy_(torch.rand(width, generator=random) * 9)
    for tensor in (layer.running_mean, *layer.parameters()):
        tensor.copy_(torch.randn(width, generator=random) * 5)
    return layer


@settings(max_examples=60)
@given(st.sampled_from(list(NORMS)), st.booleans(), st.text("ni", max_size=2), st.integers(0, 2), st.data())
def test_a_widened_norm_is_the_identity_on_what_it_carries(
    rank: int, affine: bool, others: str, dead: int, data: st.DataObject
) -> None:
    kinds = f"n{others}"
    channels = 2 * len(kinds) + dead
    order = torch.tensor(data.draw(st.permutations(range(channels))))
    normed = [norm(rank, 2, seed, affine, eps=0.02) if kind == "n" else None for seed, kind in enumerate(kinds)]
    parts = [Part(own, order[2 * i : 2 * i + 2]) for i, own in enumerate(normed)]
    layer = combine(parts, channels, data.draw(st.sampled_from((1, -1) if rank == 2 else (1,))))
    x = signal(rank, channels, *[3] * (rank - 2))
    want = x.clone()
    for own in parts:
        if own.activation is not None:
            want[:, own.positions] = own.activation(x[:, own.positions])
    assert type(layer) is NORMS[rank] and layer.eps == 0.02
    torch.testing.assert_close(layer.eval()(x), want, rtol=1e-13, atol=1e-13)
    acting = torch.cat([own.positions for own in parts if own.activation is not None]).tolist()
    assert layer.__dict__[CARRIED] == sorted(set(range(channels)) - set(acting))


def test_norms_that_do_not_fit_have_no_common_layer() -> None:
    first = norm(4, 2, 0)
    for other in (norm(4, 2, 1, eps=1e-3), norm(4, 2, 1, momentum=0.5), norm(5, 2, 1), nn.ReLU()):
        assert combine([part(first, 0, 1), part(other, 2, 3)], 4, 1) is None


def test_identity_norm() -> None:
    layer = identity_norm(norm(4, 2, 0, eps=0.3, momentum=0.7), 5)
    assert (type(layer), layer.eps, layer.momentum, layer.num_features) == (nn.BatchNorm2d, 0.3, 0.7, 5)
    x = signal(0, 5, 3, 3)
    torch.testing.assert_close(layer.eval()(x), x, rtol=1e-15, atol=0)
    assert layer.__dict__[CARRIED] == [0, 1, 2, 3, 4]


def test_norms_of_one_channel() -> None:
    layer = combine([part(nn.BatchNorm2d(1), 0), part(nn.BatchNorm2d(1), 1)], 2, 1)
    assert layer.num_features == 2
