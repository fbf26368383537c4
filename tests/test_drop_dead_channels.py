"""drop_dead_channels: what is never read and what is constant disappears between two layers."""

from __future__ import annotations

import pytest
import torch
from front import Lambda
from nets import conv
from one_pass import Prepared, assert_fires, assert_parity, assert_refuses, assert_settled, assert_untouched
from planted import Planted, both, chain, constant, dead, widths
from torch import nn

from rmfx.graph.facts import annotate, shape_of
from rmfx.modules import ChannelAffine, ChannelClamp, FeatureNorm, MaskedActivation
from rmfx.passes.drop_dead_channels import DropDeadChannels

RULE = DropDeadChannels()
FLOAT64 = torch.float64
CCC = "Conv2d ReLU Conv2d"
PADDED = (conv(4, 8, bias=True), nn.ReLU(), conv(8, 5, bias=True))
VALID = (conv(4, 8, bias=True), nn.ReLU(), nn.Conv2d(8, 5, 3))
DEPTHWISE = (conv(4, 8, 1, bias=True), nn.ReLU(), conv(8, 8, groups=8, bias=True), nn.ReLU6(), conv(8, 5, 1))


def same(layers: str) -> dict[str, str]:
    return {"before": layers, "after": layers}


FIRES = {
    "never read": Planted(chain(*PADDED), **same(CCC), plant=dead(2, [0, 3]), widths=(6, 5)),
    "zero": Planted(chain(*PADDED), **same(CCC), plant=constant(0, [1, 2], -1.0), widths=(6, 5)),
    "constants, padded": Planted(chain(*PADDED), **same(CCC), plant=constant(0, [1, 2, 7]), widths=(6, 5)),
    "constants, unpadded": Planted(chain(*VALID), **same(CCC), plant=constant(0, [1, 2, 7]), widths=(5, 5)),
    "constants into a layer without bias": Planted(
        chain(conv(4, 8, bias=True), nn.Sigmoid(), conv(8, 5, 1)),
        **same("Conv2d Sigmoid Conv2d"), plant=constant(0, [0, 5]), widths=(6, 5),
    ),
    "all of them": Planted(
        chain(*PADDED, nn.ReLU(), conv(5, 4)), **same(f"{CCC} ReLU Conv2d"),
        plant=both(constant(0, [1, 2], -1.0), constant(0, [3, 4, 5]), dead(2, [6])), widths=(3, 5, 4),
    ),
    "one stays": Planted(
        chain(*PADDED, nn.ReLU(), conv(5, 4)), **same(f"{CCC} ReLU Conv2d"),
        plant=both(constant(2, range(1, 5)), dead(2, range(8))), widths=(1, 1, 4),
    ),
    "reflection": Planted(
        chain(conv(4, 8, bias=True), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1, padding_mode="reflect")), **same(CCC),
        plant=constant(0, [1, 2]), widths=(6, 5),
    ),
    "through a depthwise layer": Planted(
        chain(*DEPTHWISE), **same("Conv2d ReLU Conv2d ReLU6 Conv2d"),
        plant=both(constant(0, [1], -3.0), dead(4, [2])), widths=(6, 6, 5),
    ),
    "a depthwise layer without bias": Planted(
        chain(conv(4, 8, 1), nn.ReLU(), conv(8, 8, groups=8), nn.ReLU6(), conv(8, 5, 1)),
        **same("Conv2d ReLU Conv2d ReLU6 Conv2d"), plant=dead(4, [2]), widths=(7, 7, 5),
    ),
    "behind a depthwise layer": Planted(
        chain(*DEPTHWISE), **same("Conv2d ReLU Conv2d ReLU6 Conv2d"), plant=constant(2, [0, 6]), widths=(6, 6, 5),
    ),
    "a norm of scale 0": Planted(
        chain(conv(4, 8), nn.ReLU(), nn.BatchNorm2d(8), nn.Hardswish(), conv(8, 5)),
        **same("Conv2d ReLU BatchNorm2d Hardswish Conv2d"), plant=constant(2, [3, 4]), widths=(7, 5),
    ),
    "a scale per channel": Planted(
        chain(conv(4, 8), nn.ReLU(), ChannelAffine(nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))),
              nn.SiLU(), conv(8, 5, 1)),
        **same("Conv2d ReLU ChannelAffine SiLU Conv2d"), plant=constant(2, [3, 4]), widths=(6, 5), sized=True,
    ),
    "slopes": Planted(
        chain(conv(4, 8, bias=True), nn.PReLU(8), conv(8, 5, 1)), **same("Conv2d PReLU Conv2d"),
        plant=both(constant(0, [0], -2.0), dead(2, [5])), widths=(6, 5),
    ),
    "clamps": Planted(
        chain(conv(4, 8, bias=True), ChannelClamp(-torch.arange(8.0), torch.arange(8.0)), conv(8, 5, 1)),
        **same("Conv2d ChannelClamp Conv2d"), plant=dead(2, [5]), widths=(6, 5),  # channel 0 is clamped to [0, 0]
    ),
    "masks": Planted(
        chain(conv(4, 8, bias=True), MaskedActivation(nn.SiLU(), torch.arange(8) % 2 == 0), conv(8, 5, 1)),
        **same("Conv2d MaskedActivation Conv2d"), plant=both(constant(0, [1, 2]), dead(2, [7])), widths=(5, 5),
    ),
    "flat on what it gets": Planted(
        chain(conv(4, 6, 1), nn.Sigmoid(), conv(6, 8, bias=True), nn.ReLU(), conv(8, 5)),
        **same("Conv2d Sigmoid Conv2d ReLU Conv2d"), plant=lambda m: m[2].bias[:2].fill_(-99.0), widths=(6, 6, 5),
    ),
    "a constant of constants": Planted(
        chain(conv(4, 6, 1, bias=True), nn.ReLU(), conv(6, 8, 1, bias=True), nn.ReLU(), nn.Conv2d(8, 5, 3)),
        **same(f"{CCC} ReLU Conv2d"),
        plant=both(constant(0, [0, 1]), lambda m: m[2].weight[3, 2:].fill_(0.0), lambda m: m[2].bias[3].fill_(5.0)),
        widths=(4, 7, 5),
    ),
    "dead because of the dead": Planted(
        chain(*PADDED, nn.ReLU(), conv(5, 4)), **same(f"{CCC} ReLU Conv2d"),
        plant=both(dead(4, [1, 2]), lambda m: m[2].weight[::3, :3].fill_(0.0),
                   lambda m: m[2].weight[4, :3].fill_(0.0)), widths=(5, 3, 4),
    ),
    "groups": Planted(
        chain(conv(4, 8, groups=2, bias=True), nn.ReLU(), conv(8, 6, groups=2)), **same(CCC),
        plant=both(constant(0, [0, 1], -1.0), constant(0, [6], -1.0)), widths=(6, 6),
    ),
    "groups of different numbers": Planted(
        chain(conv(4, 12, groups=4, bias=True), nn.ReLU(), conv(12, 6, groups=6)), **same(CCC),
        plant=constant(0, [0, 2, 4, 6, 8, 9], -1.0),
        reason="equally wide",
    ),
    "constants in groups, padded": Planted(
        chain(conv(4, 8, bias=True), nn.ReLU(), conv(8, 6, groups=2)), **same(CCC),
        plant=constant(0, [0, 1, 6, 7]), widths=(6, 6),
    ),
    "an image of one position": Planted(
        chain(conv(4, 8, bias=True), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        **same("Conv2d ReLU AdaptiveAvgPool2d Flatten Linear"), plant=both(constant(0, [1, 2]), dead(4, [5])),
        widths=(5, 5), sized=True,
    ),
    "pools and padding": Planted(
        chain(conv(4, 8, bias=True), nn.ReLU(), nn.ReplicationPad2d(1), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2),
              conv(8, 5, 1)),
        **same("Conv2d ReLU ReplicationPad2d MaxPool2d AvgPool2d Conv2d"), plant=constant(0, [0, 1]), widths=(6, 5),
        sized=True,
    ),
    "zeros through zero padding": Planted(
        chain(conv(4, 8, bias=True), nn.ReLU(), nn.ZeroPad2d(1), nn.AvgPool2d(3, 2, 1), conv(8, 5, 1)),
        **same("Conv2d ReLU ZeroPad2d AvgPool2d Conv2d"), plant=both(constant(0, [0], -1.0), constant(0, [3])),
        widths=(7, 5), sized=True,
    ),
    "features": Planted(
        chain(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 5)), **same("Linear GELU Linear"), shape=(9, 4),
        plant=both(constant(0, [1, 2]), dead(2, [7])), widths=(5, 5),
    ),
    "tokens": Planted(
        chain(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 5)), **same("Linear GELU Linear"), shape=(9, 3, 4), sized=True,
        plant=both(constant(0, [1, 2]), dead(2, [7])), widths=(5, 5),
    ),
    "tokens with a norm": Planted(
        chain(nn.Linear(4, 8), nn.GELU(), FeatureNorm(nn.BatchNorm1d(8)), nn.Linear(8, 5)), shape=(9, 3, 4),
        **same("Linear GELU FeatureNorm Linear"), plant=both(constant(0, [1, 2]), dead(3, [7])), widths=(5, 5),
        sized=True,
    ),
    "one dimension": Planted(
        chain(conv(4, 8, dim=1, bias=True), nn.ReLU(), nn.BatchNorm1d(8), conv(8, 5, dim=1)), shape=(2, 4, 9),
        **same("Conv1d ReLU BatchNorm1d Conv1d"), plant=dead(3, [7]), widths=(7, 5), sized=True,
    ),
    "three dimensions": Planted(
        chain(conv(4, 8, dim=3, bias=True), nn.ReLU(), conv(8, 5, dim=3)), shape=(2, 4, 5, 4, 3),
        **same("Conv3d ReLU Conv3d"), plant=constant(0, [1, 2]), widths=(7, 5),
    ),
}  # fmt: skip
UNEQUAL = "must stay equally wide and not empty"
REFUSES = {
    "one group only": Planted(
        chain(conv(4, 8, groups=2, bias=True), nn.ReLU(), conv(8, 6)), plant=constant(0, [0, 1], -1.0),
        reason=f"2 channels in front of _2 are dead or constant, but its groups, or those of _0, {UNEQUAL}",
    ),
    "one group of the next": Planted(
        chain(conv(4, 8), nn.ReLU(), conv(8, 6, groups=2)), plant=lambda m: m[2].weight[:3, 1].fill_(0.0),
        reason=UNEQUAL,
    ),
    "groups of one": Planted(
        chain(conv(4, 8), nn.ReLU(), conv(8, 16, groups=8)), plant=lambda m: m[2].weight[:2].fill_(0.0),
        reason=UNEQUAL,
    ),
    "groups across": FIRES.pop("groups of different numbers"),
}  # fmt: skip
UNTOUCHED = {
    "nothing to drop": Planted(chain(*PADDED)),
    "one constant under padding": Planted(chain(*PADDED), plant=constant(0, [4])),
    "a constant that padding makes vary": Planted(
        chain(conv(4, 8, bias=True), nn.ReLU(), conv(8, 8, groups=8), nn.ReLU(), conv(8, 5, 1)),
        plant=constant(0, [1, 2]),
    ),
    "the only channel": Planted(chain(conv(4, 1, bias=True), nn.ReLU(), conv(1, 5, 1)), plant=constant(0, [0])),
    "an output": Planted(chain(conv(4, 8, bias=True), nn.ReLU()), plant=constant(0, [1, 2])),
    "an input": Planted(chain(nn.ReLU(), conv(4, 5)), plant=dead(1, [1])),
    "a second reader": Planted(
        lambda: Lambda(lambda m, x: (lambda y: (m.b(y), y))(m.a(x).relu()), a=conv(4, 6, 1), b=conv(6, 4, 1)),
        plant=lambda m: m.b.weight[:, 1].fill_(0.0),
    ),
    "a layer that mixes channels between": Planted(
        chain(conv(4, 8, bias=True), nn.GroupNorm(2, 8), conv(8, 5, 1)), plant=dead(2, [1]),
    ),
    "a sum": Planted(
        lambda: Lambda(lambda m, x: m.b(m.a(x) + x), a=conv(4, 4), b=conv(4, 4)),
        plant=lambda m: m.b.weight[:, 1].fill_(0.0),
    ),
    "the width of an image is no channel": Planted(
        chain(conv(4, 8, bias=True), nn.Linear(8, 5)), plant=dead(1, [1]), sized=True,
    ),
    "slopes of another axis": Planted(
        chain(nn.Linear(4, 3), nn.PReLU(3), nn.Linear(3, 5)), plant=dead(2, [1]), shape=(9, 3, 4), sized=True,
    ),
    "clamps of another axis": Planted(
        chain(conv(4, 8), ChannelClamp(-torch.ones(8), torch.ones(8), axis=-1), conv(8, 5)), plant=dead(2, [1]),
        sized=True,
    ),
    "a norm of another axis": Planted(
        chain(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 5)), plant=dead(2, [1]), shape=(9, 3, 4), sized=True,
    ),
    "a flattened image": Planted(
        chain(conv(4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)), plant=dead(3, range(64)), sized=True,
    ),
    "a pool over features": Planted(
        chain(nn.Linear(4, 8), nn.MaxPool1d(2), nn.Linear(4, 5)), plant=dead(2, [1]), shape=(9, 3, 4), sized=True,
    ),
    "statistics of the batch": Planted(
        chain(conv(4, 8), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), conv(8, 5)), plant=dead(3, [1]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_fires(case: Planted) -> None:
    assert_fires(case, RULE)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_widths(case: Planted) -> None:
    prepared = Prepared(case)
    prepared.run(RULE)
    assert widths(prepared.gm) == case.widths


@pytest.mark.parametrize("case", REFUSES.values(), ids=list(REFUSES))
def test_refuses(case: Planted) -> None:
    assert_refuses(case, RULE)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_parity(case: Planted) -> None:
    assert_parity(case, RULE)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_a_second_run_changes_nothing(case: Planted) -> None:
    assert_settled(case, RULE)


@pytest.mark.parametrize("case", UNTOUCHED.values(), ids=list(UNTOUCHED))
def test_leaves_what_it_does_not_match(case: Planted) -> None:
    assert_untouched(case, RULE)


SIZED = {name: case for name, case in FIRES.items() if case.sized}


@pytest.mark.parametrize("case", SIZED.values(), ids=list(SIZED))
def test_shapes_are_those_of_the_new_layers(case: Planted) -> None:
    prepared = Prepared(case)
    prepared.run(RULE)
    noted = {node: shape_of(node) for node in prepared.gm.graph.nodes}
    prepared.emitted()
    annotate(prepared.gm, (prepared.x,))
    assert noted == {node: shape_of(node) for node in prepared.gm.graph.nodes}


@pytest.mark.parametrize("sized", [False, True])
def test_what_it_says_to_save_is_what_it_saves(sized: bool) -> None:
    case = Planted(chain(*DEPTHWISE), plant=dead(4, [2, 3]), sized=sized)
    (applied,) = Prepared(case).run(RULE).applied
    positions = 64 if sized else 1
    before, after = (4 * c + 9 * c + 5 * c for c in (8, 6))
    assert (applied.price.macs_before, applied.price.macs_after) == (before * positions, after * positions)
    assert (applied.price.params_before, applied.price.params_after) == (before + 16, after + 12)


def test_what_trains_still_does() -> None:
    case = Planted(chain(conv(4, 8), nn.PReLU(8), nn.BatchNorm2d(8), conv(8, 5)), plant=dead(3, [2]))
    prepared = Prepared(case)
    prepared.run(RULE)
    emitted = prepared.emitted()
    assert all(p.requires_grad and p.dtype == FLOAT64 for p in emitted.parameters())
    assert all(not b.requires_grad for b in emitted.buffers())
