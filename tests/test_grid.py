"""Tap grids: sizes, composition, alignment, and the sums and stacks of maps that alignment is for."""

from __future__ import annotations

from collections import Counter
from itertools import product
from random import Random

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from test_affine import MODES, axes, axis_of, layer, map_of, run_affine, same_map, signal, smallest
from torch import Tensor, nn

from rmfx.algebra import grid as grids
from rmfx.algebra.affine import add, compose, scaled
from rmfx.algebra.grid import Axis, Embedding, Grid, align, compose_grids, layer_grid
from rmfx.algebra.stacking import Block, stack
from rmfx.errors import InexactError

LOOSE = st.builds(  # any borders, as compositions and padding="same" have them
    Axis, st.integers(1, 4), st.just(1), st.integers(1, 3), st.integers(0, 4), st.integers(0, 4)
)


def offsets(axis: Axis) -> list[int]:
    """Input positions read at output position 0, by definition."""
    return [j * axis.dilation - axis.before for j in range(axis.kernel)]


@settings(max_examples=100)
@given(axes(1), st.integers(1, 40))
def test_sizes_are_those_of_torch(drawn: list[Axis], size: int) -> None:
    module, (axis,) = layer(1, 1, drawn), drawn
    assert Grid.of(module.kernel_size, module.stride, module.padding, module.dilation) == Grid((axis,))
    if axis.out_size(size) >= 1:
        assert module(signal(0, 1, size)).shape[2] == axis.out_size(size) == Grid((axis,)).out_size([size])[0]
    else:
        with pytest.raises(RuntimeError):
            module(signal(0, 1, size))


def test_what_a_grid_says_of_itself() -> None:
    grid = Grid((Axis(3, 2, 2, 1, 2), Axis(1, 3)), "reflect")
    assert (grid.dims, grid.kernel, grid.stride, grid.dilation, grid.taps) == (2, (3, 1), (2, 3), (2, 1), 3)
    assert (grid.axes[0].first, grid.axes[0].last, grid.excess) == (-1, 3, (-1, 0))
    assert grid.padded and not grid.samples and not Grid(grid.axes[1:]).padded
    assert Grid.sampling([2, 3]).samples and Grid.sampling([2, 3]).stride == (2, 3)
    assert not Axis(1, before=1).samples and not Axis(1, after=1).samples and not Axis(2).samples
    assert Grid().out_size([]) == () and Grid().samples and Grid().taps == 1


@settings(max_examples=150)
@given(axes(1), axes(1))
def test_composed_sizes_and_offsets(outer: list[Axis], inner: list[Axis]) -> None:
    (first,), (second,) = inner, outer
    (both,) = compose_grids(Grid((second,)), Grid((first,))).axes
    reached = {o * first.stride + i for o in offsets(second) for i in offsets(first)}
    assert reached <= set(offsets(both)) and {min(reached), max(reached)} == {both.first, both.last}
    assert both.stride == first.stride * second.stride
    for size in range(1, 41):
        if first.out_size(size) >= 1:
            assert both.out_size(size) == second.out_size(first.out_size(size))


@settings(max_examples=150)
@given(st.lists(LOOSE, min_size=1, max_size=4), st.integers(1, 3), st.booleans())
def test_align_holds_every_tap_at_its_offset(drawn: list[Axis], stride: int, even: bool) -> None:
    members = [Axis(a.kernel, stride, a.dilation, a.before, a.after) for a in drawn]
    common, embeddings = align([Grid((axis,)) for axis in members], even)
    (shared,) = common.axes
    assert shared.stride == stride and (shared.before == shared.after or not even)
    ends = {end for axis in members for end in (axis.first, axis.last)}
    assert even or (shared.first, shared.last) == (min(ends), max(ends))
    for axis, where in zip(members, embeddings, strict=True):
        (taps,) = where.slices([axis.kernel])
        assert offsets(shared)[taps] == offsets(axis)
    for size in range(1, 41):
        assert shared.out_size(size) == members[0].out_size(size)


