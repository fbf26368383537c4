"""Draws a whole network: a stem, a few blocks, a head now and then."""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmarks.random_networks import blocks, joins, traps
from benchmarks.random_networks.layers import conv_act
from benchmarks.random_networks.program import Block, Network, weighted
from benchmarks.random_networks.writer import MisfitError, Writer

RECIPES: dict[str, Callable[[Writer, str], str]] = {**blocks.RECIPES, **joins.RECIPES, **traps.RECIPES}
# In-place slices go through torch.export, which takes seconds.
_RARE = {"in-place partial sum": 0.3, "plain": 0.5, "residual": 3.0}
_TRAP = 0.5


def seeded(seed: int) -> Network:
    """The network of a seed."""
    return draw(random.Random(seed), name=f"network {seed}")


def draw(r: random.Random, kind: str | None = None, name: str = "network") -> Network:
    """A network; every choice is one of ``r``'s.

    Args:
        kind: the recipe of its one block behind the stem; default: some blocks of any.
        name: as files of stack traces are called.
    """
    dims = r.choice([0, 1, 2, 2, 2, 2, 2, 2, 3])
    shape = _shape(r, dims)
    made: list[Block] = []
    current = shape
    weights = {key: _RARE.get(key, _TRAP if key in traps.RECIPES else 1.0) for key in RECIPES}
    kinds = ["stem"] if r.random() < 0.85 else []
    kinds += [kind] if kind else [weighted(r, weights) for _ in range(r.choice([1, 1, 2, 2, 3, 4]))]
    if r.random() < 0.2:
        kinds.append("head")
    for chosen in kinds:
        block, current = _block(r, chosen, dims, current)
        made.append(block)
    calls = list(range(len(made)))
    for index, block in enumerate(made):
        if block.kind != "head" and not block.extras and r.random() < 0.04 and _keeps_shape(made, index, shape, dims):
            calls.insert(calls.index(index), index)
    output = r.choice(["tensor"] * 8 + ["tuple", "dict"])
    return Network(shape, tuple(made), tuple(calls), output, r.randrange(2**31), name)


def _shape(r: random.Random, dims: int) -> tuple[int, ...]:
    width = r.choice([3, 4, 4, 6])
    if dims == 0:
        return (2, width) if r.random() < 0.7 else (2, r.choice([4, 5]), width)
    sizes = {1: (8, 9, 12, 15), 2: (6, 7, 8, 9, 11), 3: (4, 5, 6)}[dims]
    return (2, width, *(r.choice(sizes) for _ in range(dims)))


def _block(r: random.Random, kind: str, dims: int, shape: tuple[int, ...]) -> tuple[Block, tuple[int, ...]]:
    """A block of ``kind``, or a plain one where none fits the shape."""
    recipes = [{"stem": _stem, "head": _head}.get(kind) or RECIPES[kind]] * 4 + [blocks.plain] * 4
    for recipe in recipes:
        w = Writer(r, dims, shape)
        try:
            result = recipe(w, "x")
            return w.block(kind if recipe is not blocks.plain else "plain", result), w.shape(result)
        except MisfitError:
            continue
    raise AssertionError(f"not even a plain block fits {shape}")


def _stem(w: Writer, x: str) -> str:
    return conv_act(w, x, w.some_channels())


def _head(w: Writer, x: str) -> str:
    if not w.dims:
        return w.emit(f"$fc({x})", fc=f"nn.Linear({w.channels(x)}, 5)")
    axes = tuple(range(2, w.dims + 2))
    pooled = w.pick(f"{x}.mean({axes})", f"torch.flatten(F.adaptive_avg_pool{w.dims}d({x}, 1), 1)")
    return w.emit(f"$fc({w.emit(pooled)})", fc=f"nn.Linear({w.channels(x)}, 5)")


def _keeps_shape(made: list[Block], index: int, shape: tuple[int, ...], dims: int) -> bool:
    """Whether a block can run twice: its own output fits its input."""
    try:
        network = Network(shape, tuple(made[: index + 1]), (*range(index + 1), index), "tensor")
        import torch

        with torch.no_grad():
            model, x = network.build(), torch.zeros(shape, dtype=torch.float64)
            once = Network(shape, tuple(made[: index + 1]), tuple(range(index + 1))).build()(x.clone())
            twice = model(x.clone())
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return False
    return not isinstance(once, tuple) and once.shape == twice.shape
