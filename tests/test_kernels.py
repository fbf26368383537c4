"""Weight arithmetic against loops over single weights, written from the definition of a grouped convolution."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_affine import axis_of, integers, layer, map_of, run_affine, signal
from torch import Tensor, nn

from rmfx.algebra.affine import average_pool, compose, dirac, from_tensors, per_channel
from rmfx.algebra.grid import Grid
from rmfx.algebra.kernels import (
    compose_bias,
    compose_weights,
    norm_scale_shift,
    place_block,
    regroup,
    scale_rows,
    spread,
)
from rmfx.algebra.stacking import Block, stack

KERNELS = st.lists(st.integers(1, 3), max_size=3)


def dense(weight: Tensor, groups: int) -> Tensor:
    """``[O, I, *k]``: every weight at the channels that it connects, one at a time."""
    out, width = weight.shape[0], weight.shape[1]
    full = torch.zeros(out, width * groups, *weight.shape[2:], dtype=weight.dtype)
    for o, i in product(range(out), range(width)):
        full[o, o // (out // groups) * width + i] = weight[o, i]
    return full


@settings(max_examples=60)
@given(st.sampled_from((1, 2, 3)), st.sampled_from((1, 2, 4)), st.integers(1, 3), st.integers(1, 3), KERNELS)
def test_regroup_is_the_same_map(to: int, merged: int, out: int, width: int, kernel: list[int]) -> None:
    groups = to * merged
    weight = integers(out, groups * out, width, *kernel)
    wider = regroup(weight, groups, to)
    assert wider.shape == (groups * out, width * merged, *kernel)
    assert torch.equal(dense(wider, to), dense(weight, groups))


def test_regroup_to_the_same_groups_copies_nothing() -> None:
    weight = integers(0, 4, 2, 3)
    assert regroup(weight, 2, 2) is weight


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2)), max_size=3))
def test_spread_places_every_tap(spans: list[tuple[int, int, int, int]]) -> None:
    small = [k for k, *_ in spans]
    large = [first + (k - 1) * step + 1 + rest for k, step, first, rest in spans]
    index = tuple(slice(first, first + (k - 1) * step + 1, step) for k, step, first, _ in spans)
    weight = integers(len(spans), 2, 3, *small)
    want = torch.zeros(2, 3, *large, dtype=torch.float64)
    for tap in product(*map(range, small)):
        place = (first + t * step for t, (_, step, first, _) in zip(tap, spans, strict=True))
        want[(..., *place)] = weight[(..., *tap)]
    assert torch.equal(spread(weight, large, index), want)


@settings(max_examples=80)
@given(st.integers(0, 3), st.sampled_from((1, 2, 3)), st.data())
def test_compose_weights_is_the_convolution_of_kernels(dims: int, groups: int, data: st.DataObject) -> None:
    taps = st.lists(st.integers(1, 2 if dims == 3 else 3), min_size=dims, max_size=dims)
    outer_kernel, inner_kernel = data.draw(taps), data.draw(taps)
    out, mid, width = (data.draw(st.integers(1, 2)) for _ in range(3))
    outer, inner = integers(1, groups * out, mid, *outer_kernel), integers(2, groups * mid, width, *inner_kernel)
    full_outer, full_inner = dense(outer, groups), dense(inner, groups)
    kernel = [a + b - 1 for a, b in zip(outer_kernel, inner_kernel, strict=True)]
    want = torch.zeros(groups * out, groups * width, *kernel, dtype=torch.float64)
    for a, b in product(product(*map(range, outer_kernel)), product(*map(range, inner_kernel))):
        want[(..., *(i + j for i, j in zip(a, b, strict=True)))] += full_outer[(..., *a)] @ full_inner[(..., *b)]
    assert torch.equal(dense(compose_weights(outer, inner, groups), groups), want)


@settings(max_examples=40)
@given(st.sampled_from((1, 2, 3)), st.integers(1, 2), st.integers(1, 2), KERNELS)
def test_compose_bias_is_the_outer_map_of_a_constant(groups: int, out: int, mid: int, kernel: list[int]) -> None:
    outer, bias = integers(1, groups * out, mid, *kernel), integers(2, groups * mid)
    want = torch.stack([sum(row[i].sum() * bias[i] for i in range(len(bias))) for row in dense(outer, groups)])
    assert torch.equal(compose_bias(outer, bias, groups), want)


@settings(max_examples=80)
@given(st.sampled_from((1, 2, 4)), st.integers(1, 2), st.integers(1, 2), KERNELS, st.randoms(use_true_random=False))
def test_place_block_writes_every_weight(groups: int, out: int, width: int, kernel: list[int], random: Random) -> None:
    block = integers(3, groups * out, width, *kernel)
    target = torch.zeros(9, 10, *(k + 1 for k in kernel), dtype=torch.float64)
    rows = torch.tensor(random.sample(range(9), groups * out))
    own = torch.tensor(random.sample(range(10), groups * width))
    columns = own.reshape(groups, width).repeat_interleave(out, 0)
    index = tuple(slice(1, k + 1) for k in kernel)
    want = target.clone()
    for o, i in product(range(groups * out), range(width)):
        want[(int(rows[o]), int(columns[o, i]), *index)] = block[o, i]
    place_block(target, block, rows, columns, index)
    assert torch.equal(target, want)
    assert int((target != 0).sum()) == int((block != 0).sum())


@pytest.mark.parametrize("rows", [[2, 3, 4], [4, 2, 3]])
@pytest.mark.parametrize("columns", [[[1, 2]], [[2, 1]], [[1, 2], [1, 2], [1, 2]], [[1, 2], [1, 2], [3, 4]]])
def test_place_block_takes_runs_and_scattered_channels(rows: list[int], columns: list[list[int]]) -> None:
    block, target = integers(5, 3, 2) + 10, torch.zeros(6, 6, dtype=torch.float64)
    place_block(target, block, torch.tensor(rows), torch.tensor(columns), ())
    want = torch.zeros(6, 6, dtype=torch.float64)
    for o, i in product(range(3), range(2)):
        want[rows[o], (columns * 3 if len(columns) == 1 else columns)[o][i]] = block[o, i]
    assert torch.equal(target, want)


@pytest.mark.parametrize("affine", [True, False])
def test_norm_scale_shift_is_batch_norm(affine: bool) -> None:
    norm = nn.BatchNorm1d(4, eps=0.1, affine=affine, dtype=torch.float64).eval()
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([-7.0, 0.0, 3.0, 9.0]))
        norm.running_var.copy_(torch.tensor([0.0, 1e-6, 2.0, 1e4]))
        for parameter in norm.parameters():
            parameter.copy_(torch.tensor([-2.0, 0.5, 0.0, 3.0]))
    scale, shift = norm_scale_shift(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    x = signal(0, 4)
    torch.testing.assert_close(x * scale + shift, norm(x), rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("piece", [1, 30, 10**6])
@pytest.mark.parametrize("kernel", [(), (3,), (2, 3)])
def test_scale_rows_rounds_once_whatever_the_pieces(piece: int, kernel: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(5, 4, *kernel, generator=random), torch.randn(5, dtype=torch.float64, generator=random)
    want = torch.stack([row.double() * factor for row, factor in zip(weight, scale, strict=True)])
    for dtype in (torch.float64, torch.float32, torch.float16):
        assert torch.equal(scale_rows(weight, scale, dtype, piece), want.to(dtype))


# -- maps made of kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", range(4))
def test_a_map_of_each_channel(dims: int) -> None:
    scale, shift = integers(1, 3), integers(2, 3)
    affine = per_channel(lambda: (scale, shift), 3, dims, True)
    x, index = signal(0, 3, *[3] * dims), torch.arange(3)
    want = (x.transpose(1, -1) * scale + shift).transpose(1, -1)
    assert affine.diagonal and affine.parameters == 6
    assert torch.equal(run_affine(stack([Block(affine, index, index)], 3, 3), x), want)


def test_diagonal_is_only_scales_and_shifts() -> None:
    assert dirac(3, Grid.sampling([1, 1])).diagonal and dirac(3, Grid()).diagonal
    assert not dirac(3, Grid.sampling([1, 2])).diagonal
    assert not map_of(layer(4, 4, [axis_of(1)], groups=2)).diagonal
    assert not map_of(layer(4, 8, [axis_of(1)], groups=4)).diagonal
    assert not map_of(layer(4, 4, [axis_of(3, p=1)], groups=4)).diagonal
    assert not map_of(layer(4, 4, [axis_of(1, p=1)], groups=4)).diagonal
    assert map_of(layer(4, 4, [axis_of(1)], groups=4)).diagonal


def test_average_pool_is_a_depthwise_map() -> None:
    affine = average_pool(3, Grid.of((2, 3), (2, 1), (1, 0)), 4)
    x = signal(0, 3, 7, 6)
    pool = nn.AvgPool2d((2, 3), (2, 1), (1, 0), divisor_override=4)
    assert affine.groups == 3 and not affine.has_bias
    torch.testing.assert_close(run_affine(affine, x), pool(x), rtol=0, atol=1e-14)


def test_weights_are_rounded_once() -> None:
    weights = torch.tensor([[1 / 3, 0.7]], dtype=torch.float64), torch.tensor([[1 / 3], [2 / 7]], dtype=torch.float64)
    first, second = (
        from_tensors(w, None, Grid(), sources=frozenset({name})) for w, name in zip(weights, "ab", strict=True)
    )
    both = compose(second, first)
    assert both.sources == {"a", "b"}
    weight, _ = both.compute(torch.float32)
    assert torch.equal(weight, both.weights()[0].float())
    assert not torch.equal(weight, second.compute(torch.float32)[0] @ first.compute(torch.float32)[0])


def test_biases_of_a_join_are_rounded_once() -> None:
    small = 2.0**-24 + 2.0**-30
    biases = (torch.tensor([value], dtype=torch.float64) for value in (1.0 + small, -1.0))
    maps = [from_tensors(torch.ones(1, 1).double(), bias, Grid()) for bias in biases]
    joined = stack([Block(m, torch.tensor([0]), torch.tensor([i])) for i, m in enumerate(maps)], 2, 1)
    assert joined.compute(torch.float32)[1].item() == small
