"""Figures of whole networks: counted on the network, planned by rmfx, and derived by channel arithmetic alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from oracle import assert_equivalent
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rmfx
from rmfx.hostile import randomise
from rmfx.report import Report

TABLES_WITHIN = 0.01  # the paper rounds, and counts a few elementwise operations as well


def parameters(model: nn.Module) -> float:
    """In millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def macs(model: nn.Module, size: int) -> float:
    """In thousands of millions, of one image, without computing anything."""
    model = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size, device="meta", dtype=next(model.parameters()).dtype))
    return counter.get_total_flops() / 2e9


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The network in eval mode, without memory for its weights."""
    with torch.device("meta"):
        return build().eval()


def planned(build: Callable[[], nn.Module], size: int, **options: Any) -> Report:
    """What conversion would make of the network, at its real widths; asserts that no sum stays."""
    report = rmfx.explain(on_meta(build), torch.zeros(1, 3, size, size, device="meta"), **options)
    assert report.count("kept") == report.count("refused") == 0, report
    return report


def conv(c_in: int, c_out: int, kernel: int = 1, groups: int = 1, bias: bool = True) -> int:
    """Parameters of a square convolution."""
    return c_in // groups * c_out * kernel**2 + c_out * bias


def linear(c_in: int, c_out: int) -> int:
    """Parameters of a linear layer."""
    return c_in * c_out + c_out


def assert_converts(net: nn.Module, parameters_of_plain: int, size: int = 16, sums: int = 0, **options: Any) -> None:
    """Hostile weights, then conversion: ``sums`` removed and none left, a chain of so many parameters, equal outputs.

    At an even and an odd size, on batches of 2, in float64.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, size, size, dtype=torch.float64, generator=random)
    net = randomise(net.double(), x)
    plain = rmfx.convert(net, x[:1], **options)
    report = rmfx.report(plain)
    assert (report.count("removed"), report.count("kept"), report.count("refused")) == (sums, 0, 0), report
    rmfx.to_sequential(plain)  # raises where it is no chain
    assert sum(p.numel() for p in plain.parameters()) == parameters_of_plain
    for side in (size, size + 1):
        assert_equivalent(net, plain, torch.randn(2, 3, side, side, generator=random) * 8)
