"""drop_dead_channels on random chains: what is planted is found and dropped, and the network stays the same."""

from __future__ import annotations

from collections import Counter

import torch
from front import hostile, normal_form
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_equivalent
from planted import widths
from torch import nn

from rmfx.graph.emit import emit, storage_table
from rmfx.graph.facts import annotate
from rmfx.graph.rewriter import sweep
from rmfx.passes.drop_dead_channels import DropDeadChannels

RULE = DropDeadChannels()
FLOAT64 = torch.float64


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Sequential, list[int], int]:
    """A random chain in float64, the widths that are left of its layers, and how much was planted."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    widths = [draw(st.integers(4, 9)) for _ in range(draw(st.integers(2, 4)))]
    channels = [3, *widths, 4]
    layers: list[nn.Module] = []
    left, planted = [], 0
    previous: nn.Conv2d | None = None
    for index, (c_in, c_out) in enumerate(zip(channels, channels[1:], strict=False)):
        k = draw(st.sampled_from((1, 3)))
        pads = k == 3 and draw(st.booleans())
        layer = nn.Conv2d(c_in, c_out, k, padding=1 if pads else 0, dtype=FLOAT64)
        nn.init.normal_(layer.weight, 0, (c_in * k * k) ** -0.5, generator=random)
        nn.init.normal_(layer.bias, 0, 0.5, generator=random)
        if previous is not None:
            kinds = draw(st.lists(st.sampled_from("kkkdzc"), min_size=c_in, max_size=c_in))
            count = Counter(kinds)
            with torch.no_grad():
                for channel, kind in enumerate(kinds):
                    if kind == "d":
                        layer.weight[:, channel] = 0.0
                    if kind in "zc":
                        previous.weight[channel] = 0.0
                        previous.bias[channel] = -1.0 if kind == "z" else 0.5 + channel
            stay = min(count["c"], 1) if pads else 0
            left.append(max(count["k"] + stay, 1))
            planted += count["d"] + count["z"] + max(count["c"] - stay, 0)
        layers += [layer, *([] if index == len(widths) else [draw(st.sampled_from((nn.ReLU(), nn.ReLU6())))])]
        previous = layer
    return nn.Sequential(*layers).eval(), left, planted


def test_planted_channels_are_found_and_dropped() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=80)
    @given(networks())
    def check(drawn: tuple[nn.Sequential, list[int], int]) -> None:
        model, left, planted = drawn
        gm, x = normal_form(model), hostile(2, 3, 12, 11)
        annotate(gm, None)
        tensors = storage_table(gm)
        sweeps = 0
        while sweep(gm, RULE).changed:
            sweeps += 1
        found = widths(gm)[:-1]
        assert all(width <= most for width, most in zip(found, left, strict=True)), (found, left)
        seen["exactly"] += list(found) == left  # some are dead by chance
        assert sweeps <= 1 + len(left)
        with torch.no_grad():
            y = model(x)
        seen["planted"] += planted
        seen["nets"] += 1
        if y.max() > y.min():
            emit(gm, tensors, FLOAT64)
            gm.recompile()
            assert_equivalent(model, gm, x)
            seen["compared"] += 1

    check()
    assert seen["planted"] > 200 and min(seen["compared"], seen["exactly"]) > seen["nets"] / 2
