"""What the two passes that remove joins share: the plan of a rewrite, and carrying it out."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import fx

from rmfx.algebra.affine import Affine
from rmfx.graph.cost import cost_of
from rmfx.graph.facts import is_dropout, is_plain, shape_of
from rmfx.graph.linear import is_linear, size_dependent
from rmfx.graph.region import Region
from rmfx.graph.rule import Price
from rmfx.layout.gating import emit_gate
from rmfx.layout.problem import NewGate, Solution
from rmfx.layout.sizes import Handed, hand_over, put_in_order

if TYPE_CHECKING:
    from rmfx.graph.editor import Editor


TAPS = "carried_taps"  # node.meta: weight indices of Dirac taps, by the origin of the sum they were put there for


@dataclass(frozen=True, eq=False)
class JoinPlan:
    """A join that can be removed: its region, the layers that replace it, and what they cost.

    Attributes:
        kind: of the region (:attr:`rmfx.graph.region.Region.kind`).
        counted: whether MACs are per sample (else per fork position, sizes being unknown).
        conditions: input sizes for which alone the rewrite is exact.
        dropouts: names of dropout layers that disappear.
        covers: (place, origin) of every residual sum that goes, the join itself among them where it is one.
        sizes: where sizes of tensors that go are read instead.
    """

    region: Region
    solution: Solution
    price: Price
    kind: str
    counted: bool
    conditions: tuple[str, ...]
    dropouts: tuple[str, ...]
    covers: tuple[tuple[str, str], ...]
    sizes: tuple[Handed, ...] = ()

    @property
    def carrier(self) -> str | None:
        """The carriers used, joined by ``+``; ``None`` where nothing passes a nonlinearity."""
        return "+".join(sorted(self.solution.carriers)) or None

    @property
    def scope(self) -> tuple[fx.Node, ...]:
        """All nodes between fork and join, and the join."""
        side = (node for gate in self.region.gates for node in gate.side)
        return (*sorted({*self.region.nodes, *side}), self.region.join)


def join_plan(region: Region, solution: Solution, dims: int) -> JoinPlan:
    """The plan of replacing ``region`` by ``solution``, with its price.

    Raises:
        InexactError: when something reads sizes inside the region that are gone then.
    """
    shape = shape_of(region.fork)
    conditions: tuple[str, ...] = ()
    sized = solution.sized or any(size_dependent(node) for node in region.nodes if is_linear(node))
    if sized and shape is not None:
        conditions = (f"exact for the example inputs' sizes only, where {region.fork.name} has {tuple(shape[2:])}",)
    price = _price(region, solution, dims)
    dropouts = tuple(str(node.target) for node in region.nodes if is_dropout(node))
    covers = tuple((node.meta.get("place", ""), node.meta.get("origin", node.name)) for node in region.sums)
    sizes = hand_over(region, solution.layers, dims)
    return JoinPlan(region, solution, price, region.kind, shape is not None, conditions, dropouts, covers, sizes)


def check_dims(region: Region) -> str | None:
    """Why the layers of a region say nothing of how to lay it out, or ``None`` where they do."""
    shape, dims = shape_of(region.fork), region.dims
    if dims is None:
        return "no convolution, linear or norm layer stands between the fork and the sum"
    if dims and shape is not None and len(shape) != dims + 2:
        return f"the layers take batched inputs of {dims + 2} dimensions, the example input gives {len(shape)}"
    return None


def _price(region: Region, solution: Solution, dims: int) -> Price:
    """The region's cost before and after."""
    macs, parameters = cost_of(region.nodes, dims)
    shape = shape_of(region.fork)
    rows = prod(shape[1:-1]) if shape is not None and not dims else 1  # a linear layer acts on every row
    after = 0
    for layer in solution.layers:
        if not isinstance(layer, NewGate):
            module = layer.map
            after += module.parameters if isinstance(module, Affine) else sum(p.numel() for p in module.parameters())
    return Price(macs, solution.macs * rows, parameters, after)


def carry_out(plan: JoinPlan, editor: Editor) -> fx.Node:
    """Insert the plan's layers before the join, hand its readers over, erase what they replace."""
    region = plan.region
    node = region.fork
    new: list[fx.Node] = []
    behind = {layer.key: layer.behind for layer in plan.solution.layers if isinstance(layer, NewGate)}
    gates = {gate.node: gate.through(behind[gate.node]) for gate in region.gates}
    stays = {node for gate in gates.values() for node in gate.side}
    place = region.join.meta.get("place", "")
    for layer in plan.solution.layers:
        if isinstance(layer, NewGate):
            assert isinstance(layer.key, fx.Node)
            assert region.dims is not None
            node = emit_gate(gates[layer.key], layer, node, region.join, region.dims, editor)
        elif isinstance(layer.map, Affine):
            node = editor.linear(layer.map, node, region.join, layer.name or editor.fresh(place, "carry"))
        else:
            node = editor.layer(layer.map, node, region.join, layer.name or editor.fresh(place, "carry"))
        new.append(node)
    for index, tap in plan.solution.carried:
        new[index].meta.setdefault(TAPS, {}).setdefault(region.join.meta.get("origin"), []).append(tap)
    for handed in plan.sizes:
        handed.reader.replace_input_with(handed.source, new[handed.layer] if handed.layer >= 0 else region.fork)
    editor.replace(region.join, node)
    editor.erase([region.join, *(old for old in reversed(region.nodes) if old not in stays)])
    if any(is_plain(reader) for source in (*new, *stays) for reader in source.users):
        put_in_order(editor.gm.graph)  # sizes may be read before the join, where the new layers stand
    return node
