"""``randomise``: statistics that fit the data, both signs, reproducible, nothing left behind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmfx.hostile import VARIANCE_FLOOR, randomise

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def deep(depth: int = 12) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers)


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_every_norm_sees_about_the_statistics_it_holds() -> None:
    model = randomise(deep(), X)
    seen: dict[nn.Module, Tensor] = {}
    for norm in norms(model):
        norm.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0]))
    model(X)
    for norm in norms(model):
        variance, mean = torch.var_mean(seen[norm], dim=(0, 2, 3), correction=0)
        ratio = norm.running_var / variance.clamp_min(VARIANCE_FLOOR * variance.mean())
        assert ratio.min() > 0.49 and ratio.max() < 2.01 and ratio.std() > 0.1
        shift = (norm.running_mean - mean) / variance.clamp_min(VARIANCE_FLOOR * variance.mean()).sqrt()
        assert 0.05 < shift.abs().mean() < 0.6


def test_scales_have_both_signs_and_nothing_is_trivial() -> None:
    model = randomise(deep(), X)
    for norm in norms(model):
        assert (norm.weight > 0).any() and (norm.weight < 0).any() and norm.weight.abs().min() >= 0.5
        assert (norm.bias != 0).all() and (norm.running_mean != 0).all()
        assert norm.bias.abs().max() <= 1.5


def test_values_keep_about_unit_size_through_many_layers() -> None:
    y = randomise(deep(60), X)(X)
    assert 0.05 < y.std() < 20


def test_the_seed_decides_and_nothing_stays_behind() -> None:
    first, again, other = (randomise(deep(2), X, seed=s) for s in (1, 1, 2))
    states = [m.state_dict() for m in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not torch.equal(states[0]["3.weight"], states[2]["3.weight"])
    assert not first.training and not any(m._forward_pre_hooks for m in first.modules())


def test_a_constant_channel_gets_a_positive_variance() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    randomise(model, X * 0)
    assert (model[2].running_var > 0).all() and torch.isfinite(model(X)).all()


def test_norms_without_statistics_are_left_without() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), X)
    assert model[1].running_mean is None and model[1].running_var is None
