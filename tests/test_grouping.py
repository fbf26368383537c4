"""Forms of linear steps: whatever layout and grouping is chosen, the step is its block matrix, and never dearer."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_affine import axis_of, layer, map_of, run_affine, signal
from torch import Tensor

from rmfx.algebra.affine import Affine, dirac
from rmfx.algebra.grid import Grid, align
from rmfx.layout import grouping
from rmfx.layout.grouping import Form, Layout, LinearStep, Spread, build, choose_forms, dirac_taps

Blocks = dict[tuple[int, int], Affine]


def conv(
    c_in: int, c_out: int, k: int = 1, groups: int = 1, bias: bool = False, dims: int = 2, seed: int = 0
) -> Affine:
    """A size-keeping convolution with integer weights, or a linear layer."""
    return map_of(layer(c_in, c_out, [axis_of(k, p=k // 2)] * dims, groups=groups, bias=bias, seed=seed))


def carry(channels: int, dims: int = 2) -> Affine:
    """The identity."""
    return dirac(channels, Grid.sampling([1] * dims))


def step(blocks: Blocks, positions: float = 1.0) -> LinearStep:
    """A step with these blocks: (segment after, segment before) to map."""
    after = {row: block.out_channels for (row, _), block in blocks.items()}
    before = {column: block.in_channels for (_, column), block in blocks.items()}
    taps = align([block.grid for block in blocks.values()])[0].taps
    widths = (tuple(sizes[i] for i in range(len(sizes))) for sizes in (before, after))
    return LinearStep(blocks, *widths, positions, taps)


def dense_form(one: LinearStep) -> Form:
    """One group, segments in order."""
    return Form(1, Layout.natural(one.before), Layout.natural(one.after))


def macs(steps: list[LinearStep], forms: tuple[Form, ...]) -> float:
    """MACs of all steps."""
    return sum(form.macs(one) for form, one in zip(forms, steps, strict=True))


def run_built(one: LinearStep, form: Form, inputs: list[Tensor]) -> list[Tensor]:
    """Run the built step on segments laid out as it reads them, with junk in dead channels; split its output again."""
    wide = signal(99, form.before.width, *inputs[0].shape[2:])
    for spread, x in zip(form.before.spreads, inputs, strict=True):
        wide[:, spread.positions(x.shape[1])] = x
    built = build(one, form)
    assert (built.in_channels, built.out_channels, built.groups) == (form.before.width, form.after.width, form.groups)
    assert form.macs(one) == built.macs_per_position * one.positions
    out = run_affine(built, wide)
    rows = [spread.positions(width) for spread, width in zip(form.after.spreads, one.after, strict=True)]
    dead = sorted(set(range(form.after.width)) - set(torch.cat(rows).tolist()))
    assert len(dead) == form.after.width - sum(one.after), "no two channels share a place"
    assert not out[:, dead].any(), "dead channels stay 0"
    return [out[:, row] for row in rows]


def run_blocks(one: LinearStep, inputs: list[Tensor]) -> list[Tensor]:
    """The block matrix, one map at a time (:mod:`test_affine` shows that a map is its module)."""
    outputs: dict[int, Tensor] = {}
    for (row, column), block in one.blocks.items():
        y = run_affine(block, inputs[column])
        outputs[row] = outputs[row] + y if row in outputs else y
    return [outputs[row] for row in range(len(one.after))]


WIDTHS = st.sampled_from((1, 2, 3, 4, 6, 8))


@st.composite
def maps(draw: st.DrawFn, c_in: int, c_out: int, k: int) -> Affine:
    """A map between these widths: grouped as it may, or the identity."""
    if c_in == c_out and draw(st.booleans()):
        return carry(c_in)
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 6, 8) if not c_in % g and not c_out % g]))
    return conv(c_in, c_out, k, groups, draw(st.booleans()), seed=draw(st.integers(0, 9)))


@st.composite
def sequences(draw: st.DrawFn) -> list[LinearStep]:
    """A lift, steps in the middle (side by side, or mixing) and a join, as the layout of a region has them."""
    count, k = draw(st.integers(1, 3)), draw(st.sampled_from((1, 3)))
    widths = [draw(WIDTHS) for _ in range(count)]
    fork, join = draw(WIDTHS), draw(WIDTHS)
    steps = [step({(row, 0): draw(maps(fork, width, 1)) for row, width in enumerate(widths)}, 16.0)]
    for _ in range(draw(st.integers(0, 2))):
        wider = [draw(st.sampled_from((width, draw(WIDTHS)))) for width in widths]
        mixes = draw(st.integers(0, 3)) == 0
        cells = [(r, c) for r in range(count) for c in range(count) if r == c or mixes]
        steps.append(step({(r, c): draw(maps(widths[c], wider[r], k)) for r, c in cells}, 4.0))
        widths = wider
    return [*steps, step({(0, column): draw(maps(width, join, 1)) for column, width in enumerate(widths)}, 4.0)]


def assert_is_its_blocks(one: LinearStep, form: Form) -> None:
    """The built step computes what its blocks do."""
    inputs = [signal(index, width, 4, 3) for index, width in enumerate(one.before)]
    for got, want in zip(run_built(one, form, inputs), run_blocks(one, inputs), strict=True):
        assert torch.equal(got, want)


def test_chosen_forms_are_the_block_matrices_and_the_cheapest() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=150)
    @given(sequences())
    def check(steps: list[LinearStep]) -> None:
        forms = choose_forms(steps)
        assert forms[0].before == Layout.natural(steps[0].before) and forms[-1].after == Layout.natural(steps[-1].after)
        assert all(one.after == other.before for one, other in zip(forms, forms[1:], strict=False))
        assert macs(steps, forms) == cheapest(steps) <= macs(steps, tuple(dense_form(one) for one in steps))
        for one, form in zip(steps, forms, strict=True):
            assert_is_its_blocks(one, form)
            seen["grouped"] += form.groups > 1
            seen["dead"] += form.after.width > sum(one.after)
            seen["interleaved"] += form.after.width == sum(one.after) and form.after != Layout.natural(one.after)

    check()
    assert min(seen[key] for key in ("grouped", "dead", "interleaved")) >= 5, seen


def cheapest(steps: list[LinearStep]) -> float:
    """The least MACs over all sequences of layouts that some step knows a form for, tried one by one."""
    grouped = [grouping._grouped_forms(one) for one in steps]
    least = float("inf")
    for layouts in product(*grouping._boundaries(steps, grouped)):
        total = 0.0
        for one, known, before, after in zip(steps, grouped, layouts, layouts[1:], strict=False):
            fitting = [form.macs(one) for form in known if (form.before, form.after) == (before, after)]
            total += min([Form(1, before, after).macs(one), *fitting])
        least = min(least, total)
    return least


@settings(max_examples=60)
@given(sequences())
def test_dense_forms_are_the_block_matrices(steps: list[LinearStep]) -> None:
    for one in steps:
        if len(one.blocks) > 1:  # a lone map is emitted as it is, with its own groups
            assert_is_its_blocks(one, dense_form(one))


def bottleneck(width: int, carried: int, groups: int = 1, k: int = 3) -> list[LinearStep]:
    """Lift, middle and join of a bottleneck whose middle convolution has ``width`` channels beside ``carried``."""
    lift = step({(0, 0): conv(carried, width), (1, 0): carry(carried)})
    middle = step({(0, 0): conv(width, width, k, groups, seed=1), (1, 1): carry(carried)})
    return [lift, middle, step({(0, 0): conv(width, carried, seed=2), (0, 1): carry(carried)})]


@pytest.mark.parametrize(
    ("width", "carried", "groups", "chosen"),
    [
        (64, 256, 1, (5, 320)),  # ResNet-50: 5 groups of 64
        (128, 256, 32, (96, 384)),  # ResNeXt-50: 96 groups of 4
        (96, 16, 96, (112, 112)),  # MobileNetV2: depthwise
        (24, 32, 1, (3, 72)),  # 24 does not divide 32: 16 dead channels
        (24, 1, 1, (1, 25)),  # 23 dead channels would cost more than a dense middle
        (6, 4, 2, (4, 12)),  # two groups of 3, and 4 carried in two more, 2 of 3 dead in the last
    ],
)
def test_the_middle_of_a_bottleneck(width: int, carried: int, groups: int, chosen: tuple[int, int]) -> None:
    steps = bottleneck(width, carried, groups)
    forms = choose_forms(steps)
    assert (forms[1].groups, forms[1].before.width) == chosen
    assert forms[1].after.width == forms[1].before.width
    assert macs(steps, forms) <= macs(steps, tuple(dense_form(one) for one in steps))
    for one, form in zip(steps, forms, strict=True):
        assert_is_its_blocks(one, form)


def test_dead_channels_are_paid_for_by_the_neighbours() -> None:
    # Beside a 1x1 middle, the lift and the join over 72 channels instead of 56 cost more than the groups save.
    def with_positions(outer: float) -> tuple[Form, ...]:
        lift, middle, join = bottleneck(24, 32, k=1)
        return choose_forms([step(dict(lift.blocks), outer), middle, step(dict(join.blocks), outer)])

    assert with_positions(1.0)[1].groups == 3
    assert with_positions(9.0)[1].groups == 1


def test_neighbours_that_place_channels_alike_share_a_layout() -> None:
    # 24 channels alone in a group of 32: as one map of 24 channels, and as 24 maps of one, which are the same places.
    first = step({(0, 0): conv(24, 24, 3), (1, 1): conv(32, 32, 3)})
    second = step({(0, 0): carry(24), (1, 1): conv(32, 32, 3)})
    lift, join = step({(0, 0): conv(8, 24), (1, 0): conv(8, 32)}), step({(0, 0): conv(24, 8), (0, 1): conv(32, 8)})
    forms = choose_forms([lift, first, second, join])
    assert [form.groups for form in forms] == [1, 2, 2, 1]


def test_a_grouped_first_convolution_takes_the_carried_channels_into_its_groups() -> None:
    steps = [step({(0, 0): conv(8, 12, 3, groups=4), (1, 0): carry(8)}), step({(0, 0): conv(12, 8), (0, 1): carry(8)})]
    first, last = choose_forms(steps)
    assert first.groups == 4 and first.after == last.before
    assert first.after.spreads == (Spread(0, 5, 3), Spread(3, 5, 2)), "per group: 3 of the branch, then 2 carried"


def test_places() -> None:
    assert Spread(10, 7, 3).positions(8).tolist() == [10, 11, 12, 17, 18, 19, 24, 25]
    assert Layout.natural((2, 3)) == Layout((Spread(0, 2, 2), Spread(2, 3, 3)), 5)


def test_a_lone_map_stays_as_it_is() -> None:
    alone = conv(8, 8, 3, groups=2)
    (form,) = choose_forms([step({(0, 0): alone})])
    assert form.groups == 2 and build(step({(0, 0): alone}), form) is alone


@pytest.mark.parametrize(("width", "carried", "groups"), [(64, 256, 1), (8, 4, 4), (6, 4, 1)])
def test_dirac_taps_are_the_ones_of_the_identity(width: int, carried: int, groups: int) -> None:
    steps = bottleneck(width, carried, groups)
    keys = ((1, 0), (1, 1), (0, 1))
    for one, form, key in zip(steps, choose_forms(steps), keys, strict=True):
        weight, _ = build(one, form).weights()
        taps = dirac_taps(one, form, key)
        assert len(set(taps)) == len(taps) == 4 and all(weight[tap] == 1.0 for tap in taps)
        columns = form.before.width // form.groups
        rows = [tap[0] for tap in taps]
        assert all(weight[row].flatten().count_nonzero() == 1 for row in rows) or key == (0, 1)
        assert all(tap[1] < columns for tap in taps)


LINEAR_STEPS = {
    "side by side": [
        step({(0, 0): conv(8, 4, dims=0), (1, 0): carry(8, 0)}),
        step({(0, 0): conv(4, 4, dims=0, seed=1), (1, 1): carry(8, 0)}),
        step({(0, 0): conv(4, 8, dims=0, seed=2), (0, 1): carry(8, 0)}),
    ],
    "lift": [
        step({(0, 0): carry(4, 0), (1, 0): carry(4, 0)}),
        step({(0, 0): conv(4, 4, dims=0, seed=2), (0, 1): carry(4, 0)}),
    ],
}


@pytest.mark.parametrize("case", LINEAR_STEPS)
def test_linear_layers_have_no_groups(case: str) -> None:
    for one, form in zip(LINEAR_STEPS[case], choose_forms(LINEAR_STEPS[case]), strict=True):
        assert form.groups == 1 and build(one, form).groups == 1
