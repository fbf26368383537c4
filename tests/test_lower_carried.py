"""lower_carried: Dirac channels of a finished network become a shortcut, a part of one, or stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from front import Lambda
from nets import conv
from one_pass import Prepared, assert_fires, assert_parity, assert_refuses, assert_settled, assert_untouched
from oracle import assert_equivalent
from planted import Plant, Planted, both, chain
from torch import nn

from rmfx.graph.facts import annotate, module_of, shape_of
from rmfx.modules import ChannelAffine, ChannelClamp, MaskedActivation
from rmfx.passes.lower_carried import LowerCarried

RULE = LowerCarried()
CRC = "Conv2d ReLU Conv2d"


def dirac(layer: int, rows: Sequence[int], columns: Sequence[int], factor: float = 1.0) -> Plant:
    """Rows of a dense layer carry ``columns``, and nothing else; without bias."""

    def plant(model: nn.Module) -> None:
        weight, bias = model[layer].weight, model[layer].bias
        weight[list(rows)] = 0.0
        centre = tuple(size // 2 for size in weight.shape[2:])
        for row, column in zip(rows, columns, strict=True):
            weight[(row, column, *centre)] = factor
        if bias is not None:
            bias[list(rows)] = 0.0

    return plant


def merge(layer: int, columns: Sequence[int], factor: float = 1.0, tap: bool = True) -> Plant:
    """The first rows of a layer add ``columns`` up, one each; without ``tap``, they read them by random 1x1 weights."""

    def plant(model: nn.Module) -> None:
        weight = model[layer].weight
        centre = tuple(size // 2 for size in weight.shape[2:])
        read = weight[(slice(None), list(columns), *centre)].clone()
        weight[:, list(columns)] = 0.0
        if not tap:
            weight[(slice(None), list(columns), *centre)] = read
            return
        for row, column in enumerate(columns):
            weight[(row, column, *centre)] = factor

    return plant


def without(layer: int, columns: Sequence[int]) -> Plant:
    """The first four rows of a layer do not read ``columns``."""

    def plant(model: nn.Module) -> None:
        model[layer].weight[:4, list(columns)] = 0.0

    return plant


def deep(*plants: Plant, act: nn.Module | None = None) -> Planted:
    """Three layers with eight carried channels."""
    layers = (nn.ReLU(), conv(8, 12, 1, bias=True), act or nn.ReLU(), conv(12, 12, bias=True), act or nn.ReLU())
    carried = both(
        dirac(1, range(4, 12), range(8)),
        without(3, range(4, 12)),
        dirac(3, range(4, 12), range(4, 12)),
        merge(5, range(4, 12)),
    )
    names = f"ReLU {CRC} ReLU Conv2d"
    return Planted(
        chain(*layers, conv(12, 8, 1, bias=True)), before=names, after=f"{names} add", plant=both(carried, *plants),
        shape=(2, 8, 8, 7),
    )  # fmt: skip


REACH = range(4, 8)
IDENTITY = both(dirac(1, REACH, range(4)), merge(3, REACH))
BLOCK = (nn.ReLU(), conv(4, 8, bias=True), nn.ReLU(), conv(8, 4, bias=True))
SIGNED = nn.Hardtanh(-9.0, 9.0)
REFLECTED = nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")
MASK = torch.arange(8) < 4
BOUNDS = torch.where(MASK, 0.0, -torch.inf), torch.where(MASK, 6.0, torch.inf)


def slopes(index: int) -> Plant:
    """Slope 0 for the first four channels of a PReLU, 1 for the others."""
    return lambda model: model[index].weight.copy_((~MASK).double())


def minus(layer: int) -> Plant:
    """The second four of eight carried rows are the first times -1."""

    def plant(model: nn.Module) -> None:
        model[layer].weight[8:12] = -model[layer].weight[4:8]
        model[layer].bias[8:12] = -model[layer].bias[4:8]

    return plant


def signed(act: nn.Module, name: str, after: str, plant: Plant = lambda model: None) -> Planted:
    """A block behind a tensor of both signs."""
    return Planted(
        chain(SIGNED, conv(4, 8, bias=True), act, conv(8, 4, bias=True)),
        before=f"Hardtanh Conv2d {name} Conv2d", after=f"Hardtanh Conv2d {after} Conv2d add",
        plant=both(IDENTITY, plant),
    )  # fmt: skip


def split(act: nn.Module, k: float = 1.0) -> Planted:
    name = type(act).__name__
    return Planted(
        chain(SIGNED, conv(4, 12, bias=True), act, conv(12, 4, bias=True)),
        before=f"Hardtanh Conv2d {name} Conv2d", after=f"Hardtanh Conv2d {name} Conv2d add",
        plant=both(dirac(1, range(4, 8), range(4)), minus(1), merge(3, range(4, 8), 1 / k),
                   lambda m: m[3].weight[:, 8:].copy_(-m[3].weight[:, 4:8])),
    )  # fmt: skip


def block(
    after: str, *plants: Plant, layers: Sequence[nn.Module] = BLOCK, shape: Sequence[int] = (2, 4, 8, 7)
) -> Planted:
    names = " ".join(type(layer).__name__ for layer in layers)
    return Planted(chain(*layers), before=names, after=f"{names} {after}".strip(), plant=both(*plants), shape=(*shape,))


class Gated(nn.Module):
    """A factor that is 1 on the last four of eight channels, and computed from the first four."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.few, self.many = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.many(torch.relu(self.few(self.pool(x)))))


