"""Random residual networks: whatever is converted is equal at every size, whatever is not has its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from front import hostile
from oracle import relative_difference
from random_nets import network
from torch import Tensor, nn

import rmfx
from rmfx.front.normal import check_normal
from rmfx.hostile import randomise

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "split": {"carrier": "split", "downsample": "input"},
    "conv": {"downsample": "conv", "fuse": "always"},
    "keep_bn": {"keep_bn": True},
}
SIZES = ((8, 9), (9, 8), (10, 12), (7, 7))


def runnable(seed: int) -> nn.Module | None:
    """The network of ``seed`` with hostile weights, or nothing where its branches do not fit."""
    torch.manual_seed(seed)
    model = network(seed).double()
    try:
        return randomise(model, hostile(2, 3, 8, 9, seed=seed) / 8, seed)
    except (RuntimeError, ValueError):
        return None


def run(model: nn.Module, x: Tensor) -> Tensor | None:
    """The output, or nothing where the network says that it does not take this size."""
    with torch.no_grad():
        try:
            return model(x)
        except RuntimeError:
            return None


RUNNABLE = [seed for seed in range(120) if runnable(seed) is not None][:60]


def test_most_random_networks_are_converted() -> None:
    removed = total = 0
    for seed in RUNNABLE[:40]:
        report = rmfx.explain(runnable(seed), hostile(2, 3, 8, 9))
        removed, total = removed + report.count("removed"), total + len(report.entries)
    assert total > 60 and removed > 0.75 * total


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("seed", RUNNABLE)
def test_random_networks(seed: int, option: str) -> None:
    model = runnable(seed)
    assert model is not None
    sized = seed % 2 == 0
    converted = rmfx.convert(model, hostile(2, 3, 8, 9) if sized else None, verify=False, **OPTIONS[option])
    report = rmfx.report(converted)
    assert all((entry.status == "removed") == (entry.reason is None) for entry in report.entries)
    if option != "keep_bn":
        check_normal(converted)
    conditions = any(entry.size_conditions for entry in report.entries)
    compared = 0
    for size in SIZES[:1] if conditions else SIZES:
        x = hostile(2, 3, *size, seed=seed)
        want = run(model, x)
        if want is None:
            continue
        got = run(converted, x)
        assert got is not None and got.shape == want.shape
        assert relative_difference(want, got) < 1e-11
        compared += 1
    assert compared
