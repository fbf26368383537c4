"""Random residual networks: whatever is converted is equal at every size, whatever is not has its reason."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_nets import networks
from torch import nn

import rmfx
from benchmarks.fuzz import Tally, measure, of_seed
from benchmarks.random_networks import blocks
from benchmarks.random_networks.draw import RECIPES, draw, seeded
from benchmarks.random_networks.judge import Order, Verdict, judge, shrink
from benchmarks.random_networks.program import Network

PATIENT = {"suppress_health_check": list(HealthCheck)}


def check(network: Network, order: Order) -> Verdict:
    """Fails where the conversion is wrong or crashes."""
    verdict = judge(network, order)
    how = f"converted {order}, input {network.shape}, weights of seed {network.seed}:\n{network.source()}"
    assert not verdict.bad, f"{verdict.detail}\n{how}"
    return verdict


@pytest.mark.parametrize("kind", RECIPES)
def test_blocks(kind: str) -> None:
    @settings(max_examples=5 if kind != "in-place partial sum" else 2, **PATIENT)
    @given(networks(kind))
    def run(drawn: tuple[Network, Order]) -> None:
        check(*drawn)

    run()


@pytest.mark.slow
@settings(max_examples=60, **PATIENT)
@given(networks())
def test_sequences_of_blocks(drawn: tuple[Network, Order]) -> None:
    check(*drawn)


@pytest.mark.parametrize(("seed", "kind"), [(11, "pooled branches"), (30, "scaled"), (168, "data-dependent")])
def test_dead_channels_are_looked_for_anew_when_sums_are_gone(seed: int, kind: str) -> None:
    check(draw(random.Random(seed), kind), Order(True, (("drop_dead_channels", True),)))


def test_most_sums_of_ordinary_blocks_are_removed() -> None:
    sums = Counter[str]()
    for seed, kind in enumerate(blocks.RECIPES):
        sums.update(check(draw(random.Random(seed), kind), Order()).sums)
    assert sums.total() >= len(blocks.RECIPES) and sums["removed"] > 0.75 * sums.total()


# -- the generator -----------------------------------------------------------------------------------------------------


def test_a_seed_names_a_network_for_ever() -> None:
    assert seeded(3).source() == seeded(3).source() != seeded(4).source()
    first, second = seeded(3).build().state_dict(), seeded(3).build().state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", RECIPES)
def test_every_recipe_is_drawn(kind: str) -> None:
    drawn = [draw(random.Random(seed), kind) for seed in range(8)]
    assert sum(kind in network.features for network in drawn) >= 3


# -- the judge ---------------------------------------------------------------------------------------------------------


def tampering(change: Any) -> Any:
    """A convert whose result, or whose argument, ``change`` changes."""
    convert = rmfx.convert

    def tampered(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        converted = convert(model, *args, **kwargs)
        with torch.no_grad():
            change(model, converted)
        return converted

    return tampered


def scale_a_carried_tap(model: nn.Module, converted: nn.Module) -> None:
    """One of the Dirac taps is off by a millionth."""
    name, index = next(taps[0] for entry in rmfx.report(converted).entries if (taps := entry.carried_taps))
    dict(converted.named_parameters())[name][index] *= 1 + 1e-6


def touch_the_original(model: nn.Module, converted: nn.Module) -> None:
    """A weight of the caller's changes."""
    next(model.parameters()).mul_(2)


def fail(model: nn.Module, converted: nn.Module) -> None:
    """An error that rmfx does not document."""
    raise KeyError("lost")


def residual_network() -> Network:
    """A network with a sum that is removed with carried taps."""
    for seed in range(100):
        network = draw(random.Random(seed), "bottleneck")
        if judge(network, Order()).sums["removed"] and "identity shortcut" in network.features:
            return network
    raise AssertionError("no bottleneck has an identity shortcut")


@pytest.mark.parametrize(
    ("change", "status"), [(scale_a_carried_tap, "wrong"), (touch_the_original, "wrong"), (fail, "crashed")]
)
def test_the_judge_sees_what_is_wrong(change: Any, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = residual_network()
    monkeypatch.setattr(rmfx, "convert", tampering(change))
    assert judge(network, Order()).status == status


def test_a_failing_network_is_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    network = residual_network()
    monkeypatch.setattr(rmfx, "convert", tampering(scale_a_carried_tap))
    smaller, order = shrink(network, Order(arguments=(("fuse", "never"),)))
    assert judge(smaller, order).status == "wrong"
    assert len(smaller.source()) < len(network.source()) and not order.arguments


def test_the_benchmark_counts_networks_and_sums() -> None:
    tally = Tally([measure(seed) for seed in range(3)])
    summary = tally.summary()
    assert summary["networks"] == 3 and tally.seeds("right") and not tally.seeds("wrong")
    assert of_seed(0)[0].features <= set(summary["features"])  # type: ignore[call-overload]
