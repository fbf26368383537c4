"""merge_branches: a sum of parallel linear branches becomes one map."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from front import Lambda
from nets import NETS, Sum, cbn, conv
from one_pass import Case, assert_fires, assert_parity, assert_refuses, assert_settled, assert_untouched
from torch import nn

from rmfx.passes.merge_branches import MergeBranches

MERGE = MergeBranches()
NET = (2, 3, 8, 8)  # the shape of tests/nets.py


def two(first: nn.Module, second: nn.Module) -> Callable[[], nn.Module]:
    """``first(x) + second(x)``."""
    return lambda: Sum(*copy.deepcopy((first, second)), act=nn.Identity())


def scaled_sum(factor: float) -> nn.Module:
    """``conv(x) + factor * x``."""
    return Lambda(lambda m, x: m.conv(x) + factor * x, conv=conv(4, 4))


FIRES = {
    "RepVGG": Case(
        NETS["repvgg"].build,
        "Conv2d BatchNorm2d ReLU Conv2d BatchNorm2d Conv2d BatchNorm2d add BatchNorm2d add ReLU",
        "Conv2d BatchNorm2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "RepVGG, strided": Case(
        NETS["repvgg_strided"].build,
        "Conv2d BatchNorm2d ReLU Conv2d BatchNorm2d Conv2d BatchNorm2d add ReLU",
        "Conv2d BatchNorm2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "ACNet": Case(
        NETS["acnet"].build,
        "Conv2d BatchNorm2d ReLU Conv2d BatchNorm2d Conv2d BatchNorm2d add Conv2d BatchNorm2d add ReLU",
        "Conv2d BatchNorm2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "DiracNet": Case(
        NETS["diracnet"].build,
        "Conv2d BatchNorm2d ReLU Conv2d ChannelAffine add BatchNorm2d ReLU",
        "Conv2d BatchNorm2d ReLU Conv2d BatchNorm2d ReLU",
        shape=NET,
    ),
    "DBB": Case(
        NETS["dbb"].build,
        "Conv2d BatchNorm2d ReLU Conv2d BatchNorm2d Conv2d BatchNorm2d add "
        "Conv2d Conv2d BatchNorm2d add Conv2d AvgPool2d BatchNorm2d add ReLU",
        "Conv2d BatchNorm2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "MobileOne": Case(
        NETS["mobileone"].build,
        "Conv2d BatchNorm2d ReLU BatchNorm2d Conv2d BatchNorm2d add Conv2d BatchNorm2d add Conv2d BatchNorm2d add ReLU "
        "BatchNorm2d Conv2d BatchNorm2d add Conv2d BatchNorm2d add ReLU",
        "Conv2d BatchNorm2d ReLU Conv2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "identity": Case(two(conv(4, 4), nn.Identity()), "Conv2d add", "Conv2d"),
    "a difference": Case(
        lambda: Lambda(lambda m, x: m.a(x) - m.b(x), a=conv(4, 6), b=conv(4, 6, 1)),
        "Conv2d Conv2d ChannelAffine add",
        "Conv2d",
    ),
    "a scaled identity": Case(lambda: scaled_sum(0.3), "Conv2d ChannelAffine add", "Conv2d", sized=True),
    "kernels of 5 and 3 with dilation 2": Case(
        two(conv(4, 6, 5), conv(4, 6, 3, dilation=2)), "Conv2d Conv2d add", "Conv2d"
    ),
    "groups of 4 and 2": Case(two(conv(4, 8, groups=4), conv(4, 8, 1, groups=2)), "Conv2d Conv2d add", "Conv2d"),
    "reflection and a 1x1": Case(
        two(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), conv(4, 4, 1)), "Conv2d Conv2d add", "Conv2d"
    ),
    "an average pool": Case(two(conv(4, 4), nn.AvgPool2d(3, 1, 1)), "Conv2d AvgPool2d add", "Conv2d", sized=True),
    "sizes equal at this size only": Case(
        two(nn.Conv2d(4, 4, 4, 2, 1), conv(4, 4, 1, 2)), "Conv2d Conv2d add", "Conv2d", sized=True
    ),
    "features": Case(
        lambda: Sum(nn.Linear(4, 6), nn.Linear(4, 6, bias=False), act=nn.ReLU()),
        "Linear Linear add ReLU",
        "Linear ReLU",
        shape=(8, 4),
    ),
    "one dimension": Case(
        lambda: Sum(cbn(4, 4, dim=1), cbn(4, 4, 1, dim=1), nn.Identity(), act=nn.ReLU()),
        "Conv1d BatchNorm1d Conv1d BatchNorm1d add add ReLU",
        "Conv1d ReLU",
        shape=(2, 4, 9),
    ),
    "three dimensions": Case(
        lambda: Sum(cbn(4, 4, dim=3), nn.BatchNorm3d(4), act=nn.ReLU()),
        "Conv3d BatchNorm3d BatchNorm3d add ReLU",
        "Conv3d ReLU",
        shape=(2, 4, 5, 4, 3),
    ),
}
REFUSES = {
    "strides": Case(two(conv(4, 4, 3, 2), conv(4, 4, 3, 1)), reason="strides differ: 1, 2", shape=(2, 4, 1, 1)),
    "padding modes": Case(
        two(conv(4, 4), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        reason="padding modes differ: reflect, zeros",
    ),
    "sizes unknown": Case(
        two(nn.Conv2d(4, 4, 4, 2, 1), conv(4, 4, 1, 2)),
        reason="the branches have equal sizes at some input sizes only: pass example_inputs",
    ),
    "channels": Case(two(conv(4, 1), conv(4, 6)), reason="the sum broadcasts 1 and 6 channels"),
    "no statistics": Case(
        two(nn.BatchNorm2d(4, track_running_stats=False), conv(4, 4)),
        reason="batch norm without running statistics normalises by the statistics of each batch",
    ),
    "padding between the layers of a branch": Case(
        two(nn.Sequential(conv(4, 4), conv(4, 4)), nn.Identity()),
        reason="the branches do not compose into one map: the outer convolution pads what the inner one",
    ),
    "a pool that does not count its padding": Case(
        two(conv(4, 4), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        reason="the divisor of an average pool that does not count its padding varies at the borders",
        sized=True,
    ),
    "a pool that hangs over the border": Case(
        two(conv(4, 4, 1, 2), nn.AvgPool2d(2, ceil_mode=True)),
        reason="an average pool with ceil_mode has another divisor where it hangs over the border",
        shape=(2, 4, 7, 7),
        sized=True,
    ),
    "a pool of unknown channels": Case(
        two(nn.AvgPool2d(3, 1, 1), nn.Identity()),
        reason="the number of channels at x is unknown: pass example_inputs",
    ),
    "nothing that tells the dimensions": Case(
        lambda: Lambda(lambda m, x: (lambda y: y + 0.5 * y)(m.pool(m.conv(x))), conv=conv(4, 4), pool=nn.MaxPool2d(2)),
        reason="no convolution, linear or norm layer stands between the fork and the sum",
    ),
    "rank of features unknown": Case(
        two(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        reason="whether BatchNorm1d normalises features or positions depends on the input's rank: pass example_inputs",
        shape=(8, 4),
    ),
    "an image without a batch": Case(
        two(conv(4, 4), conv(4, 4, 1)),
        reason="the layers take batched inputs of 4 dimensions, the example input gives 3",
        shape=(4, 8, 8),
        sized=True,
    ),
}
UNTOUCHED = {
    "a nonlinear branch": Case(two(nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4)), nn.Identity())),
    "an activation behind one branch": Case(two(nn.Sequential(conv(4, 4), nn.ReLU()), conv(4, 4, 1))),
    "a reader inside a branch": Case(
        lambda: Lambda(lambda m, x: (lambda y: (m.b(y) + x, y))(m.a(x)), a=conv(4, 4, 1), b=conv(4, 4, 1))
    ),
    "an opaque layer in a branch": Case(two(nn.Sequential(conv(4, 4), nn.GroupNorm(2, 4)), nn.Identity())),
    "a transposed convolution": Case(two(nn.ConvTranspose2d(4, 4, 3, padding=1), conv(4, 4))),
    "no sum": Case(lambda: nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4))),
}


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_fires(case: Case) -> None:
    assert_fires(case, MERGE)


@pytest.mark.parametrize("case", REFUSES.values(), ids=list(REFUSES))
def test_refuses(case: Case) -> None:
    assert_refuses(case, MERGE)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_parity(case: Case) -> None:
    assert_parity(case, MERGE)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_a_second_run_changes_nothing(case: Case) -> None:
    assert_settled(case, MERGE)


@pytest.mark.parametrize("case", UNTOUCHED.values(), ids=list(UNTOUCHED))
def test_leaves_what_it_does_not_match(case: Case) -> None:
    assert_untouched(case, MERGE)
