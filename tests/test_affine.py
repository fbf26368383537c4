"""The laws of composition: the composed map computes what the modules do one after the other, or is refused.

Sums and stacks, which need one common grid, are in ``test_grid.py``. All weights and inputs are small integers, so
float64 never rounds and every comparison is bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rmfx.algebra import affine as algebra
from rmfx.algebra.affine import Affine, compose, dirac, from_tensors, scaled, uniform
from rmfx.algebra.exact import remember
from rmfx.algebra.grid import Axis, Grid
from rmfx.errors import InexactError

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MODES = ("zeros", "reflect", "replicate", "circular")
COMPOSE_REASONS = {"already padded": 0, "see 0 where": 1, "does not commute": 2}


def run_affine(affine: Affine, x: Tensor) -> Tensor:
    """What ``affine`` means, in torch's own functions: pad, convolve."""
    weight, bias = affine.weights()
    if not affine.grid.dims:
        return F.linear(x, weight, bias)
    borders = [width for axis in reversed(affine.grid.axes) for width in (axis.before, axis.after)]
    if any(borders):
        x = F.pad(x, borders, mode="constant" if affine.grid.mode == "zeros" else affine.grid.mode)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[affine.grid.dims - 1]
    return convolve(x, weight, bias, affine.grid.stride, 0, affine.grid.dilation, affine.groups)


