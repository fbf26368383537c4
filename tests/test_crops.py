"""Slices of images and sequences that leave constant numbers of positions out: which are paddings, and which stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from front import Lambda, assert_exact, hostile, image, layer, operations
from oracle import assert_equivalent
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rmfx
from rmfx.front.trace import trace
from rmfx.passes.normalise import normalise

CROPS: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = [
    (lambda y: y[..., 2:-2, 1:-1], (-1, -1, -2, -2)),
    (lambda y: y[:, :, 1:], (0, 0, -1, 0)),
    (lambda y: y[:, :, :, :-3], (0, -3, 0, 0)),
    (lambda y: y[..., 0:-1, 0:], (0, 0, 0, -1)),
    (lambda y: y[..., 1::1], (-1, 0, 0, 0)),
]
STAY: list[Callable[[Tensor], Tensor]] = [
    lambda y: y[:, :, :3],
    lambda y: y[:, :, -3:],
    lambda y: y[:, :, 1:-1:2],
    lambda y: y[1:, :, 1:],
    lambda y: y[:, :, 1, 1:],
    lambda y: y[:, :, 1:, None],
    lambda y: y[:, :, y.size(3) - 4 :],
]


@pytest.mark.parametrize("index", range(len(CROPS)))
def test_crops_are_paddings(index: int) -> None:
    function, widths = CROPS[index]
    gm = assert_exact(Lambda(lambda m, x: function(m.conv(x)), conv=nn.Conv2d(4, 4, 3, padding=1)), image())
    assert operations(gm) == ["Conv2d", "ZeroPad2d"] and layer(gm, nn.ZeroPad2d).padding == widths


@pytest.mark.parametrize("index", range(len(STAY)))
def test_other_slices_stay(index: int) -> None:
    model = Lambda(lambda m, x: STAY[index](m.conv(x)), conv=nn.Conv2d(4, 4, 3, padding=1))
    assert operations(assert_exact(model, image()))[-1] == "getitem"


def test_sequences_and_volumes() -> None:
    sequence = Lambda(lambda m, x: m.conv(x)[:, :, :-2], conv=nn.Conv1d(4, 4, 3, padding=2))
    assert operations(assert_exact(sequence, hostile(2, 4, 9))) == ["Conv1d", "ZeroPad1d"]
    volume = Lambda(lambda m, x: m.conv(x)[:, :, 1:-1, 1:-1, 1:-1], conv=nn.Conv3d(4, 4, 1))
    assert operations(assert_exact(volume, hostile(2, 4, 5, 6, 7))) == ["Conv3d", "ZeroPad3d"]


def test_a_crop_that_leaves_nothing_stays() -> None:
    model = Lambda(lambda m, x: m.conv(x)[..., 4:-4, :], conv=nn.Conv2d(4, 4, 1)).double().eval()
    gm = normalise(trace(model), inputs=(image(),))
    assert operations(gm) == ["Conv2d", "getitem"] and gm(image()).shape == model(image()).shape == (2, 4, 0, 5)


def test_an_image_smaller_than_its_crop_is_an_error() -> None:
    model = Lambda(lambda m, x: m.conv(x)[..., 2:-2, 2:-2], conv=nn.Conv2d(4, 4, 1)).eval()
    gm = normalise(trace(model), inputs=(torch.rand(1, 4, 9, 9),))
    with pytest.raises(RuntimeError, match="negative"):
        gm(torch.rand(1, 4, 3, 3))


class TemporalBlock(nn.Module):
    """TCN: causal convolutions that pad both ends and throw the end away."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.width = 2 * dilation
        wn = parametrizations.weight_norm
        self.a, self.b = (wn(nn.Conv1d(6, 6, 3, padding=self.width, dilation=dilation)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x)[:, :, : -self.width])
        y = torch.relu(self.b(y)[:, :, : -self.width].contiguous())
        return torch.relu(x + y)


@pytest.mark.parametrize("sized", [True, False])
def test_temporal_convolutional_networks(sized: bool) -> None:
    model = nn.Sequential(nn.Conv1d(3, 6, 1), *(TemporalBlock(2**i) for i in range(2))).double().eval()
    result = rmfx.convert(model, *((hostile(2, 3, 20),) if sized else ()))
    assert rmfx.report(result).count("removed") == 2
    for length in (20, 21, 9):
        assert_equivalent(model, rmfx.to_sequential(result), hostile(2, 3, length))


@pytest.mark.parametrize("sized", [True, False])
def test_a_shortcut_that_is_cropped(sized: bool) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        return torch.relu(x[..., 2:-2, 2:-2] + m.b(m.a(x)))

    layers = {"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 4, 3)}
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Lambda(forward, **layers)).double().eval()
    x = hostile(2, 4, 9, 8)
    result = rmfx.convert(model, *((x,) if sized else ()))
    assert rmfx.report(result).count("removed") == 1
    assert_equivalent(model, result, x)
