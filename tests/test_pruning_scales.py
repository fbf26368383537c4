"""Scales of shortcuts: the same function, trainable, and what training switches off is gone from the plain network."""

from __future__ import annotations

import pytest
import torch
from nets import NETS, build
from oracle import assert_equivalent
from torch import Tensor, nn

import rmfx
from rmfx.errors import RmfxError
from rmfx.hostile import randomise
from rmfx.learn import Recipe, Slimming, open_data, train
from rmfx.learn.schedule import rate_at
from rmfx.learn.slimming import OFF
from rmfx.models import resnet20, vgg16
from rmfx.modules import ChannelAffine
from rmfx.pruning.prune import prune
from rmfx.pruning.scales import scale_shortcuts

WITHOUT = {
    "repvgg",
    "repvgg_strided",
    "acnet",
    "diracnet",
    "dbb",
    "mobileone",
    "two_branches",
}  # all or none are linear


def scales_of(network: nn.Module) -> list[Tensor]:
    return [p for name, p in network.named_parameters() if "shortcut_scale" in name]


@pytest.mark.parametrize("name", NETS)
def test_scales_keep_the_function_and_convert(name: str) -> None:
    model, x = build(name)
    if name in WITHOUT:
        with pytest.raises(RmfxError, match="no shortcut to scale"):
            scale_shortcuts(model, x)
        return
    scaled = scale_shortcuts(model, x)
    assert scales_of(scaled) and all(bool((s == 1).all()) and s.requires_grad for s in scales_of(scaled))
    assert_equivalent(model, scaled, x)
    with torch.no_grad():
        for index, scale in enumerate(scales_of(scaled)):
            scale.uniform_(0, 2, generator=torch.Generator().manual_seed(index))
    plain = rmfx.convert(scaled, x)
    assert_equivalent(scaled, plain, x)
    assert rmfx.report(plain).count("removed") > 0


@pytest.mark.parametrize("keep_bn", [False, True])
def test_a_shortcut_that_is_switched_off_costs_nothing(keep_bn: bool) -> None:
    torch.manual_seed(0)
    x = 8 * torch.randn(2, 3, 16, 16, dtype=torch.float64)
    scaled = scale_shortcuts(randomise(resnet20().double().eval(), x / 8, 0), x)
    off = 0
    with torch.no_grad():
        for scale in scales_of(scaled):
            scale[::2] = 0
            off += len(scale) // 2
    plain = rmfx.convert(scaled, x, keep_bn=keep_bn)
    pruned = prune(plain, x, threshold=1e-9, importance="l2")
    assert_equivalent(scaled, pruned.network, x)
    gone = sum(width.before - width.after for width in pruned.widths)
    padded = 16 + 32  # channels that the shortcuts of two stages fill with zeros are not carried anyway
    assert off - padded <= gone <= off and pruned.error < 1e-12


def test_slimming_brings_scales_down_and_keeps_them_above_0() -> None:
    data = open_data("digits")
    sums: list[float] = []
    for factor in (0.0, 0.1):
        torch.manual_seed(0)
        network = scale_shortcuts(resnet20(in_channels=1), torch.zeros(1, *data.shape))
        train(network, data, Recipe(epochs=3, batch=128), objective=Slimming(factor / 100, factor))
        scales = torch.cat([s.detach().flatten() for s in scales_of(network)])
        sums.append(float(scales.sum()))
        assert bool(((scales == 0) | (scales >= OFF)).all())
    assert sums[1] < 0.6 * sums[0]


def test_scales_that_training_takes_below_notice_are_exactly_0() -> None:
    scale = ChannelAffine(nn.Parameter(torch.tensor([1.0, 1.1 * OFF, 0.9 * OFF, -1.0])))
    slimming = Slimming(0.1)
    slimming.start(nn.Sequential(nn.BatchNorm2d(4), scale))
    slimming.progress(scale, 1.0)
    assert (scale.weight != 0).tolist() == [True, True, False, False]


def test_the_penalty_is_the_sum_of_all_scales() -> None:
    network = nn.Sequential(nn.BatchNorm2d(2), ChannelAffine(nn.Parameter(torch.tensor([0.5, -1.0]))))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, -3.0]))  # type: ignore[operator]
    slimming = Slimming(0.1, 0.01, ramp=0.5)
    slimming.start(network)
    slimming.progress(network, 0.25)
    loss = slimming.loss(torch.tensor(1.0), torch.zeros(1, 2), torch.zeros(1))
    assert float(loss.detach()) == pytest.approx(1 + 0.5 * (0.1 * 4 + 0.01 * 0.5)), "the scale below 0 is held at 0"


@pytest.mark.parametrize(("momentum", "ramp"), [(0.0, 0.0), (0.9, 0.2)])
def test_how_far_scales_come_down_is_known_before(momentum: float, ramp: float) -> None:
    recipe = Recipe(epochs=8, learning_rate=0.1, momentum=momentum, warmup=1)
    network = nn.Sequential(nn.BatchNorm2d(3))
    optimiser = torch.optim.SGD(network.parameters(), 0.1, momentum)
    slimming, steps = Slimming(4e-4, ramp=ramp), 250
    slimming.start(network)
    for step in range(recipe.epochs * steps):
        slimming.progress(network, step / (recipe.epochs * steps))
        optimiser.param_groups[0]["lr"] = rate_at(recipe, step, steps)
        optimiser.zero_grad()
        slimming.loss(torch.zeros(()), torch.zeros(1, 2), torch.zeros(1)).backward()
        optimiser.step()
    moved = 1 - float(network[0].weight.detach().max())  # type: ignore[union-attr, operator]
    assert slimming.reach(recipe, steps)[0] == pytest.approx(moved, rel=0.02) and 0.01 < moved < 1


def test_bad_requests_say_what_to_do() -> None:
    with pytest.raises(RmfxError, match="factors must not be negative and ramp be from 0 to 1"):
        Slimming(-1.0)
    with pytest.raises(RmfxError, match="slimming needs batch norms or scales of shortcuts"):
        Slimming(1.0).start(nn.Linear(2, 2))
    with pytest.raises(RmfxError, match="no shortcut to scale"):
        scale_shortcuts(vgg16(), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("every", [1, 2])
def test_conversion_carries_nothing_for_what_is_switched_off(every: int) -> None:
    torch.manual_seed(0)
    x = 8 * torch.randn(2, 3, 17, 17, dtype=torch.float64)
    scaled = scale_shortcuts(randomise(resnet20().double().eval(), x / 8, 0), x)
    with torch.no_grad():
        for scale in scales_of(scaled):
            scale[::every] = 0
    carrying = rmfx.convert(scaled, x)
    dropping = rmfx.convert(scaled, x, drop_dead_channels=True)
    assert_equivalent(scaled, dropping, x)
    [before, wide, narrow] = [
        [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        for network in (resnet20(), carrying, dropping)
    ]
    if every == 1:
        assert narrow == before
    else:
        assert sum(before) < sum(narrow) < sum(wide)
