"""The errors of single layers of a plain network in some precision, beside the same values in the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from rmfx.algebra.exact import default_dtype
from rmfx.check.compare import Inputs, float32_arithmetic, in_dtype, is_floating, largest_error
from rmfx.check.precisions import Precision
from rmfx.errors import RmfxError
from rmfx.front.doors import enter
from rmfx.inputs import bind
from rmfx.passes.normalise import normalise


@dataclass(frozen=True)
class LayerGap:
    """Errors at the output of one layer, each relative to the largest magnitude there; infinite where it overflows.

    Attributes:
        layer: qualified name in the plain network, or of the operation where it is no layer.
        place: the module of the original that it belongs to.
        own: what this layer alone adds, on exact inputs.
        plain: what has gathered up to here, from the network's inputs on.
        original: what the original has gathered where it computes the same value, at a removed sum for instance;
            ``None`` where it has no such value.
    """

    layer: str
    place: str
    own: float
    plain: float
    original: float | None


def layer_gaps(original: nn.Module, plain: nn.Module, inputs: Inputs, precision: Precision) -> tuple[LayerGap, ...]:
    """One entry for each layer of ``plain``, in order.

    Args:
        inputs: finite, and already rounded to the precision's dtype.

    Raises:
        RmfxError: when ``plain`` is no ``GraphModule``, or the original's code cannot be followed.
    """
    if not isinstance(plain, fx.GraphModule):
        raise RmfxError(f"errors per layer need the GraphModule that rmfx.convert makes, not a {type(plain).__name__}")
    with torch.no_grad():
        followed = normalise(enter(in_dtype(original, torch.float64), *inputs).gm)
        theirs, mine = _Run(followed, inputs, precision), _Run(plain, inputs, precision)
        shared = {node.meta["origin"]: node for node in followed.graph.nodes if "origin" in node.meta}
        return tuple(_gap(mine, theirs, node, shared.get(node.meta.get("origin"))) for node in mine.layers())


def _gap(mine: _Run, theirs: _Run, node: fx.Node, same: fx.Node | None) -> LayerGap:
    """The errors at ``node``; ``same`` computes its value in the original."""
    truth = mine.exact[node] if same is None else theirs.exact[same]
    return LayerGap(
        layer=str(node.target) if node.op == "call_module" else node.name,
        place=node.meta.get("place", ""),
        own=mine.own_error(node),
        plain=largest_error([mine.rounded[node]], [truth]),
        original=None if same is None else largest_error([theirs.rounded[same]], [truth]),
    )


class _Run:
    """All values of a graph, in float64 and in a precision."""

    def __init__(self, gm: fx.GraphModule, inputs: Inputs, precision: Precision) -> None:
        self._graph, self._precision = gm.graph, precision
        self._exact, self._rounded = (
            fx.Interpreter(in_dtype(gm, dtype), garbage_collect_values=False, graph=gm.graph)
            for dtype in (torch.float64, precision.dtype)
        )
        bound = bind(gm, *inputs)
        with float32_arithmetic(), default_dtype(torch.float64):
            self._exact.run(*_cast(bound, torch.float64))
        with precision.arithmetic(), default_dtype(precision.dtype):
            self._rounded.run(*_cast(bound, precision.dtype))
        self.exact, self.rounded = dict(self._exact.env), dict(self._rounded.env)

    def layers(self) -> list[fx.Node]:
        """Everything that computes one floating tensor."""
        computed = [node for node in self._graph.nodes if node.op.startswith("call_")]
        return [node for node in computed if is_floating(self.exact[node])]

    def own_error(self, node: fx.Node) -> float:
        """The error of ``node`` alone, on the exact values of what it reads."""
        read = {source: self.exact[source] for source in node.all_input_nodes}
        self._rounded.env = _cast(read, self._precision.dtype)
        self._exact.env = _cast(self._rounded.env, torch.float64)
        with self._precision.arithmetic(), default_dtype(self._precision.dtype):
            rounded = self._rounded.run_node(node)
        return largest_error([rounded], [self._exact.run_node(node)])


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda x: x.to(dtype) if is_floating(x) else x, values)
