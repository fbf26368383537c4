"""Which channels are live: those that change an output."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from front import hostile, normal_form
from nets import conv
from torch import Tensor, nn

from rmfx.graph.facts import annotate
from rmfx.graph.live import live_of
from rmfx.modules import ChannelPad, ChannelSlice


class Readers(nn.Module):
    """Readers of every kind behind one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(4, 6, 1), conv(4, 2, 1)
        self.cut, self.pad, self.wide = ChannelSlice(1, 4), ChannelPad(1, 1), conv(8, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem(x)
        return self.head(self.cut(y)), self.wide(self.pad(y).relu() * 1.0)


def test_live_channels_are_those_that_change_an_output() -> None:
    seen: Counter[bool] = Counter()
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        model = Readers().double().eval()
        with torch.no_grad():
            for layer in (model.head, model.wide):
                layer.weight *= torch.rand(1, layer.weight.shape[1], 1, 1, generator=random) < 0.4
        gm = normal_form(model)
        x = hostile(2, 4, 8, 8)
        annotate(gm, (x,))
        stem = next(node for node in gm.graph.nodes if node.target == "stem")
        live = live_of(stem, 2).expand(6)
        with torch.no_grad():
            want = model(x)
            for channel in range(6):
                other = copy.deepcopy(model)
                other.stem.weight[channel] += 1.0
                changed = any(not torch.equal(a, b) for a, b in zip(want, other(x), strict=True))
                assert changed == bool(live[channel])
                seen[changed] += 1
    assert min(seen.values()) > 20
