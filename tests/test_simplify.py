"""Simplified problems: fewer ops, the same function (see :mod:`test_reading`), and nothing that is read is lost."""

from __future__ import annotations

from typing import Any

import torch
from nets import cbn, conv
from regions import Net
from torch import nn

from rmfx.layout.flow import shortcut_values
from rmfx.layout.problem import Problem
from rmfx.layout.simplify import absorb_diagonals, compose_paths

C: dict[str, Any] = {"a": lambda: cbn(6, 6), "b": lambda: conv(6, 6), "n": lambda: nn.BatchNorm2d(6)}


def kinds(problem: Problem) -> str:
    """The first letters of the ops' kinds."""
    return "".join(op.kind[0] if op.kind != "stage" else "S" for op in problem.ops)


def problem(forward: Any, **layers: Any) -> Problem:
    """The problem of the last join."""
    return Net(forward, **C, **layers).problem()


def test_norms_are_absorbed() -> None:
    before = problem(lambda m, x: m.b(m.a(x).relu()) + x)
    after = absorb_diagonals(before)
    assert (kinds(before), kinds(after)) == ("llpls", "lpls")
    assert [op.name for op in after.ops[:1]] == ["a.0"], "the convolution gives the name"


def test_a_norm_in_front_is_absorbed_unless_padding_sees_its_shift() -> None:
    small = problem(lambda m, x: m.c(m.n(x)).relu() + x, c=lambda: conv(6, 6, 1))
    padded = problem(lambda m, x: m.b(m.n(x)).relu() + x)
    assert (kinds(absorb_diagonals(small)), kinds(absorb_diagonals(padded))) == ("lps", "llps")


def test_what_others_read_stays() -> None:
    twice = problem(lambda m, x: (lambda y: torch.cat((m.n(y).relu(), y, x), 1))(m.b(x)))
    assert kinds(absorb_diagonals(twice)) == "llp"
    joined = problem(lambda m, x: (lambda y: torch.cat((m.b(m.n(x)), m.n(x), x), 1))(x))
    assert kinds(absorb_diagonals(joined)) == "lll"


def test_dense_layers_are_composed_on_wanted_paths_only() -> None:
    both = problem(lambda m, x: m.c(m.d(x)) + m.b(m.c(m.d(x)).relu()), c=lambda: conv(4, 6, 1), d=lambda: conv(6, 4, 1))
    plain = absorb_diagonals(both)
    assert kinds(plain) == "llllpls"
    assert kinds(compose_paths(plain, shortcut_values(plain))) == "lllpls"
    assert kinds(compose_paths(plain, set())) == "llllpls"


def test_what_pads_twice_is_not_composed() -> None:
    plain = absorb_diagonals(problem(lambda m, x: m.b(m.b(x)) + m.a(x).relu()))
    assert kinds(compose_paths(plain, shortcut_values(plain))) == kinds(plain)


def test_what_nothing_needs_is_dropped_and_the_rest_renumbered() -> None:
    before = problem(lambda m, x: m.c(m.a(x).relu()[:, 4:]) + x, c=lambda: conv(2, 6))
    after = absorb_diagonals(before)
    assert len(before.ops) > len(after.ops) and kinds(after) == "lpls"
    for number, op in after.numbered():
        assert all(value < number for value in op.reads)
    assert after.join == (len(after.fork) + len(after.ops) - 1,)


def test_biases_count_once() -> None:
    net = Net(
        lambda m, x: m.n(m.c(torch.cat((m.d(x), m.e(x).relu()), 1))) + x,
        c=lambda: conv(6, 6, 1, bias=True), d=lambda: conv(6, 3, 1, bias=True), e=lambda: conv(6, 3, bias=True), **C,
    )  # fmt: skip
    after = compose_paths(absorb_diagonals(net.problem()), set(range(20)))
    maps = [op for op in after.ops if op.kind == "linear" and len(op.maps) == 2]
    assert [[affine.has_bias for affine in op.maps] for op in maps] == [[True, False]]
