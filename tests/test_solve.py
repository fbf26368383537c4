"""Which of the schedules wins, and when the search ends."""

from __future__ import annotations

from typing import Any

import pytest
from block import net
from blocks_gates import GATES, convs, wavenet_forward
from front import hostile, normal_form
from oracle import assert_equivalent

import rmfx
from rmfx.graph.facts import annotate, is_sum
from rmfx.graph.region import Region, find_region
from rmfx.hostile import randomise
from rmfx.layout import solve as search
from rmfx.layout.problem import Problem, Solution
from rmfx.layout.reading import read_region
from rmfx.layout.solve import solve


def wavenet() -> Problem:
    """Three layers of a WaveNet, which can be laid out in many orders."""
    block = GATES["wavenet"]
    x = hostile(*block.shape)
    gm = normal_form(randomise(block.build().double(), x / 8))
    annotate(gm, (x,))
    region = find_region([node for node in gm.graph.nodes if is_sum(node)][-1])
    assert isinstance(region, Region)
    return read_region(region, 1, 1)


def solved(problem: Problem, monkeypatch: pytest.MonkeyPatch, idle: int) -> tuple[Solution, int]:
    """The solution, and how many schedules were tried for it."""
    tried: list[Any] = []

    class Counted(search.Draft):
        def __init__(self, *arguments: Any) -> None:
            tried.append(arguments)
            super().__init__(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(search, "MOST_IDLE", idle)
        patch.setattr(search, "Draft", Counted)
        return solve(problem), len(tried)


def test_the_search_ends_where_nothing_gets_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = wavenet()
    (everything, most), (some, few) = (solved(problem, monkeypatch, idle) for idle in (10_000, 3))
    assert few < most and some.macs == everything.macs
    assert [type(layer) for layer in some.layers] == [type(layer) for layer in everything.layers]


@pytest.mark.slow
def test_a_wavenet_of_twenty_layers() -> None:
    layers: Any = {name: convs(20, 3, 1, 1) for name in "fg"} | {"k": convs(20, 1), "r": convs(19, 1)}
    x = hostile(2, 6, 11)
    model = randomise(net(wavenet_forward, **layers)().double(), x / 8)
    converted = rmfx.convert(model, x, verify=False)
    assert (rmfx.report(converted).count("removed"), rmfx.report(converted).count("refused")) == (38, 0)
    assert_equivalent(model, converted, x)
