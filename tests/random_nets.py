"""Random residual networks as hypothesis strategies, which shrink; the generator itself is the fuzz benchmark's."""

from __future__ import annotations

from hypothesis import strategies as st

from benchmarks.random_networks.draw import draw
from benchmarks.random_networks.judge import Order, draw_order
from benchmarks.random_networks.program import Network


def networks(kind: str | None = None) -> st.SearchStrategy[tuple[Network, Order]]:
    """A network and how to convert it; ``kind`` names the recipe of its one block."""
    return st.randoms(use_true_random=False).map(lambda r: (draw(r, kind), draw_order(r)))