def gate(index: int, reads: int = 4) -> Plant:
    def plant(model: nn.Module) -> None:
        model[index].few.weight[:, reads:] = 0.0
        model[index].many.weight[4:] = 0.0
        model[index].many.bias[4:] = 40.0

    return plant


GATED = (nn.ReLU(), conv(4, 8, bias=True), nn.ReLU(), Gated(), conv(8, 4, bias=True))
SIDE = "AdaptiveAvgPool2d Conv2d ReLU Conv2d Sigmoid mul"
BLOCK_D = (nn.ReLU(), conv(4, 8, bias=True), nn.ReLU(), conv(8, 8, groups=8, bias=True), nn.ReLU(), conv(8, 4, 1))


def depthwise_dirac(model: nn.Module) -> None:
    model[3].weight[4:] = 0.0
    model[3].weight[4:, 0, 1, 1] = 1.0
    model[3].bias[4:] = 0.0


GROUPED = (nn.ReLU(), conv(4, 8, 1, bias=True), nn.ReLU(), conv(8, 8, groups=2, bias=True), nn.ReLU(), conv(8, 4, 1))


def grouped_dirac(model: nn.Module) -> None:
    """Two branch and two carried channels in each group of four."""
    model[1].weight[[2, 3, 6, 7]] = torch.eye(4).double()[:, :, None, None]
    model[1].bias[[2, 3, 6, 7]] = 0.0
    for row in (2, 3, 6, 7):
        model[3].weight[row] = 0.0
        model[3].weight[row, row % 4, 1, 1] = 1.0
    model[3].weight[[0, 1, 4, 5], 2:] = 0.0
    model[3].bias[[2, 3, 6, 7]] = 0.0


def averaging(layer: int, side: slice) -> Plant:
    """The last four of eight rows are means over four positions."""

    def plant(model: nn.Module) -> None:
        model[layer].weight[4:] = 0.0
        for channel in range(4):
            model[layer].weight[4 + channel, channel, side, side] = 0.25
        model[layer].bias[4:] = 0.0

    return plant


