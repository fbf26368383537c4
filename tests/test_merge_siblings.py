"""merge_siblings: convolutions that read one tensor alike become one, with a slice for each reader."""

from __future__ import annotations

import pytest
import torch
from front import Lambda
from nets import conv
from one_pass import Case, assert_fires, assert_parity, assert_settled, assert_untouched
from torch import nn

from rmfx.passes.merge_siblings import MergeSiblings

SIBLINGS = MergeSiblings()


def two(first: nn.Module, second: nn.Module) -> nn.Module:
    """Both on the input, a product of what they give."""
    return Lambda(lambda m, x: torch.sigmoid(m.first(x)) * m.second(x), first=first, second=second)


def joined(*layers: nn.Module) -> nn.Module:
    """All on the input, a concat of what they give."""
    named = dict(zip("abcd", layers, strict=False))
    return Lambda(lambda m, x: torch.cat([getattr(m, name)(x) for name in named], 1), **named)


FIRES = {
    "two": Case(
        lambda: two(conv(4, 6, 3), conv(4, 6, 3)),
        "Conv2d Sigmoid Conv2d mul",
        "Conv2d ChannelSlice ChannelSlice Sigmoid mul",
    ),
    "other widths, with and without bias": Case(
        lambda: Lambda(
            lambda m, x: torch.cat((m.a(x).relu(), m.b(x), m.c(x)), 1),
            a=nn.Conv2d(4, 3, 1),
            b=nn.Conv2d(4, 5, 1, bias=False),
            c=nn.Conv2d(4, 1, 1),
        ),
        "Conv2d ReLU Conv2d Conv2d cat",
        "Conv2d ChannelSlice ChannelSlice ChannelSlice ReLU cat",
    ),
    "linear": Case(
        lambda: two(nn.Linear(8, 3), nn.Linear(8, 3, bias=False)),
        "Linear Sigmoid Linear mul",
        "Linear ChannelSlice ChannelSlice Sigmoid mul",
    ),
    "only those alike": Case(
        lambda: joined(conv(4, 3, 3), nn.Conv2d(4, 5, 1), conv(4, 2, 3)),
        "Conv2d Conv2d Conv2d cat",
        "Conv2d ChannelSlice ChannelSlice Conv2d cat",
    ),
    "before one that is not": Case(
        lambda: joined(conv(4, 3, 3), conv(4, 2, 3), nn.Conv2d(4, 5, 1)),
        "Conv2d Conv2d Conv2d cat",
        "Conv2d ChannelSlice ChannelSlice Conv2d cat",
    ),
    "two pairs": Case(
        lambda: joined(conv(4, 3, 3), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 1, 1), conv(4, 2, 3)),
        "Conv2d Conv2d Conv2d Conv2d cat",
        "Conv2d ChannelSlice ChannelSlice Conv2d ChannelSlice ChannelSlice cat",
    ),
    "beside one with a sum": Case(
        lambda: Lambda(
            lambda m, x: torch.cat((m.a(x), m.b(x), m.c(x) + x), 1),
            a=conv(4, 3, 3),
            b=conv(4, 2, 3),
            c=nn.Conv2d(4, 4, 1),
        ),
        "Conv2d Conv2d Conv2d add cat",
        "Conv2d ChannelSlice ChannelSlice Conv2d add cat",
    ),
}
UNTOUCHED = {
    "one conv": Case(lambda: nn.Sequential(conv(4, 4, 3), nn.ReLU(), conv(4, 4, 3))),
    "other kernels": Case(lambda: two(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))),
    "other strides": Case(
        lambda: Lambda(lambda m, x: (m.a(x), m.b(x)), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1, stride=2))
    ),
    "groups": Case(lambda: two(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 3, padding=1, groups=4))),
    "a sum at once": Case(lambda: Lambda(lambda m, x: m.a(x) + m.b(x), a=conv(4, 4, 3), b=conv(4, 4, 3))),
}


@pytest.mark.parametrize("case", FIRES.values(), ids=FIRES)
def test_fires(case: Case) -> None:
    assert_fires(case, SIBLINGS)


@pytest.mark.parametrize("case", FIRES.values(), ids=FIRES)
def test_the_result_is_equal(case: Case) -> None:
    assert_parity(case, SIBLINGS)


@pytest.mark.parametrize("case", FIRES.values(), ids=FIRES)
def test_a_second_run_changes_nothing(case: Case) -> None:
    assert_settled(case, SIBLINGS)


@pytest.mark.parametrize("case", UNTOUCHED.values(), ids=UNTOUCHED)
def test_leaves_others_alone(case: Case) -> None:
    assert_untouched(case, SIBLINGS)
