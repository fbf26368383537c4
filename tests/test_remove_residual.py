"""remove_residual: one sum across nonlinearities becomes a plain sequence (reserve and merge)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from front import Lambda
from nets import NETS, Residual, Sum, conv
from one_pass import Case, assert_fires, assert_parity, assert_settled, assert_untouched
from torch import nn

from rmfx.passes.remove_residual import RemoveResidual

REMOVE = RemoveResidual()
NET = (2, 3, 8, 8)  # the shape of most of tests/nets.py
CB = "Conv2d BatchNorm2d"
CBR = f"{CB} ReLU"


def residual(*branch: nn.Module, shortcut: nn.Module | None = None) -> Callable[[], nn.Module]:
    """``branch(x) + shortcut(x)``."""
    return lambda: Residual(nn.Sequential(*copy.deepcopy(branch)), copy.deepcopy(shortcut), nn.Identity())


def usual(activation: nn.Module, c: int = 4) -> tuple[nn.Module, ...]:
    """conv, activation, conv: the branch of a basic block."""
    return conv(c, c), activation, conv(c, c)


FIRES = {
    "basic block, direct": Case(
        NETS["basic_identity"].build,
        f"{CBR} {CBR} {CB} add ReLU",
        f"{CBR} Conv2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "basic block, masked": Case(
        NETS["basic_signed"].build,
        f"{CB} {CBR} {CB} add ReLU",
        f"{CB} Conv2d PReLU Conv2d ReLU",
        shape=NET,
    ),
    "projection": Case(
        NETS["basic_projection"].build,
        f"{CBR} {CBR} {CB} {CB} add ReLU",
        f"{CBR} Conv2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "three blocks": Case(
        NETS["basic_chain"].build,
        f"{CBR} {CBR} {CB} add ReLU {CBR} {CB} {CB} add ReLU {CBR} {CB} add ReLU",
        f"{CBR} Conv2d ReLU Conv2d ReLU Conv2d ReLU Conv2d ReLU Conv2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "stride on the first conv": Case(
        NETS["bottleneck_stride_1"].build,
        f"{CBR} {CBR} {CBR} {CB} {CB} add ReLU",
        f"{CBR} Conv2d ReLU Conv2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "stride on the second conv": Case(
        NETS["bottleneck_stride_2"].build,
        f"{CBR} {CBR} {CBR} {CB} {CB} add ReLU",
        f"{CBR} Conv2d ReLU Conv2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "stride on the third conv": Case(
        NETS["bottleneck_stride_3"].build,
        f"{CBR} {CBR} {CBR} {CB} {CB} add ReLU",
        f"{CBR} Conv2d ReLU Conv2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "grouped": Case(
        NETS["resnext_projection"].build,
        f"{CBR} {CBR} {CBR} {CB} {CB} add ReLU",
        f"{CBR} Conv2d ReLU Conv2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "depthwise, ReLU6": Case(
        NETS["inverted_relu6"].build,
        f"{CB} {CB} ReLU6 {CB} ReLU6 {CB} add",
        f"{CB} Conv2d ChannelClamp Conv2d ChannelClamp Conv2d",
        shape=NET,
    ),
    "depthwise, Hardswish": Case(
        NETS["inverted_hardswish"].build,
        f"{CB} {CB} Hardswish {CB} Hardswish {CB} add",
        f"{CB} Conv2d MaskedActivation Conv2d MaskedActivation Conv2d",
        shape=NET,
    ),
    "subtracted": Case(
        NETS["subtracted"].build,
        f"{CBR} Conv2d ReLU Conv2d ChannelAffine add ReLU",
        f"{CBR} Conv2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "scaled": Case(
        NETS["scaled"].build,
        f"{CBR} Conv2d ReLU Conv2d ChannelAffine add ReLU",
        f"{CBR} Conv2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "two nonlinear branches": Case(
        NETS["two_branches"].build,
        f"{CBR} Conv2d ReLU Conv2d Conv2d ReLU Conv2d add ReLU",
        f"{CBR} Conv2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "nested": Case(
        NETS["nested"].build,
        f"{CBR} {CBR} {CBR} {CB} add ReLU {CB} add ReLU",
        f"{CBR} Conv2d ReLU Conv2d ReLU Conv2d ReLU Conv2d ReLU",
        shape=NET,
    ),
    "pre-activation": Case(
        NETS["pre_activation"].build,
        f"{CB} BatchNorm2d ReLU {CBR} Conv2d add",
        f"{CB} Conv2d PReLU Conv2d PReLU Conv2d",
        shape=NET,
        sized=True,
    ),
    "branch that ends in an activation": Case(
        residual(conv(4, 4), nn.ReLU()), "Conv2d ReLU add", "Conv2d PReLU Conv2d", sized=True
    ),
    "branch that begins with one": Case(
        residual(nn.ReLU(), conv(4, 4)), "ReLU Conv2d add", "Conv2d PReLU Conv2d", sized=True
    ),
    "Hardtanh": Case(
        residual(*usual(nn.Hardtanh(-2.0, 3.0))), "Conv2d Hardtanh Conv2d add", "Conv2d ChannelClamp Conv2d"
    ),
    "LeakyReLU": Case(
        residual(*usual(nn.LeakyReLU(0.2))), "Conv2d LeakyReLU Conv2d add", "Conv2d PReLU Conv2d", sized=True
    ),
    "PReLU with a slope per channel": Case(
        residual(*usual(nn.PReLU(4))), "Conv2d PReLU Conv2d add", "Conv2d PReLU Conv2d", sized=True
    ),
    "GELU": Case(residual(*usual(nn.GELU())), "Conv2d GELU Conv2d add", "Conv2d MaskedActivation Conv2d"),
    "ReLU and tanh side by side": Case(
        lambda: Sum(nn.Sequential(*usual(nn.ReLU())), nn.Sequential(*usual(nn.Tanh())), act=nn.Identity()),
        "Conv2d ReLU Conv2d Conv2d Tanh Conv2d add",
        "Conv2d PReLU MaskedActivation Conv2d",
        sized=True,
    ),
    "padding modes": Case(
        residual(*(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), conv(4, 4))),
        "Conv2d ReLU Conv2d add",
        "Conv2d PReLU Conv2d",
        sized=True,
    ),
    "an image that may have no batch": Case(
        residual(*usual(nn.ReLU())), "Conv2d ReLU Conv2d add", "Conv2d ChannelClamp Conv2d"
    ),
    "shortcut of several layers": Case(
        residual(conv(4, 6, 3, 2), nn.ReLU(), conv(6, 6), shortcut=nn.Sequential(nn.AvgPool2d(2), conv(4, 6, 1))),
        "Conv2d ReLU Conv2d AvgPool2d Conv2d add",
        "Conv2d PReLU Conv2d",
        sized=True,
    ),
    "a stride in another layer of each": Case(
        residual(conv(4, 4), nn.AvgPool2d(1, 2), shortcut=conv(4, 4, 3, 2)), "Conv2d AvgPool2d Conv2d add", "Conv2d"
    ),
    "zero-dimensional": Case(
        residual(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)),
        "Linear ReLU Linear add",
        "Linear ChannelClamp Linear",
        shape=(16, 4),
        sized=True,
    ),
    "zero-dimensional, rank unknown": Case(
        residual(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)),
        "Linear ReLU Linear add",
        "Linear ChannelClamp Linear",
        shape=(16, 4),
    ),
    "tokens": Case(
        residual(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)),
        "Linear GELU Linear add",
        "Linear MaskedActivation Linear",
        shape=(4, 5, 4),
        sized=True,
    ),
    "one-dimensional": Case(
        NETS["basic_1d_projection"].build,
        "Conv1d BatchNorm1d ReLU Conv1d BatchNorm1d ReLU Conv1d BatchNorm1d Conv1d BatchNorm1d add ReLU",
        "Conv1d BatchNorm1d ReLU Conv1d ReLU Conv1d ReLU",
        shape=(2, 3, 11),
    ),
    "three-dimensional": Case(
        NETS["basic_3d"].build,
        "Conv3d BatchNorm3d ReLU Conv3d BatchNorm3d ReLU Conv3d BatchNorm3d add ReLU",
        "Conv3d BatchNorm3d ReLU Conv3d ReLU Conv3d ReLU",
        shape=(2, 3, 5, 4, 6),
    ),
    "kept norms": Case(
        NETS["basic_identity"].build,
        f"{CBR} {CBR} {CB} add ReLU",
        f"{CBR} {CBR} {CBR}",
        shape=NET,
        rule=RemoveResidual(keep_norms=True),
    ),
}
CONCAT = RemoveResidual(concat=True)


def dense(m: Lambda, x: torch.Tensor) -> torch.Tensor:
    """Two layers of a DenseNet."""
    y = torch.cat((x, m.a(x)), 1)
    return torch.cat((y, m.b(y)), 1)


def dense_layers(c: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), conv(c, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 3))


FIRES |= {
    "a concat skip": Case(
        lambda: Lambda(lambda m, x: torch.cat((m.b(m.a(x).relu()), x), 1), a=conv(4, 6), b=conv(6, 3)),
        "Conv2d ReLU Conv2d cat",
        "Conv2d PReLU Conv2d",
        rule=CONCAT,
        sized=True,
    ),
    "a concat of a concat": Case(
        lambda: Lambda(dense, a=dense_layers(4), b=dense_layers(7)),
        "BatchNorm2d ReLU Conv2d BatchNorm2d ReLU Conv2d cat BatchNorm2d ReLU Conv2d BatchNorm2d ReLU Conv2d cat",
        "Conv2d PReLU Conv2d PReLU Conv2d Conv2d PReLU Conv2d PReLU Conv2d",
        rule=CONCAT,
        sized=True,
    ),
}
UNTOUCHED = {
    "a concat that is not asked for": Case(
        lambda: Lambda(lambda m, x: torch.cat((m.b(m.a(x).relu()), x), 1), a=conv(4, 6), b=conv(6, 3))
    ),
    "a concat of strangers, nothing else": Case(
        lambda: Lambda(lambda m, x: torch.cat((m.a(x).relu(),), 1), a=conv(4, 6)), rule=CONCAT
    ),
    "no sum": Case(lambda: nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4))),
    "a sum with a constant": Case(
        lambda: Lambda(lambda m, x: m.conv(x) + m.grid, conv=conv(4, 4), grid=torch.ones(1, 1, 8, 8))
    ),
}


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_fires(case: Case) -> None:
    assert_fires(case, REMOVE)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_parity(case: Case) -> None:
    assert_parity(case, REMOVE)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_a_second_run_changes_nothing(case: Case) -> None:
    assert_settled(case, REMOVE)


@pytest.mark.parametrize("case", UNTOUCHED.values(), ids=list(UNTOUCHED))
def test_leaves_what_it_does_not_match(case: Case) -> None:
    assert_untouched(case, REMOVE)
