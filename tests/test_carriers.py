"""How tensors are carried, and what it costs: the paper's counts, grouped forms, one layer type per carrier."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from front import Lambda, hostile, operations
from nets import Residual, Sum, basic, behind_linear_stem, behind_stem, bottleneck, cbn, cbr, conv, inverted
from oracle import assert_equivalent, assert_equivalent_on
from torch import fx, nn

import rmfx
from rmfx.hostile import randomise
from rmfx.modules import ChannelClamp, MaskedActivation

SHAPE = (2, 3, 8, 8)


def converted_of(
    model: nn.Module, shape: tuple[int, ...] = SHAPE, **options: object
) -> tuple[nn.Module, fx.GraphModule]:
    """The model with hostile weights, and its conversion, proven equal; one connection is removed."""
    x = hostile(*shape)
    model = randomise(model.double(), x / 8)
    converted = rmfx.convert(model, x, verify=False, **options)  # type: ignore[arg-type]
    report = rmfx.report(converted)
    assert (report.count("removed"), report.count("refused")) == (1, 0)
    assert_equivalent_on(model, converted, shape)
    return model, converted


def convs(converted: fx.GraphModule) -> list[tuple[int, int, int]]:
    """(in, out, groups) of every convolution behind the stem."""
    found = [m for m in converted.modules() if isinstance(m, nn.Conv2d)]
    return [(m.in_channels, m.out_channels, m.groups) for m in found[1:]]


def layers(converted: fx.GraphModule, cls: type[nn.Module]) -> list[nn.Module]:
    return [module for module in converted.modules() if type(module) is cls]


# -- the paper's Figure 2 ---------------------------------------------------------------------------------------------


def downsample(c: int, signed: bool) -> nn.Module:
    """A basic block from c to 2c channels without biases and norms."""
    branch = nn.Sequential(conv(c, 2 * c, 3, 2), nn.ReLU(), conv(2 * c, 2 * c))
    stem = (conv(3, c),) if signed else (conv(3, c), nn.ReLU())
    return nn.Sequential(*stem, Residual(branch, conv(c, 2 * c, 1, 2)))


def weights(converted: fx.GraphModule) -> int:
    """Weights of the block's convolutions, without the stem's."""
    found = [m.weight.numel() for m in converted.modules() if isinstance(m, nn.Conv2d)]
    return sum(found[1:])


@pytest.mark.parametrize("c", [2, 4, 6])
def test_figure_2a(c: int) -> None:
    _, converted = converted_of(downsample(c, signed=False), downsample="conv")
    slopes = sum(m.weight.numel() for m in converted.modules() if isinstance(m, nn.PReLU))
    assert (weights(converted), slopes) == (108 * c * c, 4 * c)
    (entry,) = rmfx.report(converted).entries
    assert (entry.carrier, entry.params_before, entry.params_after) == ("masked", 56 * c * c, 108 * c * c + 4 * c)


@pytest.mark.parametrize("c", [2, 4, 6])
def test_figure_2b(c: int) -> None:
    _, converted = converted_of(downsample(c, signed=False), downsample="input")
    assert weights(converted) == 81 * c * c and not layers(converted, nn.PReLU)
    (entry,) = rmfx.report(converted).entries
    assert (entry.carrier, entry.params_before, entry.params_after) == ("direct", 56 * c * c, 81 * c * c)
    _, signed = converted_of(downsample(c, signed=True), downsample="input", fuse="cheaper")
    assert rmfx.report(signed).entries[0].params_after == 81 * c * c + 3 * c


@pytest.mark.parametrize("shape", [SHAPE, None])
def test_the_default_is_the_cheaper_of_both(shape: tuple[int, ...] | None) -> None:
    model = downsample(4, signed=False).double().eval()
    x = None if shape is None else hostile(*shape)
    chosen, cheap, dear = (
        rmfx.report(rmfx.convert(model, x, downsample=wish)).entries[0] for wish in ("cheaper", "input", "conv")
    )
    assert chosen == cheap and chosen.params_after < dear.params_after


def test_the_cheaper_one_may_be_figure_2a() -> None:
    """Where the shortcut narrows, S(x) has fewer channels than x."""
    model = nn.Sequential(
        conv(3, 16), nn.ReLU(), Residual(nn.Sequential(conv(16, 4, 3, 2), nn.ReLU(), conv(4, 4)), conv(16, 4, 1, 2))
    )
    _, converted = converted_of(model)
    assert convs(converted) == [(16, 8, 1), (8, 4, 1)]


def test_macs_of_a_place_are_those_of_its_layers() -> None:
    _, converted = converted_of(downsample(4, signed=False))
    (entry,) = rmfx.report(converted).entries
    assert entry.macs_before == (4 * 8 * 9 + 8 * 8 * 9 + 4 * 8) * 16
    assert entry.macs_after == 81 * 16 * 16
    totals = rmfx.report(converted).totals
    stem = 3 * 4 * 9 * 64
    assert (totals.macs_before, totals.macs_after) == (entry.macs_before + stem, entry.macs_after + stem)


# -- grouped forms ----------------------------------------------------------------------------------------------------


def narrow(width: int, groups: int, c: int = 16, c_out: int | None = None, stride: int = 1) -> nn.Module:
    """A bottleneck from c to c_out channels with a 3x3 of ``width`` channels in ``groups``."""
    c_out = c_out or c
    branch = nn.Sequential(cbr(c, width, 1), cbr(width, width, 3, stride, groups=groups), cbn(width, c_out, 1))
    return nn.Sequential(*cbr(3, c), Residual(branch, None if c == c_out else cbn(c, c_out, 1, stride)))


GROUPED = {
    "ResNet-50": (narrow(4, 1), [(16, 20, 1), (20, 20, 5), (20, 16, 1)]),
    "ResNet-50, downsampling": (narrow(4, 1, c_out=32, stride=2), [(16, 20, 1), (20, 20, 5), (20, 32, 1)]),
    "ResNeXt": (narrow(8, 2), [(16, 24, 1), (24, 24, 6), (24, 16, 1)]),
    "ResNeXt, downsampling": (narrow(8, 4, c_out=32, stride=2), [(16, 24, 1), (24, 24, 12), (24, 32, 1)]),
    "RegNet, width 10 in groups of 4": (narrow(8, 2, c=10), [(10, 20, 1), (20, 20, 5), (20, 10, 1)]),
    "width 7 in groups of 3": (narrow(9, 3, c=7), [(7, 18, 1), (18, 18, 6), (18, 7, 1)]),
    "MobileNet": (
        behind_linear_stem(lambda: inverted(act=nn.ReLU), 4)(),
        [(4, 16, 1), (16, 16, 16), (16, 4, 1)],
    ),
    "grouped first and last": (
        nn.Sequential(*cbr(3, 8), Residual(nn.Sequential(cbr(8, 8, groups=4), cbn(8, 8, groups=4)))),
        [(8, 16, 4), (16, 8, 4)],
    ),
}


@pytest.mark.parametrize("name", GROUPED)
def test_middle_layers_are_grouped(name: str) -> None:
    model, expected = GROUPED[name]
    _, converted = converted_of(model)
    assert convs(converted) == expected


def test_a_resnet_50_bottleneck_costs_five_times_its_3x3() -> None:
    _, converted = converted_of(narrow(4, 1))
    (entry,) = rmfx.report(converted).entries
    before, after = 16 * 4 + 4 * 4 * 9 + 4 * 16, 16 * 20 + 5 * 4 * 4 * 9 + 20 * 16
    assert (entry.macs_before, entry.macs_after) == (before * 64, after * 64)


def test_channels_that_fill_up_a_group_are_dead() -> None:
    _, converted = converted_of(narrow(8, 2, c=10))
    first, middle, last = (m for m in converted.modules() if isinstance(m, nn.Conv2d) and m.in_channels != 3)
    dead = (first.weight.flatten(1) == 0).all(1) & (first.bias == 0)
    assert int(dead.sum()) == 2
    assert (last.weight[:, dead] == 0).all() and (middle.bias[dead] == 0).all()


# -- one layer type per carrier ---------------------------------------------------------------------------------------


def test_direct_keeps_the_activation() -> None:
    _, converted = converted_of(behind_stem(basic, 6)())
    assert operations(converted) == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d", "ReLU"]
    assert rmfx.report(converted).entries[0].carrier == "direct"


def test_direct_through_relu6_needs_both_bounds() -> None:
    """What a ReLU has made may exceed 6, what a ReLU6 has made may not."""
    for act, expected in ((nn.ReLU6(), "direct"), (nn.ReLU(), "masked")):
        model = nn.Sequential(conv(3, 4), act, Residual(nn.Sequential(conv(4, 4), nn.ReLU6(), conv(4, 4))))
        _, converted = converted_of(model)
        assert rmfx.report(converted).entries[0].carrier == expected


def test_masked_relu_is_a_prelu_with_slopes_0_and_1() -> None:
    _, converted = converted_of(behind_linear_stem(basic, 6)())
    (prelu,) = layers(converted, nn.PReLU)
    assert prelu.weight.tolist() == [0.0] * 6 + [1.0] * 6 and not prelu.weight.requires_grad


def test_masked_leaky_relu_keeps_its_slope() -> None:
    model = nn.Sequential(conv(3, 4), Residual(nn.Sequential(conv(4, 4), nn.LeakyReLU(0.2), conv(4, 4))))
    _, converted = converted_of(model)
    (prelu,) = layers(converted, nn.PReLU)
    assert prelu.weight.tolist() == [0.2] * 4 + [1.0] * 4


def test_masked_relu6_is_a_clamp_per_channel() -> None:
    _, converted = converted_of(behind_linear_stem(inverted, 4)())
    assert [type(m).__name__ for m in converted.modules() if "PReLU" in type(m).__name__] == []
    for clamp in layers(converted, ChannelClamp):
        assert sorted(clamp.low.tolist()) == [-math.inf] * 4 + [0.0] * 12
        assert sorted(clamp.high.tolist()) == [6.0] * 12 + [math.inf] * 4
    assert len(layers(converted, ChannelClamp)) == 2


@pytest.mark.parametrize("act", [nn.Hardswish, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.ELU, nn.SELU])
def test_any_other_activation_is_masked(act: type[nn.Module]) -> None:
    _, converted = converted_of(behind_linear_stem(lambda: inverted(act=act), 4)())
    masks = layers(converted, MaskedActivation)
    assert [int(m.mask.sum()) for m in masks] == [12, 12] and all(type(m.activation) is act for m in masks)
    assert convs(converted)[1] == (16, 16, 16)


def test_two_activations_side_by_side_take_two_steps() -> None:
    model = Sum(*(nn.Sequential(conv(3, 4), act, conv(4, 4)) for act in (nn.ReLU(), nn.Tanh())), act=nn.Identity())
    _, converted = converted_of(model)
    assert sorted(operations(converted)[1:-1]) == ["MaskedActivation", "PReLU"]
    assert rmfx.report(converted).entries[0].carrier == "masked"


@pytest.mark.parametrize(
    ("c", "block", "before", "after"),
    [
        (6, lambda: basic(6), 6 + 6, 6 + 12),
        (8, lambda: bottleneck((1, 1, 1), c_out=8), 4 + 8, 4 + 16),
        (6, lambda: inverted(6, act=nn.ReLU), 12 + 6, 12 + 12),
    ],
)
def test_split_doubles_the_carried_channels(c: int, block: object, before: int, after: int) -> None:
    make = behind_linear_stem(block, c)  # type: ignore[arg-type]
    _, masked = converted_of(make(), carrier="masked")
    _, split = converted_of(make(), carrier="split")
    assert convs(masked)[0][:2] == (c, before) and convs(split)[0][:2] == (c, after)
    assert layers(masked, nn.PReLU) and not layers(split, nn.PReLU)
    assert "split" in (rmfx.report(split).entries[0].carrier or "")


def test_split_is_not_used_where_direct_is_exact() -> None:
    _, converted = converted_of(behind_stem(basic, 6)(), carrier="split")
    assert rmfx.report(converted).entries[0].carrier == "direct"


@pytest.mark.parametrize("wish", ["conv", "input"])
def test_split_with_a_biased_shortcut(wish: str) -> None:
    converted_of(behind_linear_stem(lambda: basic(4, 8, 2), 4)(), carrier="split", downsample=wish)


def test_linear_layers_clamp_where_a_prelu_would_read_another_axis() -> None:
    x = hostile(4, 5, 6)
    model = Lambda(lambda m, x: x + m.b(m.a(x).relu()), a=nn.Linear(6, 8), b=nn.Linear(8, 6))
    randomise(model.double(), x / 8)
    converted = rmfx.convert(model, x)
    assert operations(converted) == ["Linear", "ChannelClamp", "Linear"]
    assert_equivalent(model, converted, hostile(7, 3, 6))


def test_an_elu_with_a_negative_alpha_proves_no_lower_bound() -> None:
    act = nn.ELU(-5.0)  # at most 5 far below zero, and 0 at zero
    model = nn.Sequential(conv(3, 4, 1), act, Residual(nn.Sequential(conv(4, 4), nn.Hardswish(), conv(4, 4))))
    _, converted = converted_of(model)
    assert rmfx.report(converted).entries[0].carrier == "masked"


def test_slopes_per_channel_beside_a_narrower_carried_tensor() -> None:
    branch = nn.Sequential(conv(4, 8), nn.PReLU(8), conv(8, 4))
    _, converted = converted_of(nn.Sequential(conv(3, 4), nn.ReLU(), Residual(branch)))
    assert rmfx.report(converted).entries[0].carrier == "direct"


def test_a_masked_block_inside_a_direct_one() -> None:
    inner = Residual(nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8)), act=nn.Identity())
    model = nn.Sequential(conv(3, 4), nn.ReLU(), Residual(nn.Sequential(conv(4, 8), inner, conv(8, 4))))
    x = hostile(*SHAPE)
    converted = rmfx.convert(randomise(model.double(), x / 8), x)
    assert rmfx.report(converted).count("removed") == 2
    assert_equivalent(model, converted, x)


def test_the_carrier_of_a_reduced_precision_model_is_exact_too() -> None:
    model, _ = converted_of(behind_linear_stem(inverted, 4)())
    converted = rmfx.convert(model.to(torch.bfloat16))
    assert all(m.low.dtype == torch.bfloat16 for m in layers(converted, ChannelClamp))


# -- split through smooth activations, and shift ----------------------------------------------------------------------

SPLITTING = {
    "LeakyReLU": nn.LeakyReLU,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "GELU, tanh": lambda: nn.GELU("tanh"),
    "Hardswish": nn.Hardswish,
}


@pytest.mark.parametrize("name", SPLITTING)
@pytest.mark.parametrize("c", [4, 5])
def test_smooth_activations_recombine_in_groups_of_two(name: str, c: int) -> None:
    """Behind each activation the pair is recombined: the depthwise convolution becomes one of groups of two."""
    model = behind_linear_stem(lambda: inverted(c, act=SPLITTING[name]), c)()
    _, converted = converted_of(model, carrier="split")
    width = 12 + 2 * c
    assert rmfx.report(converted).entries[0].carrier == "split"
    assert convs(converted) == [(c, width, 1), (width, width, width // 2), (width, c, 1)]
    assert not layers(converted, MaskedActivation)


def test_an_odd_width_beside_a_pair_gets_a_dead_channel() -> None:
    branch = nn.Sequential(conv(4, 7, 1), nn.SiLU(), conv(7, 7, 3, groups=7), nn.SiLU(), conv(7, 4, 1))
    _, converted = converted_of(nn.Sequential(conv(3, 4), Residual(branch)), carrier="split")
    assert convs(converted)[1] == (16, 16, 8)


def test_split_where_no_single_layer_masks() -> None:
    """One PReLU per position beside a carried tensor has no masked form, but a slope for all has a split one."""
    x = hostile(2, 5, 4)
    model = Lambda(lambda m, x: x + m.b(m.a(m.c(x)).relu()), a=nn.Linear(4, 6), b=nn.Linear(6, 4), c=nn.Linear(4, 4))
    converted = rmfx.convert(randomise(model.double(), x / 8), x, carrier="split")
    assert rmfx.report(converted).entries[0].carrier == "split"
    assert_equivalent(model, converted, x)


def bounded_block(act: nn.Module) -> nn.Module:
    """A linear bottleneck behind a convolution of what a ReLU6 has made: weights prove its bounds."""
    branch = nn.Sequential(conv(4, 8, 1), act, conv(8, 4, 1))
    return nn.Sequential(conv(3, 6), nn.ReLU6(), conv(6, 4, 1), Residual(branch))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1)])
def test_shift_by_bounds_that_weights_prove(act: nn.Module) -> None:
    _, converted = converted_of(bounded_block(act), carrier="shift", shift_bits=100)
    assert rmfx.report(converted).entries[0].carrier == "shift"
    assert [type(layer) for layer in converted.modules()].count(type(act)) >= 1
    assert not layers(converted, nn.PReLU) and not layers(converted, ChannelClamp)


def test_shift_without_bounds_is_refused() -> None:
    x = hostile(*SHAPE)
    model = randomise(behind_linear_stem(basic, 6)().double(), x / 8)
    (entry,) = rmfx.report(rmfx.convert(model, x, carrier="shift")).entries
    assert entry.status == "refused" and "pass value_ranges" in (entry.reason or "")


def test_shift_that_costs_too_many_bits_is_refused() -> None:
    x = hostile(*SHAPE)
    model = randomise(bounded_block(nn.ReLU()).double(), x / 8)
    (entry,) = rmfx.report(rmfx.convert(model, x, carrier="shift", shift_bits=0)).entries
    assert entry.status == "refused" and "bits of precision" in (entry.reason or "")


def test_shift_does_not_pass_a_padded_convolution_as_a_bias() -> None:
    """Decoding in front of zero padding would put the constant where the padding has none: Dirac taps carry it past."""
    branch = nn.Sequential(conv(4, 8, 3), nn.ReLU(), conv(8, 8, 3), nn.ReLU(), conv(8, 4, 3))
    model = nn.Sequential(conv(3, 6), nn.ReLU6(), conv(6, 4, 1), Residual(branch))
    _, converted = converted_of(model, carrier="shift", shift_bits=100)
    assert rmfx.report(converted).entries[0].carrier == "shift"


def test_shift_keeps_the_float32_error_small() -> None:
    """At most two bits are lost: the error grows at most four times."""
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    model = bounded_block(nn.ReLU()).eval()
    converted = rmfx.convert(model, x, carrier="shift", value_ranges=rmfx.bounds_from_data(model, [x]))
    assert rmfx.report(converted).entries[0].carrier == "shift"
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        errors = [float((net(x).double() - truth).square().mean().sqrt()) for net in (model, converted)]
    assert errors[1] <= 4 * errors[0]
