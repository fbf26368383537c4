"""lower_carried: carried channels become shortcuts again, beside the stack or in a sum behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import assert_equivalent
from torch import Tensor, nn

import rmfx
from rmfx import models
from rmfx.graph.cost import network_macs, network_parameters
from rmfx.hostile import randomise
from rmfx.measure.target import Target
from rmfx.plan.value import Choice, Plan
from rmfx.prepare import prepare

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "basic and projections": (models.resnet20, (2, 3, 17, 15)),
    "pre-activation": (models.preact_resnet18, (2, 3, 33, 31)),
    "grouped": (models.rmnet26x3_32, (2, 3, 17, 15)),
}


def hostile(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """The network in float64 with hostile statistics, and an input."""
    torch.manual_seed(0)
    x = 8 * torch.randn(*shape, dtype=torch.float64)
    return randomise(build().double().eval(), x / 8, 0), x


def costs(model: nn.Module, x: Tensor) -> tuple[int | None, int]:
    """MACs and parameters."""
    return network_macs(prepare(model, x, {}).gm), network_parameters(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back_costs_what_it_did(name: str) -> None:
    model, x = hostile(*NETWORKS[name])
    plain = rmfx.convert(model, x, verify=False)
    lowered = rmfx.lower(plain, x)
    folded = rmfx.convert(model, x, policy=[], verify=False)
    (wide, _), (macs, parameters), (least, fewest) = (costs(net, x) for net in (plain, lowered, folded))
    assert wide is not None and macs is not None and least is not None
    assert macs <= least < wide and parameters <= fewest  # dead channels of the original may go, too
    assert_equivalent(model, lowered, x)


@pytest.mark.parametrize("carrier", ["masked", "split"])
def test_signed_values_come_back_from_every_carrier(carrier: str, tmp_path: Path) -> None:
    model, x = hostile(lambda: models.mobilenet_v1_shaped(width_multiple=0.25), (2, 3, 32, 32))
    plain = rmfx.convert(model, x, carrier=carrier, fuse="never", verify=False)
    lowered = rmfx.lower(rmfx.load(rmfx.save(plain, tmp_path / "net.rmfx")), x)
    assert costs(lowered, x)[1] < costs(plain, x)[1]
    assert_equivalent(model, lowered, x)


def test_a_second_time_changes_nothing() -> None:
    model, x = hostile(*NETWORKS["grouped"])
    once = rmfx.lower(rmfx.convert(model, x, verify=False), x)
    assert rmfx.lower(once, x).code == once.code


def test_nothing_is_lowered_where_nothing_is_carried() -> None:
    model, x = hostile(*NETWORKS["grouped"])
    kept = rmfx.convert(model, x, policy=[], verify=False)
    assert rmfx.lower(kept, x).code == kept.code


def test_what_is_almost_a_dirac_filter_is_none() -> None:
    model, x = hostile(*NETWORKS["basic and projections"])
    plain = rmfx.convert(model, x, verify=False)
    taps = [tap for entry in rmfx.report(plain).entries for tap in entry.carried_taps]
    with torch.no_grad():
        for entry in rmfx.report(plain).entries:
            for name, _ in entry.carried_taps:
                weight = plain.get_parameter(name)
                weight[weight == 1] = 1 + 1e-6
    assert taps
    touched = rmfx.lower(plain, x)
    assert_equivalent(plain, touched, x)


def test_chains_of_runs_go_beside_the_stack() -> None:
    model, x = hostile(lambda: models.mobilenet_v1_shaped(width_multiple=0.25), (2, 3, 32, 32))
    plan = rmfx.make_plan(model, x, target="onnxruntime", measure=False)
    found = plan.choices
    lowered = [choice for choice in found if choice.rule == "lower_carried"]
    assert lowered, "the plan lowers nothing"
    forced = tuple(Choice(c.rule, c.node, c.place, True, c.variant) for c in found if c.applied)
    planned = rmfx.apply_plan(Plan(Target("onnxruntime"), choices=forced), model, x)
    assert any(node.target is torch.cat for node in planned.graph.nodes)
    assert not any(isinstance(layer, nn.PReLU) for layer in planned.modules())
    assert_equivalent(model, planned, x)