FIRES = {
    "identity": block("add", IDENTITY),
    "projection": block("Conv2d add", dirac(1, REACH, range(4)), merge(3, REACH, tap=False)),
    "a merge of 3x3": block("Conv2d add", dirac(1, REACH, range(4))),
    "scaled": block("ChannelAffine add", dirac(1, REACH, range(4)), merge(3, REACH, 0.3)),
    "almost the identity": block("ChannelAffine add", dirac(1, REACH, range(4), 1 + 1e-6), merge(3, REACH)),
    "projected first": Planted(
        chain(nn.ReLU(), conv(4, 8, bias=True), nn.PReLU(8), conv(8, 4, bias=True)),
        before="ReLU Conv2d PReLU Conv2d", after=f"ReLU {CRC} Conv2d add", plant=both(merge(3, REACH), slopes(2)),
    ),
    "some of the channels": block("ChannelAffine add", dirac(1, [4, 5], [0, 2]), merge(3, [4, 7, 5]),
                                  lambda m: m[3].weight[:, 7].fill_(0.0)),
    "the first channels": block("ChannelSlice ChannelPad add", dirac(1, [4, 5], [0, 1]), merge(3, [4, 5]),
                                layers=(nn.ReLU(), conv(4, 6, bias=True), nn.ReLU(), conv(6, 4, bias=True))),
    "all of a narrower tensor": block("ChannelPad add", IDENTITY,
                                      layers=(nn.ReLU(), conv(4, 8, bias=True), nn.ReLU(), conv(8, 6, bias=True))),
    "in another order": block("Conv2d add", dirac(1, REACH, [2, 0, 3, 1]), merge(3, REACH)),
    "strided first": block("MaxPool2d add", IDENTITY,
                           layers=(nn.ReLU(), conv(4, 8, stride=2, bias=True), nn.ReLU(), conv(8, 4, bias=True))),
    "strided last": block("MaxPool2d add", IDENTITY,
                          layers=(nn.ReLU(), conv(4, 8, bias=True), nn.ReLU(), conv(8, 4, stride=2, bias=True))),
    "averaged": block("AvgPool2d Conv2d add", averaging(1, slice(None)), merge(3, REACH, tap=False),
                      layers=(nn.ReLU(), nn.Conv2d(4, 8, 2, 2), nn.ReLU(), conv(8, 4, bias=True))),
    "averaged within a kernel of 3": block(
        "ZeroPad2d AvgPool2d Conv2d add", averaging(1, slice(1, 3)), merge(3, REACH, tap=False),
        layers=(nn.ReLU(), conv(4, 8, stride=2, bias=True), nn.ReLU(), conv(8, 4, bias=True)),
    ),
    "dilated": block("add", IDENTITY,
                     layers=(nn.ReLU(), conv(4, 8, dilation=2, bias=True), nn.ReLU(), conv(8, 4, dilation=3))),
    "reflected": block("add", IDENTITY,
                       layers=(nn.ReLU(), REFLECTED, nn.ReLU(), conv(8, 4))),
    "kernels of 5 and 1": block("add", IDENTITY,
                                layers=(nn.ReLU(), conv(4, 8, 5, bias=True), nn.ReLU(), conv(8, 4, 1))),
    "one dimension": block("add", IDENTITY, shape=(2, 4, 9),
                           layers=(nn.ReLU(), conv(4, 8, dim=1, bias=True), nn.ReLU(), conv(8, 4, dim=1, stride=1))),
    "one dimension, strided": block("MaxPool1d add", IDENTITY, shape=(2, 4, 9),
                                    layers=(nn.ReLU(), conv(4, 8, dim=1, stride=2, bias=True), nn.ReLU(),
                                            conv(8, 4, dim=1))),
    "three dimensions": block("MaxPool3d add", IDENTITY, shape=(2, 4, 5, 4, 3),
                              layers=(nn.ReLU(), conv(4, 8, dim=3, stride=2, bias=True), nn.ReLU(), conv(8, 4, dim=3))),
    "features": block("add", IDENTITY, shape=(9, 4),
                      layers=(nn.ReLU(), conv(4, 8, dim=0, bias=True), nn.ReLU(), conv(8, 4, dim=0))),
    "some features": block("ChannelSlice ChannelPad add", dirac(1, [4, 5], [1, 2]), merge(3, [4, 5]), shape=(9, 4),
                           layers=(nn.ReLU(), conv(4, 6, dim=0, bias=True), nn.ReLU(), conv(6, 4, dim=0))),
    "tokens": block("add", IDENTITY, shape=(9, 3, 4),
                    layers=(nn.ReLU(), conv(4, 8, dim=0, bias=True), nn.ReLU(), conv(8, 4, dim=0))),
    "slopes": signed(nn.PReLU(8), "PReLU", "ReLU", slopes(2)),
    "slopes that the others have, too": signed(
        nn.PReLU(8), "PReLU", "PReLU", both(slopes(2), lambda m: m[2].weight[:4].copy_(torch.arange(4) / 4))
    ),
    "clamps": signed(ChannelClamp(*(end.double() for end in BOUNDS)), "ChannelClamp", "ReLU6"),
    "masks": signed(MaskedActivation(nn.SiLU(), MASK), "MaskedActivation", "SiLU"),
    "split": split(nn.ReLU()),
    "split by another activation": split(nn.GELU()),
    "split by a leaky one": split(nn.LeakyReLU(0.5), 1.5),
    "shifted": Planted(
        chain(nn.Hardtanh(-2.0, 2.0), conv(4, 8, bias=True), nn.ReLU(), conv(8, 4, bias=True)),
        before=f"Hardtanh {CRC}", after=f"Hardtanh {CRC} add",
        plant=both(IDENTITY, lambda m: m[1].bias[4:].fill_(2.0)),
    ),
    "shifted and projected": Planted(
        chain(nn.Hardtanh(-2.0, 2.0), conv(4, 8, bias=True), nn.ReLU(), conv(8, 4, bias=True)),
        before=f"Hardtanh {CRC}", after=f"Hardtanh {CRC} ChannelAffine Conv2d add",
        plant=both(dirac(1, REACH, range(4)), lambda m: m[1].bias[4:].fill_(2.0)),
    ),
    "no activation": block("Conv2d add", dirac(0, REACH, range(4)),
                           layers=(conv(4, 8, bias=True), conv(8, 4, bias=True))),
    "three layers": deep(),
    "depthwise": block("add", dirac(1, REACH, range(4)), depthwise_dirac, merge(5, REACH), layers=BLOCK_D),
    "within groups": block("add", grouped_dirac, merge(5, [2, 3, 6, 7]), layers=GROUPED),
    "a gate": Planted(
        chain(*GATED), before=f"ReLU Conv2d ReLU {SIDE} Conv2d", after=f"ReLU Conv2d ReLU {SIDE} Conv2d add",
        plant=both(dirac(1, REACH, range(4)), gate(3), merge(4, REACH)), sized=True,
    ),
}  # fmt: skip


