"""Compares two networks: hostile inputs, outputs of any nesting, and the noise that rounding alone makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rmfx.algebra.exact import default_dtype
from rmfx.copying import deep_copy

AMPLITUDE = 8.0  # standard deviation of hostile inputs: signed, and well beyond the bounds of ReLU6 and Hardswish
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def hostile_like(args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int, batch: int, grow: int = 0) -> Inputs:
    """Random inputs in the shape of the given ones, in float64; what is no floating tensor stays as it is.

    Args:
        batch: size of dimension 0 of tensors of rank 2 and more.
        grow: added to every spatial size (dimensions 2 and up).
    """
    random = torch.Generator().manual_seed(seed)

    def draw(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        shape = list(x.shape)
        if len(shape) > 1:
            shape[0] = batch
            shape[2:] = [size + grow for size in shape[2:]]
        return (torch.randn(shape, generator=random, dtype=torch.float64) * AMPLITUDE).to(x.device)

    drawn_args, drawn_kwargs = pytree.tree_map(draw, (args, dict(kwargs)))
    return drawn_args, drawn_kwargs


@contextmanager
def float32_arithmetic(mode: str = "ieee") -> Iterator[None]:
    """How convolutions and matrix products of float32 tensors multiply: "ieee", or "tf32" where the device has it.

    TF32 reads 10 bits of mantissa, and a Dirac filter through it is no identity. Torch has a setting for everything,
    one per backend and one per operation; the narrower one wins where the user gave it. From wide to narrow, only those
    are set that do not follow yet: a setting that was never given can be inherited, but not be put back. All are as
    before when the block ends. An ``autocast`` around the block does not reach into it.
    """
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    levels = (backends, cudnn, cudnn.conv, cudnn.rnn, backends.cuda.matmul, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    with ExitStack() as undo:
        undo.enter_context(_matmul_precision("highest" if mode == "ieee" else "high"))
        for level in levels:
            if (before := level.fp32_precision) != mode:
                undo.callback(setattr, level, "fp32_precision", before)
                level.fp32_precision = mode
        for kind in ("cpu", "cuda"):
            undo.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _matmul_precision(wanted: str) -> Iterator[None]:
    """The older setting of matrix products, which ``torch.compile`` reads and which must not contradict the newer."""
    backends: Any = torch.backends
    matmuls = (backends.cuda.matmul, backends.mkldnn.matmul)
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user's own settings contradict each other: torch lets nobody read this one
        before = wanted
    if before == wanted:
        yield
        return
    newer = [matmul.fp32_precision for matmul in matmuls]
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for matmul, value in zip(matmuls, newer, strict=True):
            if before == "highest":
                matmul.fp32_precision = "none"  # as it is where nobody gave either
            if matmul.fp32_precision != value:
                matmul.fp32_precision = value


def run(
    model: nn.Module,
    inputs: Inputs,
    dtype: torch.dtype,
    arithmetic: Callable[[], AbstractContextManager[None]] = float32_arithmetic,
    made: torch.dtype | None = None,
) -> list[Tensor]:
    """All tensors that ``model`` returns for ``inputs``, whose floating tensors are cast to ``dtype`` first.

    Args:
        made: the type of what its code makes, such as ``torch.ones(3)``; default: ``dtype``.
    """

    def copied(x: Any) -> Any:  # networks may write into their inputs
        return x.to(dtype, copy=True) if is_floating(x) else x.clone() if isinstance(x, Tensor) else x

    args, kwargs = pytree.tree_map(copied, inputs)
    with torch.no_grad(), arithmetic(), default_dtype(made or dtype):
        return [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def is_floating(x: Any) -> bool:
    """Whether ``x`` is a tensor of floating-point numbers."""
    return isinstance(x, Tensor) and x.is_floating_point()


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` in eval mode with all floating tensors in ``dtype``."""
    return deep_copy(model).to(dtype).eval()


def relative_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest absolute difference over all outputs, each relative to the largest magnitude expected in it.

    Infinite where shapes or counts differ, or where one has an infinity or a NaN and the other has not the same.

    >>> relative_difference([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 4.0])])
    0.5
    >>> relative_difference([torch.tensor([1.0, 2.0, torch.nan])], [torch.tensor([1.0, 4.0, torch.nan])])
    0.5
    """
    if len(actual) != len(expected) or any(a.shape != b.shape for a, b in zip(actual, expected, strict=True)):
        return float("inf")
    return max((_difference(a.double(), b.double()) for a, b in zip(actual, expected, strict=True)), default=0.0)


def _difference(actual: Tensor, expected: Tensor) -> float:
    finite = expected.isfinite()
    if not torch.allclose(actual[~finite], expected[~finite], equal_nan=True):
        return float("inf")
    actual, expected = actual[finite], expected[finite]
    if actual.numel() == 0 or torch.equal(actual, expected):
        return 0.0
    gap = float((actual - expected).abs().max())
    scale = float(expected.abs().max())
    if gap != gap or gap == float("inf"):
        return float("inf")
    return gap / scale if scale else float("inf")


def largest_error(actual: list[Tensor], truth: list[Tensor]) -> float:
    """The largest absolute error over all floating outputs, each relative to the largest magnitude of its truth.

    Infinite where a value of either is infinite or NaN, and only there; absolute where all of a truth is zero.

    >>> largest_error([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 4.0])])
    0.5
    """
    pairs = [(a.double(), t.double()) for a, t in zip(actual, truth, strict=True) if is_floating(t) and t.numel()]
    if not all(x.isfinite().all() for pair in pairs for x in pair):
        return float("inf")
    return max((float((a - t).abs().max()) / (float(t.abs().max()) or 1.0) for a, t in pairs), default=0.0)


def noise_floor(model: nn.Module, inputs: Inputs, expected: list[Tensor], seed: int) -> float:
    """How much the float64 outputs of ``model`` move when every weight moves by one unit in its last place.

    That is the place of the dtype the weights are stored in. Deep random networks amplify rounding; no comparison
    can be finer than this. Values that are not finite before and after tell nothing of it.
    """
    random = torch.Generator().manual_seed(seed)
    moved = deep_copy(model).eval()
    with torch.no_grad():
        for parameter in moved.parameters():
            up = torch.randint(0, 2, parameter.shape, generator=random).to(parameter.device, torch.bool)
            ends = torch.where(up, torch.inf, -torch.inf).to(parameter.dtype)
            parameter.copy_(torch.nextafter(parameter, ends))
    floor = 0.0
    for value, before in zip(run(moved.double(), inputs, torch.float64), expected, strict=True):
        finite = value.isfinite() & before.isfinite()
        floor = max(floor, relative_difference([value[finite]], [before[finite]]))
    return floor