def integers(seed: int, *shape: int, reach: int = 4) -> Tensor:
    """Integers of both signs as float64; 0 among them."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-reach, reach + 1, shape, generator=random).double()


def signal(seed: int, *shape: int) -> Tensor:
    """An integer input of batch 2 that reaches beyond +-6."""
    return integers(seed, 2, *shape, reach=20)


def layer(
    c_in: int, c_out: int, axes: Sequence[Axis], mode: str = "zeros", groups: int = 1, bias: bool = True, seed: int = 0
) -> nn.Module:
    """The torch module with these taps (symmetric padding) and integer weights."""
    if not axes:
        module: nn.Module = nn.Linear(c_in, c_out, bias)
    else:
        spans = zip(*((a.kernel, a.stride, a.before, a.dilation) for a in axes), strict=True)
        kernel, stride, padding, dilation = spans
        module = CONVS[len(axes) - 1](c_in, c_out, kernel, stride, padding, dilation, groups, bias, mode)
    for offset, parameter in enumerate(module.parameters()):
        parameter.data = integers(seed + offset, *parameter.shape)
    return module.requires_grad_(False)


def map_of(module: nn.Module) -> Affine:
    """The map of a convolution or linear layer."""
    if isinstance(module, nn.Linear):
        return from_tensors(module.weight, module.bias, Grid())
    mode = module.padding_mode if any(module.padding) else "zeros"
    grid = Grid.of(module.kernel_size, module.stride, module.padding, module.dilation, mode)
    return from_tensors(module.weight, module.bias, grid, module.groups)


def axis_of(k: int, s: int = 1, d: int = 1, p: int = 0) -> Axis:
    """An axis as ``nn.Conv`` has them."""
    return Axis(k, s, d, p, p)


def axes(dims: int, padded: bool = True, kernel: int = 4, stride: int = 3) -> st.SearchStrategy[list[Axis]]:
    """``dims`` axes; on three axes taps are fewer and closer."""
    kernels, gaps = min(kernel, 2 if dims == 3 else 4), 2 if dims == 3 else 3
    one = st.builds(
        axis_of,
        st.integers(1, kernels),
        st.integers(1, min(stride, gaps)),
        st.integers(1, gaps),
        st.integers(0, gaps if padded else 0),
    )
    return st.lists(one, min_size=dims, max_size=dims)


def smallest(chain: Sequence[Grid]) -> list[int]:
    """Per axis, the smallest input size that every grid of the chain accepts."""
    return [next(n for n in range(1, 500) if _accepts(chain, axis, n)) for axis in range(chain[0].dims)]


def _accepts(chain: Sequence[Grid], index: int, size: int) -> bool:
    for grid in chain:
        axis = grid.axes[index]
        most = {"zeros": size + 99, "replicate": size + 99, "reflect": size - 1, "circular": size}[grid.mode]
        if max(axis.before, axis.after) > most or axis.out_size(size) < 1:
            return False
        size = axis.out_size(size)
    return True


@st.composite
def pairs(draw: st.DrawFn) -> tuple[nn.Module, nn.Module, Tensor]:
    """``(outer, inner, x)`` with channels that fit; about half of them compose exactly."""
    dims = draw(st.integers(0, 3))
    exact, seed = draw(st.sampled_from(("outer pads nothing", "inner is 1x1", "any"))), draw(st.integers(0, 99))
    inner_groups, outer_groups = (draw(st.sampled_from((1, 2, 3, 6))) if dims else 1 for _ in range(2))
    inner_axes = draw(axes(dims, stride=draw(st.sampled_from((1, 3)))))
    if exact == "inner is 1x1":
        inner_axes = [axis_of(1, a.stride) for a in inner_axes]
    outer_axes = draw(axes(dims, padded=exact != "outer pads nothing"))
    widths = 6 * draw(st.integers(1, 2)), 6, 6 * draw(st.integers(1, 2))
    modes, bias = [draw(st.sampled_from(MODES)) for _ in range(2)], [draw(st.booleans()) for _ in range(2)]
    inner = layer(widths[0], widths[1], inner_axes, modes[0], inner_groups, bias[0], seed)
    outer = layer(widths[1], widths[2], outer_axes, modes[1], outer_groups, bias[1], seed + 7)
    sizes = [n + draw(st.integers(0, 2)) for n in smallest([map_of(inner).grid, map_of(outer).grid])] if dims else []
    return outer, inner, signal(seed, widths[0], *sizes)


@settings(max_examples=60)
@given(pairs())
def test_a_map_is_its_module(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, module, x = pair
    affine = map_of(module)
    assert torch.equal(run_affine(affine, x), module(x))
    assert affine.parameters == sum(p.numel() for p in module.parameters())
    assert affine.macs_per_position == module.weight.numel()


def test_compose_is_running_both_or_a_reason() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=400)
    @given(pairs())
    def check(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
        outer, inner, x = pair
        try:
            both = compose(map_of(outer), map_of(inner))
        except InexactError as error:
            seen[next(words for words in COMPOSE_REASONS if words in str(error))] += 1
            return
        dims = both.grid.dims
        seen[f"exact in {dims}"] += 1
        seen[f"exact, {both.grid.mode}"] += 1
        seen["exact, padded over 1x1"] += map_of(outer).grid.padded
        assert torch.equal(run_affine(both, x), outer(inner(x)))
        assert both.has_bias == (both.weights()[1] is not None)
        assert both.weights()[0].shape == (both.out_channels, both.in_channels // both.groups, *both.grid.kernel)

    check()
    wanted = (*COMPOSE_REASONS, *(f"exact in {d}" for d in range(4)), *(f"exact, {m}" for m in MODES))
    assert min(seen[key] for key in (*wanted, "exact, padded over 1x1")) >= 3, seen


PADDED_TWICE = "the outer convolution pads what the inner one, which is not 1x1, has already padded"
UNSEEN_BIAS = "zero padding of the outer convolution would see 0 where the inner bias should stand"
BROKEN_COMPOSITIONS = [  # mode of the padded 3x3 outer map; taps and bias of the inner one; reason
    ("zeros", axis_of(3, p=1), False, PADDED_TWICE),
    ("zeros", axis_of(3), False, PADDED_TWICE),
    ("zeros", axis_of(1, p=1), True, UNSEEN_BIAS),
    ("reflect", axis_of(3, p=1), False, PADDED_TWICE),
    ("reflect", axis_of(1, p=1), False, PADDED_TWICE),
    ("zeros", axis_of(1), True, UNSEEN_BIAS),
    ("zeros", axis_of(1, 2), True, UNSEEN_BIAS),
    *((mode, axis_of(1, 2), False, f"{mode} padding does not commute with a stride") for mode in MODES[1:]),
]


@pytest.mark.parametrize(("mode", "axis", "bias", "reason"), BROKEN_COMPOSITIONS)
def test_forbidden_compositions_would_be_wrong(
    mode: str, axis: Axis, bias: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = layer(2, 3, [axis] * 2, "zeros", bias=bias, seed=1)
    outer = layer(3, 2, [axis_of(3, p=1)] * 2, mode, seed=2)
    with pytest.raises(InexactError) as error:
        compose(map_of(outer), map_of(inner))
    assert str(error.value) == reason
    monkeypatch.setattr(algebra, "_require_padding_commutes", lambda outer, inner: None)
    x = signal(3, 2, 7, 10)
    want, got = outer(inner(x)), run_affine(compose(map_of(outer), map_of(inner)), x)
    assert want.shape != got.shape or not torch.equal(want, got)


def test_other_paddings_commute_with_a_biased_1x1() -> None:
    for mode in MODES[1:]:
        outer, inner = layer(3, 2, [axis_of(3, p=1)], mode, seed=1), layer(2, 3, [axis_of(1)], seed=2)
        x = signal(0, 2, 7)
        assert torch.equal(run_affine(compose(map_of(outer), map_of(inner)), x), outer(inner(x)))


def test_composing_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InexactError, match="^3 channels feed a map of 4$"):
        compose(map_of(layer(4, 4, [axis_of(1)])), map_of(layer(2, 3, [axis_of(1)])))
    with pytest.raises(InexactError, match="^2 and 1 spatial dimensions do not compose$"):
        compose(map_of(layer(3, 4, [axis_of(1)] * 2)), map_of(layer(2, 3, [axis_of(1)])))


def same_map(first: Affine, second: Affine) -> bool:
    """Equal maps, weight for weight (a lone tap has no dilation to compare)."""
    (w1, b1), (w2, b2) = first.weights(), second.weights()
    taps = [[(a.kernel, a.stride, a.dilation * (a.kernel > 1), a.before, a.after) for a in f.grid.axes]
            for f in (first, second)]  # fmt: skip
    equal_bias = (b1 is None and b2 is None) or (b1 is not None and b2 is not None and torch.equal(b1, b2))
    return taps[0] == taps[1] and first.groups == second.groups and torch.equal(w1, w2) and equal_bias


@settings(max_examples=60)
@given(pairs())
def test_the_identity_changes_nothing(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    affine = map_of(pair[1])
    after = compose(dirac(affine.out_channels, Grid.sampling([1] * affine.grid.dims)), affine)
    assert same_map(after, affine) and after.grid.mode == affine.grid.mode
    before = compose(affine, dirac(affine.in_channels, Grid.sampling([1] * affine.grid.dims)))
    assert same_map(before, affine) and before.grid.mode == affine.grid.mode


@settings(max_examples=60)
@given(st.integers(0, 3), st.data())
def test_compose_is_associative(dims: int, data: st.DataObject) -> None:
    groups = [data.draw(st.sampled_from((1, 2, 3))) if dims else 1 for _ in range(3)]
    taps = [data.draw(axes(dims, padded=index == 0, kernel=3, stride=2)) for index in range(3)]
    bias = [data.draw(st.booleans()) for _ in range(3)]
    mode = data.draw(st.sampled_from(MODES))
    modules = [layer(6, 6, taps[i], mode if i == 0 else "zeros", groups[i], bias[i], seed=i) for i in range(3)]
    first, second, third = map(map_of, modules)
    left, right = compose(compose(third, second), first), compose(third, compose(second, first))
    assert same_map(left, right) and left.grid.mode == right.grid.mode
    sizes = smallest([first.grid, second.grid, third.grid]) if dims else []
    x = signal(dims, 6, *sizes)
    assert torch.equal(run_affine(left, x), modules[2](modules[1](modules[0](x))))


def test_scaling_by_one_is_no_work() -> None:
    affine = map_of(layer(2, 3, [axis_of(3)]))
    assert scaled(affine, 1.0, 1.0) is affine


def test_what_is_rounded_is_composed_before_rounding() -> None:
    third = torch.full((1, 1), 1 / 3)
    remember(third, lambda: torch.full((1, 1), 1 / 3, dtype=torch.float64))
    rounded = from_tensors(third, None, Grid())
    for affine in (rounded, compose(uniform(1, 0, 3.0, 0.0), rounded), compose(rounded, uniform(1, 0, 3.0, 0.0))):
        weight, _ = affine.weights()
        assert float(weight) == (1 / 3 if affine is rounded else 1.0)


def test_scaling_leaves_no_bias_of_zeros() -> None:
    with_bias, without = (map_of(layer(2, 3, [axis_of(3)], bias=bias)) for bias in (True, False))
    for affine, factor in ((without, 3.0), (without, 0.0), (with_bias, 0.0)):
        weight, bias = scaled(affine, 2.0, factor).weights()
        assert torch.equal(weight, 2 * affine.weights()[0]) and bias is None
        assert not scaled(affine, 2.0, factor).has_bias
    (_, before), (_, after) = with_bias.weights(), scaled(with_bias, 2.0, 3.0).weights()
    assert before is not None and after is not None and torch.equal(after, 3 * before)
    assert uniform(2, 1, 3.0, 0.0).weights()[1] is None
