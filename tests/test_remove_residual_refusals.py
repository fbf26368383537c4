"""remove_residual refuses, naming the node and the condition that is broken: one test per reason."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from front import Lambda
from nets import NETS, Residual, conv
from one_pass import Case, assert_refuses
from torch import nn

from rmfx.layout import schedule
from rmfx.passes.remove_residual import RemoveResidual

POINT = (16, 4, 1, 1)


def residual(*branch: nn.Module, shortcut: nn.Module | None = None) -> Callable[[], nn.Module]:
    """``branch(x) + shortcut(x)``."""
    return lambda: Residual(nn.Sequential(*copy.deepcopy(branch)), copy.deepcopy(shortcut), nn.Identity())


def usual(activation: nn.Module, c: int = 4) -> tuple[nn.Module, ...]:
    """conv, activation, conv: the branch of a basic block."""
    return conv(c, c), activation, conv(c, c)


REFUSES = {
    "group norm": Case(
        residual(conv(4, 4), nn.GroupNorm(2, 4), nn.ReLU()),
        reason="'branch_1' (in branch), a GroupNorm on the branch, normalises by the mean and variance over channels",
    ),
    "softmax": Case(
        residual(*usual(nn.Softmax(1))),
        reason="'branch_1' (in branch), a Softmax on the branch, divides by a sum over channels or positions",
    ),
    "max-pool in the branch": Case(
        residual(conv(4, 4), nn.MaxPool2d(3, 1, 1), conv(4, 4)),
        reason="branch.1, a MaxPool2d, stands in one branch only: what is carried beside it would be changed by it",
    ),
    "max-pool in the shortcut": Case(
        residual(conv(4, 4, 3, 2), nn.ReLU(), shortcut=nn.MaxPool2d(2)),
        reason="shortcut, a MaxPool2d, stands in one branch only: what is carried beside it would be changed by it",
    ),
    "max-pool in a branch of a branch": Case(
        lambda: Lambda(
            lambda m, x: x + m.b(m.a(x) + m.pool(x)).relu(), a=conv(4, 4), b=conv(4, 4), pool=nn.MaxPool2d(3, 1, 1)
        ),
        reason="pool, a MaxPool2d, stands in one branch only: what is carried beside it would be changed by it",
    ),
    "different max-pools": Case(
        lambda: Lambda(
            lambda m, x: m.p(m.a(x)) + m.q(m.b(x).relu()),
            a=conv(4, 4),
            b=conv(4, 4),
            p=nn.MaxPool2d(3, 1, 1),
            q=nn.MaxPool2d(5, 1, 2),
        ),
        reason="the branches pool in different ways: p and q",
    ),
    "bilinear in two ways": Case(
        lambda: Lambda(
            lambda m, x: m.p(m.a(x)) + m.q(m.b(x).relu()),
            a=conv(4, 4),
            b=conv(4, 4),
            p=nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            q=nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        ),
        reason="the branches pool in different ways: p and q",
    ),
    "a pool of features": Case(
        lambda: Lambda(
            lambda m, x: m.pool(m.a(x).relu()) + m.pool(m.b(x)),
            a=nn.Linear(4, 6),
            b=nn.Linear(4, 6),
            pool=nn.MaxPool1d(3, 1, 1),
        ),
        reason="pool pools the features of a linear layer, which are no positions",
        shape=(2, 5, 4),
    ),
    "upsampling": Case(
        residual(nn.AvgPool2d(2), conv(4, 4), nn.Upsample(scale_factor=2)),
        reason="branch.2, a Upsample, stands in one branch only",
        sized=True,
    ),
    "transposed convolution": Case(
        residual(nn.ConvTranspose2d(4, 4, 3, padding=1), nn.ReLU()),
        reason="'branch_0' (in branch), a ConvTranspose2d on the branch, is a transposed convolution, which spreads",
    ),
    "a product of two tensors, shapes unknown": Case(
        lambda: Lambda(lambda m, x: x + m.a(x) * m.b(x).sigmoid(), a=conv(4, 4), b=conv(4, 4)),
        reason="'mul' multiplies two tensors: pass example_inputs, their shapes tell which is the gate",
    ),
    "a reader inside the branch": Case(
        lambda: Lambda(lambda m, x: (lambda y: (x + m.b(y), y))(m.a(x).relu()), a=conv(4, 4), b=conv(4, 4)),
        reason="'relu' inside the branch is also read outside, by output",
    ),
    "a concat of positions": Case(
        lambda: Lambda(
            lambda m, x: m.c(x).relu() + m.b(torch.cat((m.a(x).relu(), m.pool(x)), 2)),
            a=conv(4, 4, 3, 2),
            b=conv(4, 4),
            c=conv(4, 4, 1, (1, 2)),
            pool=nn.AvgPool2d(2),
        ),
        reason="cat concatenates along another dimension than the channels",
    ),
    "a count of channels that is read": Case(
        lambda: Lambda(lambda m, x: (lambda y: (x + m.b(y)) * y.numel())(m.a(x).relu()), a=conv(4, 6), b=conv(6, 4)),
        reason="numel reads the number of channels of relu, which goes",
    ),
    "a size that nothing has any more": Case(
        lambda: Lambda(
            lambda m, x: (lambda y: (x + m.b(y).relu()) * y.shape[2])(m.a(x)),
            a=nn.Conv2d(4, 6, 3),
            b=nn.Conv2d(6, 4, 3, padding=2),
        ),
        reason="a layer changes the size in a way that not every branch follows at all input sizes",
    ),
    "a sum that broadcasts": Case(
        residual(nn.Conv2d(4, 4, 8), nn.ReLU()), reason="'add' broadcasts (2, 4, 1, 1) with (2, 4, 8, 8)", sized=True
    ),
    "channels that broadcast": Case(
        residual(conv(4, 6), nn.ReLU(), conv(6, 1)),
        reason="'add' broadcasts (2, 1, 8, 8) with (2, 4, 8, 8)",
        sized=True,
    ),
    "channels that broadcast, sizes unknown": Case(
        residual(conv(4, 6), nn.ReLU(), conv(6, 1)), reason="the sum broadcasts 1 and 4 channels"
    ),
    "an image without a batch": Case(
        residual(*usual(nn.ReLU())),
        reason="the layers take batched inputs of 4 dimensions, the example input gives 3",
        shape=(4, 8, 8),
        sized=True,
    ),
    "no layer with dimensions": Case(
        residual(nn.ReLU()), reason="no convolution, linear or norm layer stands between the fork and the sum"
    ),
    "channels unknown": Case(
        residual(nn.ReLU(), nn.AvgPool2d(3, 1, 1)), reason="the number of channels at x is unknown: pass example_inputs"
    ),
    "images and features": Case(
        residual(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Linear(8, 8)),
        reason="has 0 spatial dimensions among layers of 2",
        shape=(2, 8, 8, 8),
    ),
    "no statistics": Case(
        residual(conv(4, 4), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
        reason="batch norm without running statistics normalises by the statistics of each batch",
    ),
    "norm of positions": Case(
        residual(nn.Linear(4, 6), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(6, 4)),
        reason="normalises dimension 1 of a 3-dimensional tensor: not its channels",
        shape=(4, 5, 4),
        sized=True,
    ),
    "a pool that hangs over the border": Case(
        residual(conv(4, 4, 3, 2), nn.ReLU(), shortcut=nn.AvgPool2d(2, ceil_mode=True)),
        reason="an average pool with ceil_mode has another divisor where it hangs over the border",
        shape=(2, 4, 7, 7),
        sized=True,
    ),
    "size changes, size unknown": Case(
        residual(nn.Conv2d(4, 4, 4, 2, 1), nn.ReLU(), conv(4, 4), shortcut=conv(4, 4, 1, 2)),
        reason="changes the size in a way that not every branch follows at all input sizes: pass example_inputs",
    ),
    "linear, of equal sizes at some input sizes only": Case(
        residual(conv(4, 4), nn.AvgPool2d(2), shortcut=conv(4, 4, 3, 2)),
        reason="a layer changes the size in a way that not every branch follows at all input sizes: pass example_in",
    ),
    "smaller inside": Case(
        residual(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=2)),
        reason="a stack of size (6, 6) cannot hold a tensor of size (8, 8)",
        sized=True,
    ),
    "stride without one in the shortcut": Case(
        residual(conv(4, 4, 3, 2), nn.ReLU(), conv(4, 4)),
        reason="the strides of the two branches cannot be brought in step",
        shape=POINT,
    ),
    "strides 2 and 3": Case(
        residual(conv(4, 4, 3, 2), nn.ReLU(), conv(4, 4), shortcut=conv(4, 4, 1, 3)),
        reason="the strides of parallel branches do not divide each other",
        shape=POINT,
    ),
    "direct on signed values": Case(
        residual(*usual(nn.ReLU())),
        reason="carrier 'direct' needs ReLU to be the identity on [-inf, inf], which it is not",
        rule=RemoveResidual(carrier="direct"),
    ),
    "split through ReLU6": Case(
        residual(*usual(nn.ReLU6())),
        reason="carrier 'split' needs phi(t) - phi(-t) = k*t, which ReLU6 does not satisfy",
        rule=RemoveResidual(carrier="split"),
    ),
    "slopes along another axis": Case(
        residual(nn.Linear(4, 6), nn.PReLU(5), nn.Linear(6, 4)),
        reason="no single layer applies PReLU to some channels and carries the others",
        shape=(4, 5, 4),
        sized=True,
    ),
    "linear branches in training": Case(
        NETS["repvgg_strided"].build,
        reason="parallel linear branches stay apart for training: each keeps its own norm",
        shape=NETS["repvgg_strided"].shape,
        rule=RemoveResidual(keep_norms=True),
    ),
}


@pytest.mark.parametrize("case", REFUSES.values(), ids=list(REFUSES))
def test_refuses(case: Case) -> None:
    assert_refuses(case, RemoveResidual())


def test_a_search_that_gives_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MOST_STATES", 1)
    reason = "the 3 operations between fork and join can be put in order in more ways than are tried"
    case = Case(residual(*usual(nn.ReLU())), reason=reason)
    assert_refuses(case, RemoveResidual())
