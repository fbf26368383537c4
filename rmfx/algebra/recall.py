"""Weights that were computed are kept for a while, where the same maps are read again and again.

A map computes its weights whenever it is asked (:mod:`rmfx.algebra.affine`). That keeps memory low where each is asked
once, as in a conversion. Whoever decides by weights, such as the search for carried channels, asks the same maps many
times, each made of others, which then compute theirs again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

LIMIT = 256 << 20  # bytes

_Result = tuple[Tensor, Tensor | None]


class _Recall:
    """The results used last, of ``limit`` bytes together at most, by the identity of what they belong to."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.kept: OrderedDict[int, tuple[Any, _Result, int]] = OrderedDict()

    def get(self, owner: Any, compute: Callable[[], _Result]) -> _Result:
        found = self.kept.get(id(owner))
        if found is not None:
            self.kept.move_to_end(id(owner))
            return found[1]
        result = compute()
        size = sum(tensor.nbytes for tensor in result if tensor is not None)
        self.kept[id(owner)] = owner, result, size  # the owner lives as long: no other object gets its identity
        self.size += size
        while self.size > self.limit:
            _, (_, _, size) = self.kept.popitem(last=False)
            self.size -= size
        return result


_active: ContextVar[_Recall | None] = ContextVar("rmfx_recall", default=None)


@contextmanager
def recalling(limit: int = LIMIT) -> Iterator[None]:
    """Within, what :func:`recalled` computed is not computed again while ``limit`` bytes suffice.

    Nothing within may change a network's weights.

    >>> def compute():
    ...     print("computed")
    ...     return Tensor([1.0]), None
    >>> with recalling():
    ...     again = recalled("a map", compute) is recalled("a map", compute)
    computed
    >>> again
    True
    """
    if _active.get() is not None:
        yield
        return
    token = _active.set(_Recall(limit))
    try:
        yield
    finally:
        _active.reset(token)


def recalled(owner: Any, compute: Callable[[], _Result]) -> _Result:
    """``compute()``, or what it gave before for the very same ``owner``; nobody may write into it."""
    recall = _active.get()
    return compute() if recall is None else recall.get(owner, compute)
