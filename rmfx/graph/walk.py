"""Facts of nodes that are computed when first asked for, from the same facts of their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import fx

T = TypeVar("T")
ON_DEMAND = "on_demand"  # where nodes keep these facts: ``node.meta[ON_DEMAND][fact][dims]``
Place = tuple[fx.Node, int]  # a node, and the spatial dimensions among which its channels are meant


def on_demand(place: Place, fact: str, needs: Callable[[Place], Iterable[Place]], compute: Callable[[Place], T]) -> T:
    """The fact of ``place``, kept with its node; computed without recursion, as networks are deep.

    Args:
        needs: the places whose facts ``compute`` will ask for.
        compute: the fact of a place, once those are known (:func:`known`).
    """
    todo = [place]
    while todo:
        node, dims = here = todo[-1]
        if _is_known(here, fact):
            todo.pop()
            continue
        missing = [other for other in needs(here) if not _is_known(other, fact)]
        if missing:
            todo += missing
            continue
        node.meta.setdefault(ON_DEMAND, {}).setdefault(fact, {})[dims] = compute(here)
    found: T = known(place, fact)
    return found


def known(place: Place, fact: str) -> Any:
    """A fact that has been computed before."""
    node, dims = place
    return node.meta[ON_DEMAND][fact][dims]


def _is_known(place: Place, fact: str) -> bool:
    node, dims = place
    return dims in node.meta.get(ON_DEMAND, {}).get(fact, {})


def forget_facts(gm: fx.GraphModule) -> None:
    """Forget what was computed on demand: other rules have changed the neighbours since."""
    for node in gm.graph.nodes:
        node.meta.pop(ON_DEMAND, None)
