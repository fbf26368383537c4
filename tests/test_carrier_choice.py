"""Carriers: which are exact, which one is chosen, and what a shift costs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_pointwise import FLOAT64, INF, NOT_SPLITTING, SPLITTING, clamp, prelu
from torch import nn

from rmfx.algebra.carrier import (
    CHOICES,
    ShiftPlan,
    choose_carrier,
    even_rms,
    shift_plan,
)
from rmfx.algebra.pointwise import EVERYTHING, Range, identity_range
from rmfx.errors import InexactError

SHIFTING = [nn.ReLU(), nn.LeakyReLU(0.1), nn.ELU(), nn.ReLU6(), nn.Hardtanh(), nn.Hardtanh(-2.0, 7.0), nn.Hardswish(),
            prelu(0.3), nn.Threshold(1.5, 1.5), clamp([-INF, -INF], [4.0, 3.0]),
            clamp([1.0, 0.0], [3.0, 4.0])]  # fmt: skip


def refusal(activation: nn.Module, values: Range, wanted: str, **options: float) -> str:
    with pytest.raises(InexactError) as error:
        choose_carrier(activation, values, wanted, **options)
    return str(error.value)


# -- shift -------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(SHIFTING), st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(0, 1))
def test_a_shifted_value_passes_unchanged(module: nn.Module, low: float, width: float, where: float) -> None:
    values = (low, low + width)
    plan = shift_plan(module, values)
    assert plan is not None
    mantissa, _ = math.frexp(plan.scale)
    assert mantissa == 0.5 and plan.scale <= 1
    u = torch.tensor([[values[0]], [values[1]], [low + where * width]], dtype=FLOAT64).repeat(1, 2)
    carried = plan.scale * u + plan.offset
    slack = 1e-15 * max(1.0, float(carried.abs().max()), abs(plan.offset), plan.scale * float(u.abs().max()))
    assert (module(carried) - carried).abs().max() <= 2 * slack


@given(st.sampled_from(SHIFTING), st.floats(-1e3, 1e3), st.floats(0, 1e3))
def test_a_shift_is_as_small_as_it_can_be(module: nn.Module, low: float, width: float) -> None:
    plan = shift_plan(module, (low, low + width))
    inside = identity_range(module)
    assert plan is not None and inside is not None
    room = inside[1] - inside[0]
    assert plan.scale == 1 or 2 * plan.scale * width >= room * (1 - 1e-12)
    if plan.offset > 0:
        assert plan.scale * low + plan.offset == pytest.approx(inside[0], abs=1e-12 * max(1, abs(plan.offset)))
    if plan.offset < 0:
        assert plan.scale * (low + width) + plan.offset == pytest.approx(inside[1], abs=1e-9 + 1e-12 * -plan.offset)


def test_shift_plans() -> None:
    assert shift_plan(nn.ReLU(), (-3.0, 5.0)) == shift_plan(nn.ReLU(), (-3.0, INF)) == ShiftPlan(1.0, 3.0)
    assert shift_plan(nn.ReLU(), (2.0, INF)) == ShiftPlan(1.0, 0.0)
    assert shift_plan(nn.Hardswish(), (-3.0, 5.0)) == ShiftPlan(1.0, 6.0)
    assert shift_plan(nn.ReLU6(), (-2.0, 4.0)) == ShiftPlan(1.0, 2.0)
    assert shift_plan(nn.ReLU6(), (-2.0, 4.1)) == ShiftPlan(0.5, 1.0)
    assert shift_plan(nn.ReLU6(), (7.0, 9.0)) == ShiftPlan(1.0, -3.0)
    assert shift_plan(nn.Hardtanh(), (-3.0, 3.0)) == ShiftPlan(0.25, 0.0)
    assert shift_plan(nn.ReLU6(), (5.0, 5.0)) == ShiftPlan(1.0, 0.0)


@pytest.mark.parametrize(
    ("module", "values"),
    [
        (nn.ReLU(), (-INF, 5.0)), (nn.ReLU(), EVERYTHING), (nn.ReLU6(), (-1.0, INF)), (nn.ReLU6(), (-INF, 1.0)),
        (nn.GELU(), (-1.0, 1.0)), (nn.Threshold(0.5, 0.0), (1.0, 2.0)), (nn.Sigmoid(), (-1.0, 1.0)),
        (clamp([2.0, 0.0], [4.0, 1.0]), (0.0, 1.0)),
        (clamp([2.0, 0.0], [4.0, 1.0]), (1.5, 1.5)), (clamp([-INF], [4.0]), (0.0, INF)),
        (clamp([1.0], [1.0]), (0.0, 2.0)), (nn.ReLU6(), (-1e300, 1e300)), (nn.ReLU6(), (-1.7e308, 1.7e308)),
    ],
)  # fmt: skip
def test_no_shift_without_bounds_or_room(module: nn.Module, values: Range) -> None:
    assert shift_plan(module, values) is None
    refusal(module, values, "shift")


def test_a_shift_to_the_only_room_there_is() -> None:
    assert shift_plan(clamp([1.0], [1.0]), (3.0, 3.0)) == ShiftPlan(1.0, -2.0)


@pytest.mark.parametrize(("offset", "bits"), [(3.0, 0.0), (8.0, 1.0), (-8.0, 1.0), (64.0, 4.0), (0.0, 0.0)])
def test_bits(offset: float, bits: float) -> None:
    assert ShiftPlan(1.0, offset).bits(4.0) == ShiftPlan(0.25, offset / 4).bits(4.0) == bits


def test_bits_beside_zeros() -> None:
    assert ShiftPlan(1.0, 1.0).bits(0.0) == INF and ShiftPlan(1.0, 0.0).bits(0.0) == 0.0


@given(st.floats(-1e3, 1e3), st.floats(0, 1e3))
def test_even_rms(low: float, width: float) -> None:
    x = torch.linspace(low, low + width, 20_001, dtype=FLOAT64)
    assert even_rms((low, low + width)) == pytest.approx(float(x.square().mean().sqrt()), rel=1e-3, abs=1e-12)


def test_even_rms_mirrors_an_unknown_end() -> None:
    assert even_rms((-3.0, INF)) == even_rms((-INF, 3.0)) == even_rms((-3.0, 3.0))
    assert even_rms((-1e300, 1e300)) == pytest.approx(1e300 / math.sqrt(3))


# -- choice ------------------------------------------------------------------------------------------------------------


def test_direct_comes_first() -> None:
    assert all(choose_carrier(nn.ReLU6(), (0.0, 6.0), wanted) == "direct" for wanted in CHOICES)


@pytest.mark.parametrize("wanted", ["masked", "split", "shift"])
def test_every_exact_carrier_can_be_chosen(wanted: str) -> None:
    assert choose_carrier(nn.ReLU(), (-1.0, 1.0), wanted) == wanted


def test_auto_never_shifts_nor_splits_by_itself() -> None:
    assert choose_carrier(nn.ReLU(), (-1.0, 1.0), "auto") == "masked"


def test_direct_is_refused_where_it_is_not_exact() -> None:
    reason = "carrier 'direct' needs ReLU6 to be the identity on [0, 7], which it is not"
    assert refusal(nn.ReLU6(), (0.0, 7.0), "direct") == reason


@pytest.mark.parametrize("module", [module for module, _ in SPLITTING])
def test_split_where_it_is_exact(module: nn.Module) -> None:
    assert choose_carrier(module, EVERYTHING, "split") == "split"


@pytest.mark.parametrize("module", NOT_SPLITTING)
def test_split_is_refused_where_it_is_not(module: nn.Module) -> None:
    name = type(module).__name__
    expected = f"carrier 'split' needs phi(t) - phi(-t) = k*t, which {name} does not satisfy"
    assert refusal(module, EVERYTHING, "split") == expected


def test_shift_is_refused_without_an_identity() -> None:
    expected = "carrier 'shift' needs an activation that is the identity somewhere, which GELU is not"
    assert refusal(nn.GELU(), (-1.0, 1.0), "shift") == expected


def test_shift_is_refused_without_bounds() -> None:
    expected = "carrier 'shift' needs bounds of what it carries through ReLU, known is only [-inf, 2]"
    assert refusal(nn.ReLU(), (-INF, 2.0), "shift").startswith(expected)


def test_shift_is_refused_where_it_costs_precision() -> None:
    values = (-100.0, 100.0)
    expected = "carrier 'shift' would cost 4.6 bits of precision: it adds 100 to values of about 4"
    assert refusal(nn.ReLU(), values, "shift", rms=4.0) == expected
    assert choose_carrier(nn.ReLU(), values, "shift", rms=25.0) == "shift", "2 bits"
    assert "2.1 bits" in refusal(nn.ReLU(), values, "shift", rms=24.0)
    assert choose_carrier(nn.ReLU(), values, "shift", rms=4.0, max_bits=INF) == "shift", "forced"
    assert choose_carrier(nn.ReLU(), values, "shift") == "shift", "spread evenly, 0.8 bits"
    assert "bits" in refusal(nn.ReLU(), (-100.0, -99.0), "shift", max_bits=0.0)
