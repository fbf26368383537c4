"""Parts of linear maps: side by side they are the whole, bit for bit, and keep groups where they can."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_affine import layer, map_of, run_affine, signal

from rmfx.algebra.affine import Affine, dirac
from rmfx.algebra.grid import Axis, Grid
from rmfx.algebra.restrict import restrict, zero_part

GROUPED = st.sampled_from([(4, 4, 1), (4, 6, 2), (6, 3, 3), (6, 12, 6), (8, 8, 8), (8, 4, 4)])


def conv(c_in: int, c_out: int, groups: int = 1, k: int = 3, bias: bool = True) -> Affine:
    """A size-keeping 1d convolution with integer weights."""
    return map_of(layer(c_in, c_out, [Axis(k, before=k // 2, after=k // 2)], groups=groups, bias=bias))


@settings(max_examples=80)
@given(GROUPED, st.data())
def test_parts_side_by_side_are_the_whole(shape: tuple[int, int, int], data: st.DataObject) -> None:
    c_in, c_out, groups = shape
    whole = conv(c_in, c_out, groups)
    cuts = [sorted({0, n, *data.draw(st.sets(st.integers(1, n - 1), max_size=2))}) for n in (c_out, c_in)]
    rows, columns = ([(a, b - a) for a, b in zip(cut, cut[1:], strict=False)] for cut in cuts)
    x = signal(1, c_in, 5)
    bias = whole.weights()[1]
    assert bias is not None
    outputs = []
    for row in rows:
        parts = [(column, restrict(whole, row, column)) for column in columns]
        total = torch.zeros(2, row[1], 5, dtype=torch.float64)
        for column, part in parts:
            if part is not None:
                assert (part.in_channels, part.out_channels) == (column[1], row[1]) and part.has_bias
                total += run_affine(part, x[:, column[0] : sum(column)])
                total -= bias[row[0] : sum(row), None]  # every part has the bias of its rows
        outputs.append(total + bias[row[0] : sum(row), None])
    assert torch.equal(torch.cat(outputs, 1), run_affine(whole, x))


def test_the_whole_is_the_very_same_map() -> None:
    whole = conv(4, 6, 2)
    assert restrict(whole, (0, 6), (0, 4)) is whole


@pytest.mark.parametrize(
    ("rows", "columns", "groups"),
    [
        ((0, 2), (0, 1), 1),  # one group
        ((2, 4), (1, 2), 2),  # two whole groups
        ((0, 3), (0, 2), 1),  # a group that is cut
        ((2, 4), (0, 4), 1),  # columns that other groups read, too
        ((2, 4), (2, 1), 1),
    ],
)
def test_groups_are_kept_where_both_are_whole(rows: tuple[int, int], columns: tuple[int, int], groups: int) -> None:
    part = restrict(conv(4, 8, 4), rows, columns)
    assert part is not None and part.groups == groups


@pytest.mark.parametrize(("rows", "columns"), [((0, 2), (1, 3)), ((6, 2), (0, 3)), ((2, 4), (3, 1))])
def test_what_no_group_reads_is_nothing(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    assert restrict(conv(4, 8, 4), rows, columns) is None


def test_a_part_is_no_layer_of_the_model_any_more() -> None:
    part = restrict(dirac(4, Grid.sampling((1,))), (1, 2), (1, 2))
    assert part is not None and part.stored is None and part.diagonal
    assert part.macs_per_position == 2


@pytest.mark.parametrize("bias", [False, True])
def test_a_part_has_a_bias_where_the_whole_has(bias: bool) -> None:
    whole = conv(4, 6, bias=bias)
    own = whole.weights()[1]
    for part in (restrict(whole, (1, 3), (0, 2)), zero_part(whole, (1, 3), 5)):
        assert part is not None and part.has_bias == bias
        found = part.weights()[1]
        assert (found is None and own is None) or (
            found is not None and own is not None and torch.equal(found, own[1:4])
        )


def test_rows_that_nothing_reaches_are_zeros_and_the_bias() -> None:
    part = zero_part(conv(4, 6), (1, 3), 5)
    weight, _ = part.weights()
    assert weight.shape == (3, 5, 3) and not weight.any() and (part.in_channels, part.out_channels) == (5, 3)
