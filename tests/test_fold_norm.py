"""fold_norm: batch norms and per-channel scales go into the layer before, or into the one after."""

from __future__ import annotations

import pytest
import torch
from front import Lambda
from one_pass import Case, assert_fires, assert_parity, assert_refuses, assert_settled, assert_untouched
from torch import Tensor, nn

from rmfx.passes.fold_norm import FoldNorm

FOLD = FoldNorm()
NO_STATISTICS = "batch norm without running statistics normalises by the statistics of each batch"
ZERO_PADDING = "zero padding of the outer convolution would see 0 where the inner bias should stand"
UNKNOWN_RANK = "whether BatchNorm1d normalises features or positions depends on the input's rank: pass example_inputs"
TOKENS = (2, 5, 4)


def scaled(*layers: nn.Module, scale: Tensor | float) -> nn.Module:
    """``layers[1](scale * layers[0](x))``."""
    first, second = layers
    constants = {"scale": scale} if isinstance(scale, Tensor) else {}
    return Lambda(
        lambda m, x: m.second(m.first(x) * (m.scale if constants else scale)), first=first, second=second, **constants
    )


FIRES = {
    "norm behind a convolution": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        "Conv2d BatchNorm2d ReLU",
        "Conv2d ReLU",
    ),
    "norm behind a biased, grouped, strided convolution": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.BatchNorm2d(6)), "Conv2d BatchNorm2d", "Conv2d"
    ),
    "norm without weights": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), "Conv2d BatchNorm2d", "Conv2d"
    ),
    "two norms behind a convolution": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)),
        "Conv2d BatchNorm2d BatchNorm2d",
        "Conv2d",
    ),
    "norm before an unpadded convolution": Case(
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)),
        "ReLU BatchNorm2d Conv2d",
        "ReLU Conv2d",
    ),
    "norm before a convolution that pads by reflection": Case(
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
        "BatchNorm2d Conv2d",
        "Conv2d",
    ),
    "norm between two convolutions goes into the first": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)),
        "Conv2d BatchNorm2d Conv2d",
        "Conv2d Conv2d",
    ),
    "scale before a padded convolution, which has no shift": Case(
        lambda: scaled(
            nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), scale=torch.tensor([2.0, -1.0, 0.5, 3.0])[:, None, None]
        ),
        "MaxPool2d ChannelAffine Conv2d",
        "MaxPool2d Conv2d",
        sized=True,
    ),
    "scale by a number": Case(
        lambda: scaled(nn.Conv2d(4, 6, 3), nn.ReLU(), scale=0.3), "Conv2d ChannelAffine ReLU", "Conv2d ReLU"
    ),
    "one dimension": Case(
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)),
        "Conv1d BatchNorm1d",
        "Conv1d",
        shape=(2, 4, 9),
    ),
    "three dimensions": Case(
        lambda: nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.BatchNorm3d(6)),
        "Conv3d BatchNorm3d",
        "Conv3d",
        shape=(2, 4, 5, 4, 3),
    ),
    "features": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()),
        "Linear BatchNorm1d ReLU",
        "Linear ReLU",
        shape=(16, 4),
        sized=True,
    ),
}
REFUSES = {
    "no statistics": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), reason=NO_STATISTICS
    ),
    "padding would see the shift": Case(
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), reason=ZERO_PADDING
    ),
    "norm with two readers before, padded after": Case(
        lambda: Lambda(
            lambda m, x: (lambda y: m.last(m.norm(y)) + y[:, :4])(m.first(x)),
            first=nn.Conv2d(4, 6, 3),
            norm=nn.BatchNorm2d(6),
            last=nn.Conv2d(6, 4, 3, padding=1),
        ),
        reason=ZERO_PADDING,
    ),
    "rank of the features unknown": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), reason=UNKNOWN_RANK, shape=(8, 4)
    ),
    "norm of positions": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)),
        reason="normalises dimension 1 of a 3-dimensional tensor: not its channels",
        shape=TOKENS,
        sized=True,
    ),
    "linear layer in an image": Case(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm2d(4)), reason="has 2 spatial dimensions among layers of 0"
    ),
    "scale of another axis": Case(
        lambda: scaled(nn.MaxPool2d(1), nn.Linear(8, 4), scale=torch.arange(1.0, 5.0)[:, None, None]),
        reason="scales another axis than the channels",
        sized=True,
    ),
    "number of channels unknown": Case(
        lambda: scaled(nn.Sequential(nn.Conv2d(4, 16, 1), nn.PixelShuffle(2)), nn.Conv2d(4, 6, 3), scale=0.3),
        reason="is unknown: pass example_inputs",
    ),
}
UNTOUCHED = {
    "no norm": Case(lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1))),
    "norm between nonlinearities": Case(lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU6())),
    "convolution with a second reader": Case(
        lambda: Lambda(
            lambda m, x: (lambda y: (m.norm(y).relu(), y))(m.conv(x)), conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)
        )
    ),
    "norm with two readers": Case(
        lambda: Lambda(
            lambda m, x: (lambda y: (m.conv(y), y.relu()))(m.norm(x)), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 6, 3)
        )
    ),
    "layer norm and group norm": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 1), nn.LayerNorm(8))
    ),
}


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_fires(case: Case) -> None:
    assert_fires(case, FOLD)


@pytest.mark.parametrize("case", REFUSES.values(), ids=list(REFUSES))
def test_refuses(case: Case) -> None:
    assert_refuses(case, FOLD)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_parity(case: Case) -> None:
    assert_parity(case, FOLD)


@pytest.mark.parametrize("case", FIRES.values(), ids=list(FIRES))
def test_a_second_run_changes_nothing(case: Case) -> None:
    assert_settled(case, FOLD)


@pytest.mark.parametrize("case", UNTOUCHED.values(), ids=list(UNTOUCHED))
def test_leaves_what_it_does_not_match(case: Case) -> None:
    assert_untouched(case, FOLD)
