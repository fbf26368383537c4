"""fuse_convs: consecutive linear layers become one, always or where that is cheaper."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from front import Lambda
from nets import conv
from one_pass import Case, Prepared, assert_fires, assert_parity, assert_refuses, assert_settled, assert_untouched
from torch import nn

from rmfx.passes.fuse_convs import FuseConvs

CHEAPER, ALWAYS = FuseConvs(), FuseConvs("always")
PADDED_TWICE = "the outer convolution pads what the inner one, which is not 1x1, has already padded"


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    """The layers in sequence."""
    return lambda: nn.Sequential(*copy.deepcopy(layers))


FIRES = {
    "pointwise": Case(chain(conv(4, 6, 1, bias=True), conv(6, 5, 1, bias=True)), "Conv2d Conv2d", "Conv2d"),
    "pointwise behind a wider one": Case(chain(conv(4, 8, bias=True), conv(8, 4, 1)), "Conv2d Conv2d", "Conv2d"),
    "pointwise without bias before a padded one": Case(chain(conv(4, 9, 1), conv(9, 4)), "Conv2d Conv2d", "Conv2d"),
    "three": Case(chain(conv(4, 8, 1), conv(8, 8, 1), conv(8, 4, 1)), "Conv2d Conv2d Conv2d", "Conv2d"),
    "unpadded": Case(
        chain(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 3, 2)), "Conv2d Conv2d", "Conv2d", rule=ALWAYS, shape=(2, 4, 9, 9)
    ),
    "cheaper at this size only": Case(
        chain(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), "Conv2d Conv2d", "Conv2d", sized=True
    ),
    "dilated and strided": Case(
        chain(nn.Conv2d(4, 4, 3, 2), nn.Conv2d(4, 4, 2, dilation=2)),
        "Conv2d Conv2d",
        "Conv2d",
        rule=ALWAYS,
        shape=(2, 4, 12, 11),
    ),
    "a dearer one, always": Case(chain(conv(4, 1), conv(1, 8, 1)), "Conv2d Conv2d", "Conv2d", rule=ALWAYS),
    "groups of 4 and 2": Case(
        chain(conv(4, 8, groups=4), conv(8, 4, 1, groups=2)), "Conv2d Conv2d", "Conv2d", rule=ALWAYS
    ),
    "average pool behind a convolution": Case(
        chain(conv(4, 4, 1), nn.AvgPool2d(2)), "Conv2d AvgPool2d", "Conv2d", rule=ALWAYS
    ),
    "average pool before a pointwise convolution": Case(
        chain(nn.AvgPool2d(2), conv(4, 6, 1, bias=True)), "AvgPool2d Conv2d", "Conv2d", rule=ALWAYS, sized=True
    ),
    "a norm behind a convolution": Case(chain(conv(4, 6), nn.BatchNorm2d(6)), "Conv2d BatchNorm2d", "Conv2d"),
    "reflection around a pointwise one": Case(
        chain(conv(4, 9, 1, bias=True), nn.Conv2d(9, 4, 3, padding=1, padding_mode="reflect")),
        "Conv2d Conv2d",
        "Conv2d",
    ),
    "features": Case(chain(nn.Linear(4, 8), nn.Linear(8, 5)), "Linear Linear", "Linear", shape=(16, 4)),
    "tokens": Case(chain(nn.Linear(4, 8), nn.Linear(8, 5)), "Linear Linear", "Linear", shape=(4, 5, 4), sized=True),
    "one dimension": Case(chain(conv(4, 8, dim=1), conv(8, 4, 1, dim=1)), "Conv1d Conv1d", "Conv1d", shape=(2, 4, 9)),
    "three dimensions": Case(
        chain(conv(4, 8, dim=3), conv(8, 4, 1, dim=3)), "Conv3d Conv3d", "Conv3d", shape=(2, 4, 5, 4, 3)
    ),
}
REFUSES = {
    "dearer": Case(chain(conv(4, 1), conv(1, 8, 1)), reason="one layer would take 6.55 times the MACs of the two"),
    "dearer, sizes known": Case(
        chain(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),
        reason="one layer would take 1.23 times the MACs of the two",
        shape=(2, 4, 20, 20),
        sized=True,
    ),
    "dearer per position": Case(
        chain(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), reason="one layer would take 1.39 times the MACs of the two"
    ),
    "padded twice": Case(chain(conv(4, 4), conv(4, 4)), reason=PADDED_TWICE, rule=ALWAYS),
    "padding would see a bias": Case(
        chain(conv(4, 9, 1, bias=True), conv(9, 4)),
        reason="zero padding of the outer convolution would see 0 where the inner bias should stand",
    ),
    "padding does not commute with a stride": Case(
        chain(conv(4, 4, 1, 2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        reason="reflect padding does not commute with a stride",
        rule=ALWAYS,
    ),
    "no statistics": Case(
        chain(conv(4, 6), nn.BatchNorm2d(6, track_running_stats=False)),
        reason="batch norm without running statistics normalises by the statistics of each batch",
    ),
    "a pool that hangs over the border": Case(
        chain(conv(4, 6), nn.AvgPool2d(2, ceil_mode=True)),
        reason="an average pool with ceil_mode has another divisor where it hangs over the border",
    ),
    "images and features": Case(
        chain(nn.Conv2d(8, 8, 1), nn.Linear(8, 8)),
        reason="has 2 spatial dimensions among layers of 0",
        shape=(2, 8, 8, 8),
    ),
    "channels unknown": Case(
        chain(nn.AvgPool2d(2), conv(4, 6, 1)), reason="is unknown: pass example_inputs", rule=ALWAYS
    ),
}
UNTOUCHED = {
    "a nonlinearity between": Case(chain(conv(4, 6, 1), nn.ReLU(), conv(6, 4, 1))),
    "a second reader": Case(
        lambda: Lambda(lambda m, x: (lambda y: (m.b(y), y))(m.a(x)), a=conv(4, 6, 1), b=conv(6, 4, 1))
    ),
    "two norms": Case(chain(nn.BatchNorm2d(4), nn.BatchNorm2d(4))),
    "an opaque layer between": Case(chain(conv(4, 6, 1), nn.GroupNorm(2, 6), conv(6, 4, 1))),
}


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_fires(case: Case) -> None:
    assert_fires(case, CHEAPER)


@pytest.mark.parametrize("case", REFUSES.values(), ids=list(REFUSES))
def test_refuses(case: Case) -> None:
    assert_refuses(case, CHEAPER)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_parity(case: Case) -> None:
    assert_parity(case, CHEAPER)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_a_second_run_changes_nothing(case: Case) -> None:
    assert_settled(case, CHEAPER)


@pytest.mark.parametrize("case", UNTOUCHED.values(), ids=list(UNTOUCHED))
def test_leaves_what_it_does_not_match(case: Case) -> None:
    assert_untouched(case, CHEAPER)


@pytest.mark.parametrize("sized", [False, True])
def test_what_it_says_to_save_is_what_it_saves(sized: bool) -> None:
    case = Case(chain(conv(4, 8, 3, 2, bias=True), conv(8, 4, 1)), sized=sized)
    prepared = Prepared(case)
    (applied,) = prepared.run(CHEAPER).applied
    positions = 16 if sized else 1 / 4  # per sample at 8x8, else per input position
    assert applied.price.macs_before == (4 * 8 * 9 + 8 * 4) * positions
    assert applied.price.macs_after == 4 * 4 * 9 * positions
    assert (applied.price.params_before, applied.price.params_after) == (4 * 8 * 9 + 8 + 8 * 4, 4 * 4 * 9 + 4)