def test_align_adds_no_tap_that_it_does_not_need() -> None:
    three, five = Grid.of((3,), padding=(1,)), Grid.of((5,), padding=(2,))
    assert align([three, five]) == (five, (Embedding((1,), (1,)), Embedding((0,), (1,))))
    dilated = Grid.of((3,), padding=(2,), dilation=(2,))
    assert align([dilated, Grid.sampling([1])])[0] == dilated, "the middle tap is at offset 0 already"
    assert align([Grid.of((3,), padding=(1,), dilation=(2,)), Grid.sampling([1])])[0].kernel == (5,)
    even = Grid((Axis(2, before=0, after=1),))
    assert align([even])[0] == even and align([even], True)[0] == three
    causal = Grid((Axis(3, dilation=2, before=4, after=0),))
    assert align([causal, Grid.sampling([1])])[0] == causal, "the last tap is at offset 0"


def test_layers_pad_evenly_or_as_padding_same() -> None:
    uneven = Grid((Axis(4, before=1, after=2),))
    assert uneven.is_same and not uneven.symmetric and Grid.of((3, 3), padding=(1, 2)).symmetric
    for same in (uneven, Grid(uneven.axes, "reflect")):
        assert layer_grid(same) == (same, Embedding((0,), (1,)))
    causal = Grid((Axis(3, before=2, after=0),))
    assert layer_grid(causal) == (Grid.of((5,), padding=(2,)), Embedding((0,), (1,)))
    for axis in (Axis(4, 2, before=1, after=2), Axis(4, before=2, after=1), Axis(3, before=1, after=2)):
        assert not Grid((axis,)).is_same
    strided = Grid((Axis(4, 2, before=1, after=2),), "reflect")
    assert layer_grid(strided) == (Grid.of((5,), (2,), (2,), mode="reflect"), Embedding((1,), (1,)))


MISMATCHES = {
    "strides differ: 1, 2": (Axis(3, 1, 1, 1, 1), Axis(3, 2, 1, 1, 1), "zeros", "zeros"),
    "padding modes differ: circular, zeros": (axis_of(3, p=1), axis_of(3, p=1), "zeros", "circular"),
    "padding modes differ: reflect, replicate": (axis_of(3, p=1), axis_of(3, p=1), "replicate", "reflect"),
}


