"""Random residual networks as hypothesis strategies, which shrink; the generator itself is the fuzz benchmark's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from hypothesis import strategies as st


def make_importable(package: str) -> None:
    """The root of the repository is not on the path of tests, see ``setup.cfg``."""
    if package in sys.modules:
        return
    folder = Path(__file__).resolve().parent.parent / package
    file, places = folder / "__init__.py", [str(folder)]
    spec = importlib.util.spec_from_file_location(package, file, submodule_search_locations=places)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    spec.loader.exec_module(module)


make_importable("benchmarks")

from benchmarks.random_networks.draw import draw  # noqa: E402
from benchmarks.random_networks.judge import Order, draw_order  # noqa: E402
from benchmarks.random_networks.program import Network  # noqa: E402


def networks(kind: str | None = None) -> st.SearchStrategy[tuple[Network, Order]]:
    """A network and how to convert it; ``kind`` names the recipe of its one block."""
    return st.randoms(use_true_random=False).map(lambda r: (draw(r, kind), draw_order(r)))
