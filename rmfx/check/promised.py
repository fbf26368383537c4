"""Inputs on which what the user said of values holds: elsewhere a network that relies on it is another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rmfx.algebra.bounds import Bounds
from rmfx.check.compare import AMPLITUDE, Inputs, is_floating
from rmfx.errors import RmfxError
from rmfx.graph.bounds import GIVEN, value_name
from rmfx.inputs import bind
from rmfx.prepare import prepare

ROUNDING = 1e-13  # of the largest value: by so much may one be outside of a range that was measured on the same inputs


def keeping_promises(
    model: nn.Module, drawn: Sequence[Inputs], example: Inputs, value_ranges: Mapping[str, Any]
) -> list[Inputs]:
    """Of inputs to compare ``model`` on those on which ``value_ranges`` hold, the first in the example's shapes.

    Drawn inputs are moved into the ranges that are given for inputs. Ranges of other values hold on them or not; where
    they do not on the first, the example inputs themselves take its place.

    Args:
        model: in eval mode and float64.
        drawn: normal with deviation :data:`rmfx.check.compare.AMPLITUDE`; the first has the shapes of ``example``.
        example: what the user gave.
        value_ranges: as for :func:`rmfx.convert`.

    Raises:
        RmfxError: when the ranges do not hold on the example inputs either; names the value that is outside.

    >>> (args, _), = keeping_promises(nn.ReLU(), [((torch.tensor([[-99.0, 99.0]]),), {})], ((), {}), {"input": (0, 1)})
    >>> args[0]
    tensor([[0., 1.]])
    """
    first = drawn[0]
    gm = prepare(model, first[0], first[1], keep_bn=True, value_ranges=value_ranges).gm  # layers of all names
    moved = [_into_ranges(gm, inputs) for inputs in drawn]
    kept = [inputs for inputs in moved if _broken(gm, inputs) is None]
    if kept and kept[0] is moved[0]:
        return kept
    exact = pytree.tree_map(lambda x: x.double() if is_floating(x) else x, example)
    if (broken := _broken(gm, exact)) is not None:
        raise RmfxError(
            f"value_ranges do not hold on the example inputs, {broken}: give inputs on which they do, to compare the "
            "networks on, or verify=False"
        )
    return [exact, *kept]


def _into_ranges(gm: fx.GraphModule, inputs: Inputs) -> Inputs:
    args, kwargs = list(inputs[0]), dict(inputs[1])
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for index, node in enumerate(placeholders):
        bounds = node.meta.get(GIVEN)
        if bounds is None:
            continue
        if index < len(args):
            args[index] = _moved(args[index], bounds)
        elif node.target in kwargs:
            kwargs[node.target] = _moved(kwargs[node.target], bounds)
    return tuple(args), kwargs


def _moved(x: Any, bounds: Bounds) -> Any:
    """Normal numbers, spread evenly over the range; ends that are infinite only cut them off."""
    if not is_floating(x):
        return x
    low, high = _ends(bounds, x)
    spread = low + (high - low) * torch.special.ndtr(x / AMPLITUDE)
    return torch.where((high - low).isfinite(), spread, x).clamp(low, high)


def _ends(bounds: Bounds, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends, to be read beside ``x``; channels are dimension 1."""
    shape = (-1, *[1] * (x.dim() - 2)) if bounds.low.dim() else ()
    return bounds.low.to(x).reshape(shape), bounds.high.to(x).reshape(shape)


def _broken(gm: fx.GraphModule, inputs: Inputs) -> str | None:
    """What says that a value lies outside its range; inputs that the network does not take break nothing."""
    watch = _Watch(gm)
    try:
        watch.run(*bind(gm, *inputs))
    except (RuntimeError, ValueError, AssertionError):
        return None  # whoever compares on them finds out, and tells why
    return watch.broken


class _Watch(fx.Interpreter):
    """Runs a graph and notes the first value that leaves its range."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.broken: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        bounds = n.meta.get(GIVEN)
        if bounds is not None and self.broken is None and is_floating(value) and value.numel():
            low, high = _ends(bounds, value)
            slack = ROUNDING * value.abs().max()
            if not bool(((value >= low - slack) & (value <= high + slack)).all()):
                reached, range_ = (f"[{a:.4g}, {b:.4g}]" for a, b in ((value.min(), value.max()), bounds.range))
                self.broken = f"{value_name(n)!r} reaches {reached}, outside of {range_}"
        return value