@pytest.mark.parametrize("reason", MISMATCHES)
def test_what_cannot_share_a_grid_is_refused_and_would_be_wrong(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *modes = MISMATCHES[reason]
    modules = [layer(2, 3, [a], mode, seed=i) for i, (a, mode) in enumerate(zip((first, second), modes, strict=True))]
    with pytest.raises(InexactError) as error:
        add(*map(map_of, modules))
    assert str(error.value) == reason
    monkeypatch.setattr(grids, "_common_mode", lambda members: members[0].mode)
    monkeypatch.setattr(grids, "_align_axis", lambda column, symmetric: column[0])
    x = signal(0, 2, 9)
    first_out, second_out = (module(x) for module in modules)
    got = run_affine(add(*map(map_of, modules)), x)
    assert first_out.shape != second_out.shape or not torch.equal(got, first_out + second_out)


@pytest.mark.parametrize("mode", MODES)
def test_paddings_of_different_widths_are_shared(mode: str) -> None:
    narrow, wide = (Grid.of((k,), padding=(k // 2,), mode=mode) for k in (3, 5))
    for members in ([narrow, wide], [wide, narrow]):
        assert align(members)[0] == wide
    modules = [layer(2, 3, [axis_of(k, p=k // 2)], mode, seed=k) for k in (3, 5)]
    x = signal(0, 2, 3)
    assert torch.equal(run_affine(add(*map(map_of, modules)), x), modules[0](x) + modules[1](x))


@pytest.mark.parametrize("mode", MODES[1:])
def test_paddings_that_together_reach_further_are_refused(mode: str) -> None:
    """Both maps can be computed on one position, their sum as one convolution cannot."""
    far, near = Grid((Axis(1, 2, before=1, after=1),), mode), Grid((Axis(1, 2),), mode)
    assert align([far], True)[0].axes[0].before == 1
    with pytest.raises(InexactError, match=f"^{mode} padding of these widths together needs larger inputs"):
        align([far, near])
    zeros = align([Grid(far.axes), near])[0].axes[0]
    assert (zeros.kernel, zeros.before, zeros.after) == (2, 1, 2)


def test_unpadded_maps_agree_with_every_padding_mode() -> None:
    for mode in MODES:
        modules = [layer(2, 3, [axis_of(3, 2, p=1)], mode, seed=1), layer(2, 3, [axis_of(2, 2)], seed=2)]
        x = signal(0, 2, 8)
        assert torch.equal(run_affine(add(*map(map_of, modules)), x), modules[0](x) + modules[1](x))


def test_sampling_agrees_with_every_padding_mode() -> None:
    for mode in MODES:
        padded = Grid((axis_of(3, p=1),), mode)
        assert align([Grid.sampling([1]), padded]) == (padded, (Embedding((1,), (1,)), Embedding((0,), (1,))))


@st.composite
def parallel(draw: st.DrawFn, count: int) -> tuple[list[nn.Module], Tensor]:
    """Modules with equal strides and equal output sizes at the size of ``x``, and ``x``."""
    dims = draw(st.integers(0, 3))
    first, groups, mode = draw(axes(dims)), (1, 2, 3, 6), draw(st.sampled_from(MODES))
    extra = [draw(st.integers(0, 2)) for _ in first]
    modules: list[nn.Module] = []
    sizes: list[int] = []
    for index in range(count):
        taps = [draw(_like(axis, size)) for axis, size in zip(first, sizes, strict=True)] if index else first
        own_mode = draw(st.sampled_from((mode, mode, mode, "zeros")))
        own_groups, bias = draw(st.sampled_from(groups)) if dims else 1, draw(st.booleans())
        modules.append(layer(6, 12, taps, own_mode, own_groups, bias, seed=index))
        if not index and dims:
            # Other paddings than zeros reach at most 3 positions into the input.
            sizes = [max(n, 4) + e for n, e in zip(smallest([map_of(modules[0]).grid]), extra, strict=True)]
    return modules, signal(dims, 6, *sizes)


def _like(axis: Axis, size: int) -> st.SearchStrategy[Axis]:
    """Other taps with the stride of ``axis`` and its output size at ``size``."""
    choices = [axis_of(k, axis.stride, d, p) for k, d, p in product(range(1, 5), range(1, 4), range(4))]
    return st.sampled_from([other for other in choices if other.out_size(size) == axis.out_size(size)])


def test_add_is_the_sum_or_a_reason() -> None:
    seen: Counter[str] = Counter()
    reasons = ("padding modes differ", "needs larger inputs than each of them")

    @settings(max_examples=400)
    @given(parallel(2))
    def check(drawn: tuple[list[nn.Module], Tensor]) -> None:
        modules, x = drawn
        first, second = map(map_of, modules)
        try:
            total = add(first, second)
        except InexactError as error:
            seen[next(words for words in reasons if words in str(error))] += 1
            return
        seen[f"exact in {first.grid.dims}"] += 1
        seen[f"exact, {total.grid.mode}"] += 1
        seen["at this size only"] += first.grid.excess != second.grid.excess
        want = modules[0](x) + modules[1](x)
        assert torch.equal(run_affine(total, x), want)
        assert torch.equal(run_affine(add(first, scaled(second, -2.0, -2.0)), x), modules[0](x) - 2 * modules[1](x))
        if first.grid.excess == second.grid.excess:
            assert same_map(total, add(second, first))
        elif total.grid.mode == "zeros":  # grids differ: each has the size of its first map
            assert torch.equal(run_affine(add(second, first), x), want)

    check()
    wanted = (*reasons, *(f"exact in {d}" for d in range(4)), *(f"exact, {m}" for m in MODES), "at this size only")
    assert min(seen[key] for key in wanted) >= 3, seen


@settings(max_examples=60)
@given(parallel(2), st.data())
def test_compose_distributes_over_add(drawn: tuple[list[nn.Module], Tensor], data: st.DataObject) -> None:
    modules, x = drawn
    try:
        total = add(*map(map_of, modules))
    except InexactError:
        reject()
    dims, sizes = total.grid.dims, modules[0](x).shape[2:]
    kernels = [data.draw(st.integers(1, min(3, n))) for n in sizes]
    outer = layer(12, 4, [axis_of(k, data.draw(st.integers(1, 2))) for k in kernels], seed=5)
    inner = layer(6, 6, [axis_of(1)] * dims, bias=False, seed=6)
    want = outer(modules[0](x) + modules[1](x))
    assert torch.equal(run_affine(compose(map_of(outer), total), x), want)
    if total.grid.mode == "zeros":
        terms = [compose(map_of(outer), map_of(module)) for module in modules]
        shift = outer(torch.zeros_like(modules[0](x)))  # the bias of the outer map counts twice
        assert torch.equal(run_affine(add(*terms), x), want + shift)
    want = modules[0](inner(x)) + modules[1](inner(x))
    assert torch.equal(run_affine(compose(total, map_of(inner)), x), want)
    assert torch.equal(run_affine(add(*(compose(map_of(m), map_of(inner)) for m in modules)), x), want)


def test_maps_of_different_dimensions_share_no_grid() -> None:
    with pytest.raises(InexactError, match="^maps of different spatial dimensions do not share a grid$"):
        align([Grid.of((3,), padding=(1,)), Grid.of((3, 3), padding=(1, 1))])


def test_adding_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InexactError, match="^channels differ: 2 to 3, 4 to 3$"):
        add(map_of(layer(2, 3, [axis_of(1)])), map_of(layer(4, 3, [axis_of(1)])))
    with pytest.raises(InexactError, match="^channels differ: 2 to 3, 2 to 4$"):
        add(map_of(layer(2, 3, [axis_of(1)])), map_of(layer(2, 4, [axis_of(1)])))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[dict[tuple[int, int], nn.Module], Tensor]:
    """Parallel modules at random places of a block matrix of 2 rows and 3 columns; no column twice in a row."""
    modules, x = draw(parallel(4))
    cells = draw(st.permutations(list(product(range(2), range(3)))))
    return dict(zip(cells, modules, strict=False)), x


@settings(max_examples=80)
@given(matrices(), st.randoms(use_true_random=False))
def test_stack_is_the_block_matrix(drawn: tuple[dict[tuple[int, int], nn.Module], Tensor], random: Random) -> None:
    modules, x = drawn
    rows, columns = (torch.tensor(random.sample(range(n), n)) for n in (2 * 12 + 1, 3 * 6 + 2))  # some are dead
    spans = {cell: (rows[cell[0] * 12 :][:12], columns[cell[1] * 6 :][:6]) for cell in modules}
    try:
        stacked = stack([Block(map_of(m), *spans[cell]) for cell, m in modules.items()], len(columns), len(rows))
    except InexactError:
        reject()
    inputs = signal(1, len(columns), *x.shape[2:])
    want = torch.zeros(2, len(rows), *next(iter(modules.values()))(x).shape[2:], dtype=torch.float64)
    for cell, module in modules.items():
        to, read = spans[cell]
        want[:, to] += module(inputs[:, read])
    assert torch.equal(run_affine(stacked, inputs), want)


def test_a_weight_outside_its_group_is_refused() -> None:
    maps = [map_of(layer(2, 2, [axis_of(1)], seed=i)) for i in range(2)]
    index = torch.arange(4)
    grouped = stack([Block(maps[0], index[:2], index[:2]), Block(maps[1], index[2:], index[2:])], 4, 4, groups=2)
    assert grouped.groups == 2 and grouped.weights()[0].shape == (4, 2, 1)
    for rows, columns in ((index[:2], index[2:]), (index[2:], index[:2]), (index[1:3], index[:2])):
        with pytest.raises(InexactError, match="^a weight falls outside its group$"):
            stack([Block(maps[0], rows, columns)], 4, 4, groups=2)
