"""Carried channels become a shortcut again: the way back from reserve and merge.

    x -> [L1; R] -> [phi; psi] -> [L2  0] -> [phi; psi] -> ... -> [Ln, M] -> y
                                  [0   I]

    becomes
                +-- L1 - phi - L2 - phi - ... - Ln --+
            x --+                                    +--> y
                +-- M R -----------------------------+

where ``psi`` is the identity on what ``R`` gives, so that ``[Ln, M] [h; R x] = Ln h + M R x``. The channels are found
in the weights of the finished network alone. ``M R`` is the identity, a selection, a convolution, or a part of one of
these: whatever of it is left after pruning. The layers in between lose the carried channels, and take the finest groups
that their remaining weights allow.

Conditions:

1. ``L1`` to ``Ln`` are convolutions or linear layers with one reader; between them stand activations, batch norms,
   gates that are computed from other channels than the carried ones, and sums with what comes from elsewhere;
2. ``psi`` is the identity: slope 1, no bounds, not masked, a factor of exactly 1, a term of exactly 0, a batch norm
   with ``w = sqrt(var + eps), b = mean`` to the rounding of ``w`` (equation 2), or a range of values on which the
   activation is; or it acts on ``v`` and ``-v``, with ``phi(v) - phi(-v) = k v``, and ``M`` reads their difference;
3. each layer between carries by Dirac filters: one tap, at offset 0, without bias, of a map that keeps sizes but for
   its stride; its weight is exactly 1, or another power of two where two codings meet;
4. MACs fall, or parameters do at the same MACs;
5. with ``patient``, no channel is carried beyond ``Ln``: of nested runs the outer one goes first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from rmfx.algebra.affine import Affine
from rmfx.algebra.pointwise import Range
from rmfx.graph.facts import range_of, shape_of
from rmfx.graph.linear import map_of
from rmfx.graph.rule import Price, Refusal, Rule
from rmfx.layout.lowering import Lowering, lower_run, ways_of
from rmfx.layout.plainly import Layer
from rmfx.layout.runs import Run, find_runs
from rmfx.layout.stack import Gate, Stage, is_layer

if TYPE_CHECKING:
    from rmfx.graph.editor import Editor


@dataclass(frozen=True)
class LowerCarried(Rule[tuple[Run, ...], Lowering]):
    """Carried channels as shortcuts; reads weights, in float64.

    Attributes:
        patient: leave a run alone while one around it may still be lowered.
        beside: let the shortcut end in a concat in front of ``Ln``, as ``[Ln, M] [h; R x]``, instead of in a sum: so a
            layer may end one run and begin the next.
    """

    name: ClassVar[str] = "lower_carried"
    patient: bool = True
    beside: bool = False

    def match(self, node: fx.Node) -> tuple[Run, ...] | None:
        runs = find_runs(node, self.patient) if is_layer(node) else ()
        return tuple(run for run in runs if ways_of(run)) or None

    def check(self, match: tuple[Run, ...]) -> Lowering | Refusal:
        reason = ""
        for run in match:
            found = lower_run(run, self.beside)
            if isinstance(found, Lowering):
                return found
            reason = reason or found
        return Refusal(match[0].last, reason)

    def price(self, plan: Lowering) -> Price:
        return plan.price

    def scope(self, plan: Lowering) -> tuple[fx.Node, ...]:
        return *(node for step in plan.run.steps for node in step.nodes), plan.run.last

    def rewrite(self, plan: Lowering, editor: Editor) -> fx.Node:
        last, source = plan.run.last, plan.run.steps[0].layer.all_input_nodes[0]
        branch = source
        for step in plan.run.steps:
            branch = _insert(plan.layers[step.layer], step.layer, branch, last, editor)
            for stage in step.stages:
                if stage.gate is not None:
                    branch = _multiply(plan, stage.gate, stage.node, branch, editor)
                else:
                    branch = _insert(plan.layers[stage.node], stage.node, branch, last, editor)
        if not plan.beside:
            branch = _insert(plan.layers[last], last, branch, last, editor)
        shortcut = source
        for layer in plan.shortcut:
            name = editor.fresh(last.meta.get("place", ""), "shortcut")
            shortcut = _layer(layer, shortcut, last, name, editor)
        if plan.beside:
            joined = _concat(branch, shortcut, last, editor)
            total = _insert(plan.layers[last], last, joined, last, editor)
        else:
            total = _join(operator.add, branch, shortcut, last, last, editor)
        editor.replace(last, total)
        if not plan.beside:
            total.meta["range"] = _sum_range(branch, shortcut)
        moved = {node for step in plan.run.steps for stage in step.stages for node in _moved(stage)}
        editor.erase(node for node in reversed(self.scope(plan)) if node not in moved)
        return total


def _insert(layers: tuple[Layer, ...], old: fx.Node, source: fx.Node, before: fx.Node, editor: Editor) -> fx.Node:
    """Put ``layers`` behind ``source``, in the place of ``old``, whose name the last one takes over."""
    for index, layer in enumerate(layers):
        named = index == len(layers) - 1
        name = str(old.target) if named else editor.fresh(old.meta.get("place", ""), "strided")
        source = _layer(layer, source, before, name, editor)
        if named and "origin" in old.meta:
            source.meta["origin"] = old.meta["origin"]
    return source


def _layer(layer: Layer, source: fx.Node, before: fx.Node, name: str, editor: Editor) -> fx.Node:
    if isinstance(layer, Affine):
        return editor.linear(layer, source, before, name)
    node, shape = editor.layer(layer, source, before, name), shape_of(source)
    if shape is not None and not layer.state_dict():
        node.meta["shape"] = layer(torch.empty(shape, device="meta")).shape
    return node


def _multiply(plan: Lowering, gate: Gate, product: fx.Node, source: fx.Node, editor: Editor) -> fx.Node:
    """The product with a narrower gate (or the sum), whose side path moves in front of the last layer."""
    last, (data, factor) = plan.run.last, _operands(product, gate)
    for old in gate.side:
        old.replace_input_with(data, source)
        if old not in plan.layers:
            last.prepend(old)
            _resize(old, source, gate)
            continue
        new = _insert(plan.layers[old], old, old.all_input_nodes[0], last, editor)
        factor = new if old is factor else factor
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not product)
    return _join(product.target, source, factor, product, last, editor)  # type: ignore[arg-type]


def _operands(product: fx.Node, gate: Gate) -> tuple[fx.Node, fx.Node]:
    first, second = product.all_input_nodes
    return (second, first) if first in gate.side else (first, second)


def _sum_range(first: fx.Node, second: fx.Node) -> Range:
    (low, high), (other_low, other_high) = range_of(first), range_of(second)
    return low + other_low, high + other_high


def _moved(stage: Stage) -> tuple[fx.Node, ...]:
    """The nodes of a stage that stay what they are."""
    return () if stage.gate is None else tuple(node for node in stage.gate.side if node not in stage.gate.layers)


def _resize(node: fx.Node, source: fx.Node, gate: Gate) -> None:
    """Note the channels that a layer of the side path has now."""
    shape, wide = shape_of(node), shape_of(source)
    if shape is not None and wide is not None and node in gate.wide:
        node.meta["shape"] = torch.Size([shape[0], wide[1], *shape[2:]])


def _join(
    operation: Callable[..., object], first: fx.Node, second: fx.Node, old: fx.Node, before: fx.Node, editor: Editor
) -> fx.Node:
    """``first`` and ``second`` added or multiplied."""
    with editor.gm.graph.inserting_before(before):
        node = editor.gm.graph.call_function(operation, (first, second))
    node.meta |= {"made": True, "place": old.meta.get("place", "")}
    if (shape := shape_of(first)) is not None:
        node.meta["shape"] = shape
    return node


def _concat(first: fx.Node, second: fx.Node, last: fx.Node, editor: Editor) -> fx.Node:
    """Both side by side, in front of the layer that merges them."""
    dims = map_of(last).grid.dims
    axis = 1 if dims else -1
    with editor.gm.graph.inserting_before(last):
        node = editor.gm.graph.call_function(torch.cat, ([first, second], axis))
    node.meta |= {"made": True, "place": last.meta.get("place", "")}
    shapes = [shape_of(first), shape_of(second)]
    if shapes[0] is not None and shapes[1] is not None:
        sizes = list(shapes[0])
        sizes[axis] += shapes[1][axis]
        node.meta["shape"] = torch.Size(sizes)
    return node
