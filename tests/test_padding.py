"""Convolutions that pad unevenly: no larger kernels than before, counted as they are, and lowered as others are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from front import Lambda, hostile
from oracle import assert_equivalent
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rmfx
from rmfx.hostile import randomise
from rmfx.vision import import_timm


def _causal(m: Any, x: Tensor) -> Tensor:
    """A TCN, without its crops."""
    for a, b in zip(m.a, m.b, strict=True):
        x = (x + b(nn.functional.pad(a(nn.functional.pad(x, (4, 0))).relu(), (4, 0)))).relu()
    return x


def _causal_layers() -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Conv1d(6, 6, 3, dilation=2), nn.BatchNorm1d(6)) for _ in range(2))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[int, ...]]]] = {
    "causal": (lambda: Lambda(_causal, a=_causal_layers(), b=_causal_layers()), (2, 6, 11), [(3,)] * 4),
    "one side of an image": (
        lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), nn.ReLU()),
        (2, 3, 8, 9),
        [(3, 3)],
    ),
    "one side of one axis": (
        lambda: nn.Sequential(nn.ZeroPad2d((1, 1, 0, 2)), nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), nn.ReLU()),
        (2, 3, 8, 9),
        [(3, 3)],
    ),
    "same": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, (4, 2), padding="same"), nn.BatchNorm2d(5), nn.ReLU()),
        (2, 3, 8, 9),
        [(4, 2)],
    ),
    "cropped on one side": (
        lambda: nn.Sequential(nn.ZeroPad1d((-2, 1)), nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU()),
        (2, 3, 9),
        [(3,)],
    ),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A network with hostile weights, and its input."""
    build, shape, _ = NETS[name]
    torch.manual_seed(0)
    return randomise(build().double(), hostile(*shape) / 8), hostile(*shape)


def macs(network: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates per sample, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return counter.get_total_flops() // 2 // len(x)


def kernels(network: nn.Module) -> list[tuple[int, ...]]:
    """Kernel sizes of all convolutions."""
    return [m.kernel_size for m in network.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))]


@pytest.mark.parametrize("fuse", ["cheaper", "always"])
@pytest.mark.parametrize("name", NETS)
def test_kernels_stay_as_they_are(name: str, fuse: str) -> None:
    model, x = built(name)
    converted = rmfx.convert(model, x, verify=False, fuse=fuse)
    report = rmfx.report(converted)
    assert kernels(converted) == NETS[name][2] and report.count("refused") == 0
    assert report.totals.macs_after == macs(converted, x)
    assert report.totals.params_after == sum(p.numel() for p in converted.parameters())
    assert_equivalent(model, converted, x)
    assert_equivalent(model, converted, hostile(3, x.shape[1], *(size + 1 for size in x.shape[2:]), seed=1))


def test_lowering_sees_through_the_padding() -> None:
    model, x = built("causal")
    plain = rmfx.convert(model, x, verify=False)
    lowered = rmfx.lower(plain)
    assert sum(module.out_channels for module in plain.modules() if isinstance(module, nn.Conv1d)) > 24
    assert [(m.in_channels, m.out_channels) for m in lowered.modules() if isinstance(m, nn.Conv1d)] == [(6, 6)] * 4
    assert kernels(lowered) == [(3,)] * 4
    assert_equivalent(model, lowered, x)


def test_lowering_leaves_other_padding_as_it_is() -> None:
    layers = (nn.ReLU(), nn.ZeroPad1d((2, 0)), nn.Conv1d(3, 3, 3, padding=1, padding_mode="reflect"))
    plain = nn.Sequential(nn.Conv1d(3, 3, 1), *layers).double().eval()
    lowered = rmfx.lower(plain)
    assert [type(module) for module in lowered.children()].count(nn.ZeroPad1d) == 1
    assert_equivalent(plain, lowered, hostile(2, 3, 9))


@pytest.mark.parametrize("name", ["tf_mobilenetv3_small_100", "tf_mixnet_s"])
def test_networks_of_tensorflow_cost_what_is_reported(name: str) -> None:
    torch.manual_seed(0)
    model, x = import_timm().create_model(name).eval(), torch.randn(2, 3, 64, 64)
    converted = rmfx.convert(model, x)
    totals = rmfx.report(converted).totals
    assert (totals.macs_before, totals.macs_after) == (macs(model, x), macs(converted, x))
    assert totals.params_after == sum(p.numel() for p in converted.parameters())
