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
from rmfx.front.normal import check_normal
from rmfx.hostile import randomise

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "split": {"carrier": "split"},
    "conv": {"downsample": "conv", "fuse": "always"},
    "keep_bn": {"keep_bn": True},
}
# What of a block stays under an option, with part of the reason.
STAYS: dict[tuple[str, str], tuple[int, str]] = {
    ("gate: full", "split"): (1, "which Sigmoid does not satisfy"),
    ("gate: a tensor of the region", "split"): (2, "which Sigmoid does not satisfy"),
    ("slice: clamps of parts", "split"): (1, "which ReLU6 does not satisfy"),
    ("sum: read by both", "split"): (1, "no single layer applies ReLU and Tanh"),
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


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_block(name: str, option: str) -> None:
    block, (model, x) = BLOCKS[name], built(name)
    converted = rmfx.convert(model, x, verify=False, **OPTIONS[option])
    report = rmfx.report(converted)
    stays, reason = STAYS.get((name, option), (0, ""))
    assert (len(report.entries), report.count("removed")) == (block.sums, max(block.gone - stays, 0))
    assert not stays or any(reason in (entry.reason or "") for entry in report.entries)
    check_normal(converted)
    converted.graph.lint()
    assert_equivalent(model, converted, x)
    assert_same_at_other_sizes(model, converted, x, any(entry.size_conditions for entry in report.entries))


@pytest.mark.parametrize("name", BLOCKS)
def test_without_example_inputs(name: str) -> None:
    model, x = built(name)
    converted = rmfx.convert(model, verify=False)
    entries = rmfx.report(converted).entries
    if name.startswith("gate: ") or name in ("slice: mixnet", "sum: a size read off a gate"):
        assert any(WITHOUT_SHAPES in (entry.reason or "") for entry in entries)
    else:
        assert all(entry.status == "removed" for entry in entries) and len(entries) == BLOCKS[name].sums
    assert_equivalent(model, converted, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_is_left_beside_the_sequence(name: str) -> None:
    block, (model, x) = BLOCKS[name], built(name)
    if block.gone < block.sums:
        return assert_equivalent(model, rmfx.convert(model, x), x)
    left = operations(rmfx.convert(model, x, verify=False))
    assert "add" not in left and "cat" not in left and "ChannelSlice" not in left
    gated = name.startswith("gate: ") or name in (
        "slice: mixnet",
        "sum: a size read off a gate",
        "sum: sizes read inside",
    )
    assert ("mul" in left) == gated


@pytest.mark.parametrize("name", BLOCKS)
def test_the_report_counts_what_runs(name: str) -> None:
    model, x = built(name)
    converted = rmfx.convert(model, x, verify=False)
    report = rmfx.report(converted)
    assert report == rmfx.explain(model, x)
    for network, counted in ((model, report.totals.macs_before), (converted, report.totals.macs_after)):
        assert counted == macs(network, x)
    for entry in report.entries:
        for target, tap in entry.carried_taps:
            assert converted.state_dict()[target][tap] == 1.0


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
        assert {tensor.dtype for tensor in half.state_dict().values()} == {dtype}
        assert torch.isfinite(half(x.to(dtype))).all()
