"""Weights are computed once where they are read often, within a limit, and come out the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import build
from torch import Tensor

import rmfx
from rmfx.algebra import kernels
from rmfx.algebra.affine import compose, from_tensors
from rmfx.algebra.grid import Grid
from rmfx.algebra.recall import recalled, recalling

BYTES = 80  # of one result: ten numbers in float64


class Counted:
    """Maps by name, which count how often they are computed."""

    def __init__(self) -> None:
        self.maps = {name: object() for name in "abc"}
        self.computed = ""

    def read(self, names: str) -> str:
        """What was computed in order to read ``names``."""
        self.computed = ""
        for name in names:
            weight, bias = recalled(self.maps[name], self._compute(name))
            assert float(weight[0]) == ord(name) and bias is None
        return self.computed

    def _compute(self, name: str) -> Callable[[], tuple[Tensor, None]]:
        def compute() -> tuple[Tensor, None]:
            self.computed += name
            return torch.full((10,), ord(name), dtype=torch.float64), None

        return compute


def test_nothing_is_kept_unless_asked() -> None:
    counted = Counted()
    assert counted.read("aa") == "aa"
    with recalling():
        assert counted.read("aa") == "a"
    assert counted.read("aa") == "aa"


def test_what_was_read_longest_ago_goes_first() -> None:
    counted = Counted()
    with recalling(2 * BYTES):
        assert counted.read("abab") == "ab"
        assert counted.read("ac") == "c"
        assert counted.read("acb") == "b"
    with recalling(BYTES - 1):
        assert counted.read("aa") == "aa"


def test_one_within_another_shares_what_is_kept() -> None:
    counted = Counted()
    with recalling(2 * BYTES):
        counted.read("a")
        with recalling(0):
            assert counted.read("ab") == "b"
        assert counted.read("ab") == ""
    with pytest.raises(KeyError), recalling():
        counted.read("z")
    assert counted.read("aa") == "aa"


def test_a_map_of_maps_asks_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    product = kernels.compose_weights

    def counted(outer: Tensor, inner: Tensor, groups: int) -> Tensor:
        calls.append(groups)
        return product(outer, inner, groups)

    monkeypatch.setattr(kernels, "compose_weights", counted)
    first, second, third = (from_tensors(torch.full((2, 2), n).double(), None, Grid()) for n in (1.0, 2.0, 3.0))
    inner = compose(first, second)
    whole = compose(inner, third)
    expected = whole.weights()[0]
    assert len(calls) == 2
    with recalling():
        assert torch.equal(whole.weights()[0], expected) and torch.equal(inner.weights()[0], torch.full((2, 2), 4.0))
        assert whole.weights()[0] is whole.weights()[0] and torch.equal(whole.weights()[0], expected)
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["inverted_relu", "bottleneck_stride_2", "nested"])
def test_plans_and_networks_do_not_depend_on_it(name: str) -> None:
    network, x = build(name)

    def outcome() -> tuple[object, ...]:
        plan = rmfx.make_plan(network, x, target="onnxruntime", measure=False)
        lowered = rmfx.lower(rmfx.convert(network, x, verify=False), x, verify=False)
        assert rmfx.report(lowered).notes
        return plan, rmfx.apply_plan(plan, network, x, verify=False).state_dict(), lowered.state_dict()

    plan, *states = outcome()
    for limit in (0, 1 << 12):
        with recalling(limit):
            other, *others = outcome()
        assert other == plan
        for state, same in zip(states, others, strict=True):
            assert state.keys() == same.keys() and all(torch.equal(state[name], same[name]) for name in state)
