"""Blocks of published networks whose regions are no two chains (tests/blocks.py): removed, and the same function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import BLOCKS
from front import hostile, operations
from oracle import assert_equivalent
from torch import Tensor, nn

import rmfx
from rmfx import Entry
from rmfx.front.normal import check_normal
from rmfx.hostile import randomise

OPTIONS: dict[str, dict[str, Any]] = {
    "split": {"carrier": "split"},
    "conv": {"downsample": "conv", "fuse": "always"},
    "keep_bn": {"keep_bn": True},
}
# What of a block stays under an option, with part of the reason.
STAYS: dict[tuple[str, str], tuple[int, str]] = {
    ("gate: full", "split"): (1, "which Sigmoid does not satisfy"),
    ("gate: a tensor of the region", "split"): (2, "which Sigmoid does not satisfy"),
    ("slice: clamps of parts", "split"): (1, "which ReLU6 does not satisfy"),
    ("gate: for two products", "split"): (2, "which Sigmoid does not satisfy"),
    ("gate: wavenet, causal", "split"): (2, "which Tanh does not satisfy"),
    ("gate: in a gate", "split"): (1, "which Sigmoid does not satisfy"),
    ("sum: read by both", "split"): (1, "no single layer applies ReLU and Tanh"),
    ("sum: snake", "split"): (2, "which Elementwise does not satisfy"),
    ("sum: functions of elements", "split"): (1, "which Elementwise does not satisfy"),
}
# Where products stay: of gates, and of what follows a block.
GATED = ("gate: ", "slice: mixnet", "sum: a size read off a gate")
BEHIND = {
    "gate: cbam's": {"add"},
    "gate: wavenet of one convolution for both": {"ChannelSlice"},
    "slice: csp": {"cat", "ChannelSlice"},
    "sum: sizes read inside": {"mul"},
}
UNKNOWN = {  # what only example inputs tell, but for the shapes of gates
    "gate: a gated value and itself joined": "'relu' inside the branch is also read outside, by mul, se_pool",
    "slice: features": "a getitem on the branch, picks positions or channels that are not known",
    "sum: space to depth in the branch": "a stride would discard positions",
    "sum: resnet-d": "changes the size in a way that not every branch follows at all input sizes",
}
WITHOUT_SHAPES = "multiplies two tensors: pass example_inputs, their shapes tell which is the gate"


def built(name: str) -> tuple[nn.Module, Tensor]:
    """The block with hostile weights, and a hostile input."""
    torch.manual_seed(0)
    x = hostile(*BLOCKS[name].shape)
    return randomise(BLOCKS[name].build().double(), x / 8), x


def assert_same_at_other_sizes(model: nn.Module, converted: nn.Module, x: Tensor, conditions: bool) -> None:
    """Equal for another batch, and at another size unless the network is guarded against that."""
    assert_equivalent(model, converted, hostile(5, *x.shape[1:], seed=1))
    larger = hostile(3, x.shape[1], *(size + 1 for size in x.shape[2:]), seed=2)
    if x.dim() == 3 and any(type(module) is nn.Linear for module in model.children()):
        larger = hostile(3, x.shape[1] + 1, x.shape[2], seed=2)  # tokens have their features last
    if conditions:
        with pytest.raises(ValueError, match="converted for spatial size"):
            converted(larger)
    else:
        assert_equivalent(model, converted, larger)


def removed(name: str, model: nn.Module, converted: nn.Module, x: Tensor, stays: int = 0) -> list[Entry]:
    """The entries of the removed sums, of which there are as many as there should be; the function is the same."""
    report, block = rmfx.report(converted), BLOCKS[name]
    assert (len(report.entries), report.count("removed")) == (block.sums, max(block.gone - stays, 0))
    check_normal(converted)
    converted.graph.lint()
    assert_equivalent(model, converted, x)
    assert_same_at_other_sizes(model, converted, x, any(entry.size_conditions for entry in report.entries))
    return [entry for entry in report.entries if entry.status == "removed"]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block(name: str) -> None:
    model, x = built(name)
    converted = rmfx.convert(model, x, verify=False)
    entries = removed(name, model, converted, x)
    totals = rmfx.report(converted).totals
    for network, counted in ((model, totals.macs_before), (converted, totals.macs_after)):
        assert counted == macs(network, x)
    taps = [tap for entry in entries for tap in entry.carried_taps]
    assert all(converted.state_dict()[target][index] == 1.0 for target, index in taps)
    left = set(operations(converted)) & {"add", "cat", "ChannelSlice", "mul"}
    assert left - BEHIND.get(name, set()) == ({"mul"} if name.startswith(GATED) else set())


@pytest.mark.parametrize(("name", "option"), [(name, list(OPTIONS)[i % 3]) for i, name in enumerate(BLOCKS)])
def test_options(name: str, option: str) -> None:
    model, x = built(name)
    converted = rmfx.convert(model, x, verify=False, **OPTIONS[option])
    stays, reason = STAYS.get((name, option), (0, ""))
    removed(name, model, converted, x, stays)
    assert not stays or any(reason in (entry.reason or "") for entry in rmfx.report(converted).entries)


@pytest.mark.parametrize("name", sorted({*list(BLOCKS)[::3], *UNKNOWN, "slice: res2net"}))
def test_without_example_inputs(name: str) -> None:
    model, x = built(name)
    converted = rmfx.convert(model, verify=False)
    entries = rmfx.report(converted).entries
    reason = UNKNOWN.get(name, WITHOUT_SHAPES if name.startswith(GATED) else None)
    if reason is None:
        assert all(entry.status == "removed" for entry in entries) and len(entries) == BLOCKS[name].sums
    else:
        assert any(reason in (entry.reason or "") for entry in entries)
    assert_equivalent(model, converted, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_auto_costs_no_more_than_any_carrier(name: str) -> None:
    model, x = built(name)
    auto, *forced = (rmfx.explain(model, x, carrier=wish) for wish in ("auto", "masked", "split"))
    for report in forced:
        assert report.count("removed") <= auto.count("removed")
        if report.count("removed") == auto.count("removed"):
            assert auto.totals.macs_after <= report.totals.macs_after


def test_explain_foretells() -> None:
    for name in ("gate: se inline", "slice: mixnet", "sum: deep"):
        model, x = built(name)
        assert rmfx.explain(model, x) == rmfx.report(rmfx.convert(model, x))


def macs(network: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates per sample, counted while running."""
    total = 0

    def count(module: nn.Module, _: object, y: Tensor) -> None:
        nonlocal total
        total += y.numel() // x.shape[0] * module.weight[0].numel()

    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", ["gate: se inline", "gate: se, hard sigmoid", "slice: res2net"])
def test_half_precision(name: str) -> None:
    model, x = built(name)
    for dtype in (torch.float16, torch.bfloat16):
        half = rmfx.convert(model.to(dtype), x.to(dtype), verify=False)
        assert {tensor.dtype for tensor in half.state_dict().values() if tensor.is_floating_point()} == {dtype}
        assert torch.isfinite(half(x.to(dtype))).all()
