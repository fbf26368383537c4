"""Facts of nodes that are computed when first asked for, from the same facts of their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import fx

T = TypeVar("T")
Place = tuple[fx.Node, int]  # a node, and the spatial dimensions among which its channels are meant


def on_demand(place: Place, fact: str, needs: Callable[[Place], Iterable[Place]], compute: Callable[[Place], T]) -> T:
    """The fact of ``place``, kept in ``node.meta[fact]``; computed without recursion, as networks are deep.

    Args:
        needs: the places whose facts ``compute`` will ask for.
        compute: the fact of a place, once those are known (:func:`known`).
    """
    todo = [place]
    while todo:
        node, dims = here = todo[-1]
        if dims in node.meta.get(fact, {}):
            todo.pop()
            continue
        missing = [other for other in needs(here) if other[1] not in other[0].meta.get(fact, {})]
        if missing:
            todo += missing
            continue
        node.meta.setdefault(fact, {})[dims] = compute(here)
    found: T = known(place, fact)
    return found


def known(place: Place, fact: str) -> Any:
    """A fact that has been computed before."""
    node, dims = place
    return node.meta[fact][dims]