def widened(model: nn.Module) -> None:
    """The carried channels fill half of one group of two, and none of the other."""
    model[1].weight[[2, 3]] = torch.eye(4).double()[:2, :, None, None]
    model[1].bias[[2, 3]] = 0.0
    for row in (2, 3):
        model[3].weight[row] = 0.0
        model[3].weight[row, row, 1, 1] = 1.0
    model[3].weight[:2, 2:] = 0.0
    model[3].bias[[2, 3]] = 0.0


REFUSES = {
    "groups would differ": replace(
        block("", widened, merge(5, [2, 3]), layers=GROUPED),
        reason="beside a shortcut, the layers up to _5 would take 1.",
    ),
}

UNTOUCHED = {
    "nothing is carried": Planted(chain(*BLOCK)),
    "signed": Planted(chain(SIGNED, *BLOCK[1:]), plant=IDENTITY),
    "below the bound": Planted(
        chain(nn.Hardtanh(-2.0, 2.0), *BLOCK[1:]), plant=both(IDENTITY, lambda m: m[1].bias[4:].fill_(1.99))
    ),
    "beside the centre": Planted(
        chain(*BLOCK), plant=both(IDENTITY, lambda m: m[1].weight[4:].copy_(m[1].weight[4:].roll(1, 3)),
                                  lambda m: m[1].weight[4:, :, :, 0].fill_(-0.1))
    ),
    "halves that are not opposite": Planted(
        split(nn.ReLU()).build, plant=both(split(nn.ReLU()).plant, lambda m: m[3].weight[:, 8:].mul_(1 + 1e-9))
    ),
    "slopes near 1": Planted(
        chain(SIGNED, conv(4, 8, bias=True), nn.PReLU(8), conv(8, 4)), plant=both(
            IDENTITY, slopes(2), lambda m: m[2].weight[4:].fill_(1 - 1e-9)),
    ),
    "another reader": Planted(
        lambda: Lambda(lambda m, x: (lambda y: (m.b(y), y))(m.a(x.relu()).relu()), a=conv(4, 8, bias=True),
                       b=conv(8, 4)),
        plant=lambda m: IDENTITY([None, m.a, None, m.b]),
    ),
    "nothing but carried": Planted(
        chain(nn.ReLU(), conv(4, 4, 1, bias=True), nn.ReLU(), conv(4, 4, 1)), plant=dirac(1, range(4), range(4))
    ),
    "a norm between": Planted(
        chain(nn.ReLU(), conv(4, 8, bias=True), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)),
        plant=both(dirac(1, REACH, range(4)), merge(4, REACH)),
    ),
    "a gate of what is carried": Planted(
        chain(*GATED), plant=both(dirac(1, REACH, range(4)), gate(3, 8), merge(4, REACH)), sized=True
    ),
    "an average of what is carried": Planted(
        chain(nn.ReLU(), conv(4, 8, bias=True), nn.AvgPool2d(2), conv(8, 4)),
        plant=both(dirac(1, REACH, range(4)), merge(3, REACH)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_fires(case: Planted) -> None:
    assert_fires(case, RULE)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_parity(case: Planted) -> None:
    assert_parity(case, RULE)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_a_second_run_changes_nothing(case: Planted) -> None:
    assert_settled(case, RULE)


@pytest.mark.parametrize("case", REFUSES.values(), ids=list(REFUSES))
def test_refuses(case: Planted) -> None:
    assert_refuses(case, RULE)


@pytest.mark.parametrize("case", UNTOUCHED.values(), ids=list(UNTOUCHED))
def test_leaves_what_it_does_not_match(case: Planted) -> None:
    assert_untouched(case, RULE)


def sizes(case: Planted) -> list[tuple[int, ...]]:
    """The weights that the pass leaves, by shape."""
    prepared = Prepared(case)
    prepared.run(RULE)
    layers = [module_of(node) for node in prepared.gm.graph.nodes]
    return [tuple(layer.weight.shape) for layer in layers if isinstance(layer, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(
    ("name", "left"),
    {
        "identity": [(4, 4, 3, 3), (4, 4, 3, 3)],
        "projection": [(4, 4, 3, 3), (4, 4, 3, 3), (4, 4, 1, 1)],
        "three layers": [(4, 8, 1, 1), (4, 4, 3, 3), (8, 4, 1, 1)],
        "depthwise": [(4, 4, 3, 3), (4, 1, 3, 3), (4, 4, 1, 1)],
        "within groups": [(4, 4, 1, 1), (4, 2, 3, 3), (4, 4, 1, 1)],
        "a gate": [(4, 4, 3, 3), (2, 4, 1, 1), (4, 2, 1, 1), (4, 4, 3, 3)],
    }.items(),
)
def test_widths(name: str, left: list[tuple[int, ...]]) -> None:
    assert sizes(FIRES[name]) == left


@pytest.mark.parametrize(
    "change", [lambda m: m[3].bias[6].fill_(0.5), lambda m: m[3].weight[6, 6, 1, 1].fill_(1 + 1e-6)]
)
def test_a_channel_that_is_almost_carried_is_not_taken_for_one(change: Plant) -> None:
    """It stays behind, and then has a shortcut of its own, with its own factor or constant."""
    case = deep(change)
    assert sizes(case)[:3] == [(5, 8, 1, 1), (5, 5, 3, 3), (8, 5, 1, 1)]
    prepared = Prepared(case)
    sweeps = [prepared.run(RULE).changed for _ in range(3)]
    assert sweeps == [True, True, False]
    assert_equivalent(prepared.model, prepared.emitted(), prepared.x)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_shapes_are_those_of_the_new_layers(case: Planted) -> None:
    prepared = Prepared(replace(case, sized=True))
    assert prepared.run(RULE).changed
    noted = {node: shape_of(node) for node in prepared.gm.graph.nodes}
    prepared.emitted()
    annotate(prepared.gm, (prepared.x,))
    assert noted == {node: shape_of(node) for node in prepared.gm.graph.nodes}


@pytest.mark.parametrize("sized", [False, True])
def test_what_it_says_to_save_is_what_it_saves(sized: bool) -> None:
    (applied,) = Prepared(replace(FIRES["identity"], sized=sized)).run(RULE).applied
    positions = 56 if sized else 1
    assert (applied.price.macs_before, applied.price.macs_after) == (576 * positions, 288 * positions)
    assert (applied.price.params_before, applied.price.params_after) == (576 + 12, 288 + 8)


def test_what_trains_still_does() -> None:
    prepared = Prepared(FIRES["scaled"])
    prepared.run(RULE)
    emitted = prepared.emitted()
    assert any(isinstance(module, ChannelAffine) for module in emitted.modules())
    assert all(p.requires_grad and p.dtype == torch.float64 for p in emitted.parameters())


def test_of_nested_runs_the_outer_one_goes_first() -> None:
    """Channels 4 to 7 are carried over both activations, 8 to 11 over the first one."""
    layers = (nn.ReLU(), conv(4, 12, bias=True), nn.ReLU(), conv(12, 8, bias=True), nn.ReLU(), conv(8, 4, bias=True))
    inner, outer = (
        both(dirac(1, range(8, 12), range(4)), merge(3, range(8, 12))),
        both(dirac(1, REACH, range(4)), without(3, REACH), dirac(3, REACH, REACH), merge(5, REACH)),
    )
    case = Planted(chain(*layers), plant=both(inner, outer))
    prepared = Prepared(case)
    ends = [applied.node for _ in range(2) for applied in prepared.run(RULE).applied]
    assert ends == ["_5", "_3_1"]
    hasty = Prepared(case)
    assert [applied.node for applied in hasty.run(LowerCarried(patient=False)).applied] == ["_3", "_5"]  # past a sum
    for one in (prepared, hasty):
        assert_equivalent(one.model, one.emitted(), one.x)
