"""Tensors that remember what they were before they were rounded to the network's dtype.

A network of float32 holds what its code computes from weights (``w / w.std()``, ``gamma ** 0.5``, weight norm) as
float32. What is made of it later, in float64, should be made of the unrounded value: then a conversion is compared with
the original in float64 without rounding between them. The unrounded value is computed whenever it is asked for, so it
takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_UNROUNDED = "_rmfx_unrounded"


def remember(tensor: Tensor, unrounded: Callable[[], Tensor]) -> None:
    """Let ``tensor``, which nobody else holds, know how to compute its value in float64, unless it is of float64.

    >>> third = torch.tensor(1 / 3)
    >>> remember(third, lambda: torch.tensor(1 / 3, dtype=torch.float64))
    >>> float(third) == 1 / 3, float(exact(third)) == 1 / 3
    (False, True)
    """
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        setattr(tensor, _UNROUNDED, unrounded)


def is_rounded(tensor: Tensor) -> bool:
    """Whether ``tensor`` remembers another value than it holds."""
    return hasattr(tensor, _UNROUNDED)


def forget(tensor: Tensor) -> None:
    """Let ``tensor`` be what it holds."""
    if is_rounded(tensor):
        delattr(tensor, _UNROUNDED)


@torch.no_grad()
def exact(tensor: Tensor) -> Tensor:
    """``tensor`` in float64, before any rounding that it remembers; itself where it holds no floats."""
    if is_rounded(tensor):
        return getattr(tensor, _UNROUNDED)().detach()
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def on_cpu(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` on the CPU, rounded once to ``dtype``."""
    return (exact(tensor) if is_rounded(tensor) else tensor.detach()).to("cpu", dtype)


def derive(result: Tensor, function: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """``result``, which is ``function(*sources)`` rounded: it remembers as many digits as ``sources`` do.

    >>> third = torch.tensor(1 / 3)
    >>> remember(third, lambda: torch.tensor(1 / 3, dtype=torch.float64))
    >>> float(exact(derive(third * 3, lambda t: t * 3, third)))
    1.0
    """
    if any(is_rounded(source) for source in sources):
        remember(result, lambda: function(*map(exact, sources)))
    return result


def in_float64(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``call(*args, **kwargs)`` on the unrounded values of all tensors, without rounding on the way."""
    args, kwargs = pytree.tree_map_only(Tensor, exact, (args, kwargs))
    with torch.no_grad(), UnroundedCasts(), default_dtype(torch.float64):
        return call(*args, **kwargs)


class UnroundedCasts(TorchDispatchMode):
    """While this is active, casts of float64 tensors to a smaller floating type leave them as they are.

    Code with ``x.float()`` in it does nothing to a float32 network, but rounds when that network is run in float64, and
    a value next to the middle between two float32 numbers is then rounded up in one network and down in the other.
    New tensors of a smaller floating type (``torch.zeros(3, dtype=torch.float32)``) are of float64, too.

    >>> with UnroundedCasts():
    ...     torch.tensor(0.1, dtype=torch.float64).float().dtype
    torch.float64
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("dtype")
        given = {leaf.dtype for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)} - {torch.float64}
        if wanted is not None and wanted.is_floating_point and not any(dtype.is_floating_point for dtype in given):
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What code makes with ``torch.ones`` and the like comes in ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
