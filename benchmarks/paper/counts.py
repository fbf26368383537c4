"""Parameters and MACs of a network in the form in which it is deployed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import rmfx


@dataclass(frozen=True)
class Counts:
    """Of the whole network; MACs of one image."""

    parameters: int
    macs: int


def deployed(
    build: Callable[[], nn.Module], keeps_shortcuts: bool = False, *, fuse: str = "cheaper", device: str = "cpu"
) -> nn.Module:
    """The network ready to run: norms folded, parallel convs merged, shortcuts removed unless it keeps them."""
    with torch.device(device):
        network = build().eval()
    return rmfx.convert(network, policy=[] if keeps_shortcuts else "all", fuse=fuse)


def count(
    build: Callable[[], nn.Module], keeps_shortcuts: bool, shape: tuple[int, ...], *, fuse: str = "cheaper"
) -> Counts:
    """The counts of :func:`deployed`, without computing a weight."""
    with torch.device("meta"):
        network = build().eval()
    images = torch.zeros(1, *shape, device="meta")
    totals = rmfx.explain(network, images, policy=[] if keeps_shortcuts else "all", fuse=fuse).totals
    assert totals.macs_after is not None
    return Counts(totals.params_after, totals.macs_after)
