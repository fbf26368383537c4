"""Drafts: each condition of the module's docstring, on a schedule that breaks it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block import SqueezeExcite
from nets import cbn, conv
from regions import Net
from torch import nn

from rmfx.errors import InexactError
from rmfx.layout.draft import Draft
from rmfx.layout.flow import Flow
from rmfx.layout.schedule import Step, schedules
from rmfx.layout.simplify import absorb_diagonals

KINDS: dict[str, Any] = {"L": "linear", "P": "pointwise", "G": "gate", "S": "stage"}


def flow(forward: Any, shape: tuple[int, ...] = (2, 6, 8, 8), sized: bool = True, **layers: Any) -> Flow:
    """Who reads what in the region of the last join."""
    return Flow(absorb_diagonals(Net(forward, shape, sized, **layers).problem()))


def draft(one: Flow, schedule: str, carrier: str = "auto") -> Draft:
    """The draft of a schedule: ``L01 P2`` for a linear step of tasks 0 and 1 and a pointwise one of task 2."""
    steps = [Step(KINDS[word[0]], tuple(map(int, word[1:]))) for word in schedule.split()]
    assert tuple(steps) in set(schedules(one.tasks)), "a schedule of these tasks"
    return Draft(one, steps, _wish(one, carrier))


def _wish(one: Flow, carrier: str) -> Any:
    wish = one.problem.carrier
    return carrier if isinstance(wish, str) else type(wish)(carrier)


def fails(one: Flow, schedule: str, reason: str, carrier: str = "auto") -> None:
    """The schedule breaks a condition."""
    with pytest.raises(InexactError, match=reason):
        draft(one, schedule, carrier)


def basic(**more: Any) -> dict[str, Any]:
    """Layers of a basic block."""
    return {"a": lambda: cbn(6, 4), "b": lambda: cbn(4, 6), **more}


def _block(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.b(m.a(x).relu()) + x


def test_a_basic_block() -> None:
    made = draft(flow(_block, **basic()), "L0 P1 L2")
    lift, join = made.linear_steps
    assert (lift.before, lift.after, join.after) == ((6,), (4, 6), (6,))
    assert set(lift.blocks) == {(0, 0), (1, 0)} and set(join.blocks) == {(0, 0), (0, 1)}
    assert (made.carriers, made.masked_channels, made.sized) == ({"masked"}, 6, False)
    assert made.names == ["a.0", "relu", "b.0"] and made.dirac == (0, (1, 0))
    assert (lift.positions, join.positions) == (64, 64)


# -- condition 1: one stride, padding mode and tap grid per step ------------------------------------------------------


def test_padding_modes_of_one_step() -> None:
    reflecting = flow(
        lambda m, x: m.b(m.a(x).relu()) + m.c(x), **basic(c=lambda: nn.Conv2d(6, 6, 3, 1, 1, padding_mode="reflect"))
    )
    fails(reflecting, "L03 P1 L2", "padding modes differ: reflect, zeros")
    draft(reflecting, "L0 L3 P1 L2")


def test_strides_of_one_step() -> None:
    strided = flow(
        lambda m, x: m.b(m.a(x).relu()) + m.c(x), (2, 6, 9, 9), a=lambda: cbn(6, 4, 3, 3), b=lambda: cbn(4, 6),
        c=lambda: nn.Sequential(conv(6, 6, 1, 3)),
    )  # fmt: skip
    draft(strided, "L03 P1 L2")
    halves = flow(lambda m, x: m.b(m.a(x)).relu() + m.c(m.d(x)).relu(), (2, 6, 13, 13), a=lambda: conv(6, 4, 1, 2),
                  b=lambda: conv(4, 6, 1, 3), d=lambda: conv(6, 4, 1, 3), c=lambda: conv(4, 6, 1, 2))  # fmt: skip
    fails(halves, "L03 L14 P25 L", "the strides of parallel branches do not divide each other")


# -- condition 2: a stride subsamples every segment -------------------------------------------------------------------


def _late(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.b(m.a(x).relu()) + m.d(m.c(x).relu())


def test_a_value_runs_ahead_into_what_samples_and_strides_later() -> None:
    one = flow(_late, a=lambda: cbn(6, 4, 3, 2), b=lambda: cbn(4, 6), c=lambda: cbn(6, 4, 1), d=lambda: cbn(4, 6, 1, 2))
    made = draft(one, "L03 P14 L25")
    assert [step.positions for step in made.linear_steps] == [16, 16]


def test_no_value_runs_ahead_into_what_reads_all_positions() -> None:
    one = flow(_late, a=lambda: cbn(6, 4, 3, 2), b=lambda: cbn(4, 6), c=lambda: cbn(6, 4, 1), d=lambda: cbn(4, 6, 3, 2))
    fails(one, "L03 P14 L25", "a stride would discard positions that a later convolution of the shortcut reads")
    draft(one, "L3 P4 L05 P1 L2")


def test_no_value_is_ahead_at_the_end() -> None:
    one = flow(lambda m, x: torch.cat((m.b(m.a(x)).relu(), m.c(x)), 1), (2, 6, 1, 1), a=lambda: cbn(6, 4, 3, 2),
               b=lambda: cbn(4, 6), c=lambda: cbn(6, 6))  # fmt: skip
    fails(one, "L03 L1 P2 L", "the strides of the two branches cannot be brought in step")


def test_terms_of_a_sum_are_equally_far_ahead() -> None:
    one = flow(lambda m, x: m.b(m.a(x).relu()) + x, (2, 6, 1, 1), a=lambda: cbn(6, 4, 3, 2), b=lambda: cbn(4, 6))
    fails(one, "L0 P1 L2", "the strides of the two branches cannot be brought in step")


def _gated(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.s(m.se(m.c(x))) + m.b(m.a(x).relu())


GATED: dict[str, Any] = {
    "a": lambda: cbn(6, 4, 3, 2), "b": lambda: cbn(4, 6), "c": lambda: cbn(6, 4, 1),
    "se": lambda: SqueezeExcite(4), "s": lambda: cbn(4, 6, 1, 2),
}  # fmt: skip


def test_no_gate_reads_what_a_stride_has_discarded() -> None:
    one = flow(_gated, **GATED)
    fails(one, "L03 P4 G1 L25", "a gate would read positions that a stride of the other branch has discarded")
    fails(one, "L03 G1 P4 L25", "a gate would read positions that a stride of the other branch has discarded")
    draft(one, "L0 G1 L23 P4 L5")


def test_no_pool_reads_what_a_stride_has_discarded() -> None:
    one = flow(
        lambda m, x: m.p(m.b(m.a(x))) + m.s(m.p(m.c(x))), a=lambda: cbn(6, 4, 1, 2), b=lambda: cbn(4, 6, 1),
        c=lambda: cbn(6, 4, 1), p=lambda: nn.MaxPool2d(3, 1, 1), s=lambda: cbn(4, 6, 1, 2),
    )  # fmt: skip
    fails(one, "L03 L1 S24 L5", "a pool would read positions that a stride of the other branch has discarded")


# -- condition 3: sizes -----------------------------------------------------------------------------------------------


def _even(sized: bool, shape: tuple[int, ...] = (2, 6, 8, 8)) -> Flow:
    return flow(lambda m, x: m.b(m.a(x).relu()) + m.c(x), shape, sized, a=lambda: nn.Conv2d(6, 4, 4, 2, 1),
                b=lambda: cbn(4, 6), c=lambda: cbn(6, 6, 1, 2))  # fmt: skip


def test_sizes_that_agree_at_some_input_sizes() -> None:
    assert draft(_even(True), "L03 P1 L2").sized
    fails(_even(False), "L03 P1 L2", "changes the size in a way that not every branch follows at all input sizes")


def test_sizes_of_maps_that_are_added_into_one_block() -> None:
    one = flow(lambda m, x: m.a(x) + m.c(x), (2, 6, 8, 8), True, a=lambda: nn.Conv2d(6, 6, 4, 2, 1),
               c=lambda: cbn(6, 6, 1, 2))  # fmt: skip
    assert draft(one, "L01").sized
    unknown = flow(lambda m, x: m.a(x) + m.c(x), (2, 6, 8, 8), False, a=lambda: nn.Conv2d(6, 6, 4, 2, 1),
                   c=lambda: cbn(6, 6, 1, 2))  # fmt: skip
    fails(unknown, "L01", "changes the size in a way that not every branch follows at all input sizes")


def test_a_stack_that_is_too_small() -> None:
    one = flow(_block, a=lambda: nn.Conv2d(6, 4, 3), b=lambda: nn.Conv2d(4, 6, 3, padding=2))
    fails(one, "L0 P1 L2", r"a stack of size \(6, 6\) cannot hold a tensor of size \(8, 8\)")


def test_sizes_behind_a_pool() -> None:
    one = flow(lambda m, x: m.p(m.a(x)) + m.p(m.c(x)), a=lambda: cbn(6, 4), c=lambda: cbn(6, 4, 1),
               p=lambda: nn.MaxPool2d(2))  # fmt: skip
    made = draft(one, "L02 S13 L")
    assert [step.positions for step in made.linear_steps] == [64, 16]


# -- condition 4: carriers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("carrier", "act", "stem", "expected"),
    [
        ("auto", nn.ReLU, nn.ReLU, "direct"),
        ("auto", nn.ReLU, nn.Identity, "masked"),
        ("split", nn.ReLU, nn.Identity, "split"),
        ("split", nn.GELU, nn.ReLU, "split"),
        ("direct", nn.ReLU, nn.ReLU, "direct"),
    ],
)
def test_carriers(carrier: str, act: type[nn.Module], stem: type[nn.Module], expected: str) -> None:
    one = flow(lambda m, x: (lambda y: m.b(m.act(m.a(y))) + y)(m.stem(m.h(x))), h=lambda: conv(6, 6), stem=stem,
               act=act, **basic())  # fmt: skip
    made = draft(one, "L0 P1 L2", carrier)
    assert made.carriers == {expected}
    assert made.linear_steps[0].after == ((4, 6, 6) if expected == "split" else (4, 6))


def test_no_carrier() -> None:
    fails(flow(_block, **basic()), "L0 P1 L2", "carrier 'direct' needs ReLU to be the identity", "direct")


def test_a_gate_leaves_what_it_is_not_meant_for_alone() -> None:
    one = flow(lambda m, x: m.b(m.se(m.a(x))) + x, se=lambda: SqueezeExcite(4), **basic())
    made = draft(one, "L0 G1 L2", "split")
    assert made.carriers == {"direct"} and made.linear_steps[0].after == (4, 6)
    ((gated, start),) = made.nonlinear[0].gated
    assert (gated, start) == (0, 0)


def test_a_pool_carries_nothing() -> None:
    one = flow(lambda m, x: m.p(m.a(x)) + m.b(m.c(x)), (2, 6, 8, 8), a=lambda: cbn(6, 6), b=lambda: cbn(4, 6, 1),
               c=lambda: cbn(6, 4), p=lambda: nn.MaxPool2d(3, 1, 1))  # fmt: skip
    fails(one, "L02 S1 L3", "p, a MaxPool2d, stands in one branch only")


def test_pools_of_one_step_are_the_same() -> None:
    one = flow(lambda m, x: m.p(m.a(x)) + m.q(m.c(x)), a=lambda: cbn(6, 4), c=lambda: cbn(6, 4, 1),
               p=lambda: nn.MaxPool2d(3, 1, 1), q=lambda: nn.MaxPool2d(5, 1, 2))  # fmt: skip
    fails(one, "L02 S13 L", "the branches pool in different ways: p and q")


# -- copies -----------------------------------------------------------------------------------------------------------


def test_each_op_has_a_copy_of_its_own() -> None:
    one = flow(lambda m, x: torch.cat((x.relu(), x.tanh(), m.c(x)), 1), c=lambda: conv(6, 6, 1))
    made = draft(one, "L2 P0 P1 L")
    assert made.linear_steps[0].after == (6, 6, 6)
    layers = [[type(part).__name__ for part in step.parts] for step in made.nonlinear]
    assert layers[0].count("ReLU") == layers[1].count("Tanh") == 1


def test_parts_of_a_layer_advance_together() -> None:
    one = flow(lambda m, x: (lambda y: m.b(torch.cat((m.c(y[:, :2]), y[:, 2:]), 1)) + x)(m.act(m.a(x))),
               a=lambda: cbn(6, 4), act=lambda: nn.PReLU(4), c=lambda: conv(2, 2), b=lambda: cbn(4, 6))  # fmt: skip
    assert [len(unit) for unit in one.units] == [2, 2, 1, 1]
    made = draft(one, "L0 P1 L2 L3")
    assert [step.after for step in made.linear_steps] == [(2, 2, 6), (2, 2, 6), (6,)]
