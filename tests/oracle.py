"""The comparison every test uses: two networks, the same function. Independent of ``rmfx.verify``.

``tests/test_oracle.py`` proves that it can fail.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Rounding only. The unit roundoff of float64 is 1.1e-16 and a tiny network sums a few hundred products per layer over
# a few layers, some of them cancelling: 1e-13 is seen now and then, and an algebraic mistake is larger than 1e-10.
FLOAT64_TOLERANCE = 1e-12

BEYOND = 6.0  # inputs must leave [-6, 6] on both sides, else a lost ReLU6 clamp or sign would go unseen


def outputs(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Every tensor in the model's (possibly nested) output."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(*inputs))
    assert leaves and all(isinstance(leaf, Tensor) for leaf in leaves), f"outputs are not all tensors: {leaves}"
    return leaves


def relative_difference(expected: Tensor, actual: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of ``expected``; infinite where anything is NaN."""
    difference = ((expected - actual).abs().max() / expected.abs().max()).item()
    return difference if difference == difference else float("inf")


def assert_equivalent(original: nn.Module, converted: nn.Module, *inputs: Tensor) -> None:
    """Both models, copied to float64, give the same outputs up to rounding on one call.

    ``inputs`` are the positional arguments: a batch of at least 2, signed, well beyond +-6.
    """
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    for index, x in enumerate(inputs):
        assert x.shape[0] >= 2, f"input {index} has batch {x.shape[0]}: use at least 2"
        reach = f"input {index} spans [{x.min().item():.3g}, {x.max().item():.3g}]: too tame to show mistakes"
        assert x.min() < -BEYOND and x.max() > BEYOND, reach
    expected, actual = _run_both(original, converted, *inputs)
    for index, (want, got) in enumerate(zip(expected, actual, strict=True)):
        _check_worth_comparing(index, want, got)
        difference = relative_difference(want, got)
        assert difference <= FLOAT64_TOLERANCE, f"output {index} differs by {difference:.3g} relative to its largest"


def assert_equivalent_on(original: nn.Module, converted: nn.Module, shape: tuple[int, ...], seed: int = 0) -> None:
    """:func:`assert_equivalent` on each of :func:`hostile_inputs`, for models of one input: odd and even sizes."""
    for x in hostile_inputs(shape, seed):
        assert_equivalent(original, converted, x)


def assert_equal_exactly(original: nn.Module, converted: nn.Module, *inputs: Tensor) -> None:
    """Bit-for-bit equal in float64: for networks made by ``nets.dyadic``, whose arithmetic never rounds."""
    expected, actual = _run_both(original, converted, *(x.double() for x in inputs))
    for index, (want, got) in enumerate(zip(expected, actual, strict=True)):
        _check_worth_comparing(index, want, got)
        wrong = int((want != got).sum())
        assert torch.equal(want, got), f"output {index}: {wrong} of {want.numel()} elements differ"


def _run_both(original: nn.Module, converted: nn.Module, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    assert not original.training and not converted.training, "both models must be in eval mode"
    structures = []
    results = []
    for model in (original, converted):
        double = copy.deepcopy(model).double()
        results.append(outputs(double, *(x.clone() for x in inputs)))
        with torch.no_grad():
            structures.append(pytree.tree_structure(double(*(x.clone() for x in inputs))))
    assert structures[0] == structures[1], f"output structure changed: {structures[0]} became {structures[1]}"
    return results[0], results[1]


def _check_worth_comparing(index: int, want: Tensor, got: Tensor) -> None:
    assert want.shape == got.shape, f"output {index} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    for whose, tensor in (("original", want), ("converted", got)):
        assert tensor.dtype == torch.float64, f"output {index} of the {whose} model is {tensor.dtype}"
        assert torch.isfinite(tensor).all(), f"output {index} of the {whose} model is not finite"
        assert tensor.max() > tensor.min(), f"output {index} of the {whose} model is constant"


def hostile_inputs(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs on which mistakes show: signed, well beyond +-6, at even and odd sizes, loud at the border.

    Normal values of standard deviation 8 at ``shape`` (``[N, C, *sizes]``); the same with every spatial size one
    larger; and values of +-[20, 40] in the outermost ring only, zeros inside, where wrong padding shows.
    """
    random = torch.Generator().manual_seed(seed)
    larger = (*shape[:2], *(size + 1 for size in shape[2:]))
    ring = torch.rand(shape, dtype=torch.float64, generator=random) * 20 + 20
    ring *= torch.randint(0, 2, shape, generator=random) * 2 - 1
    if len(shape) > 2 and all(size > 2 for size in shape[2:]):
        ring[(..., *(slice(1, -1) for _ in shape[2:]))] = 0
    return (
        torch.randn(shape, dtype=torch.float64, generator=random) * 8,
        torch.randn(larger, dtype=torch.float64, generator=random) * 8,
        ring,
    )
