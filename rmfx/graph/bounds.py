"""What bounds the channels of a node: intervals proven from weights, and intervals that the user knows.

Ranges (:func:`rmfx.graph.facts.range_of`) are cheap, one interval for all channels, and end at every convolution. The
bounds here read weights, so they are computed on demand only: when a carrier is to be shifted, or constant channels
are looked for. A value is bounded by its activation (ReLU6, sigmoid, clamp), by what the user gives for an input or
any other node (:func:`give_ranges`), or by the layers before it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.bounds import Bounds, activation_bounds, affine_bounds, join, product_bounds, sum_bounds
from rmfx.algebra.pointwise import EVERYTHING, is_pointwise
from rmfx.errors import InexactError, RmfxError
from rmfx.graph.facts import (
    GIVEN_RANGE,
    KEEPING_CHANNELS,
    ZERO_PADDING,
    called,
    channels_of,
    is_sum,
    module_of,
    module_range,
    range_of,
    shape_of,
)
from rmfx.graph.linear import MIXING, PER_CHANNEL, affine_of, dims_of
from rmfx.graph.spatial import AVERAGES
from rmfx.graph.walk import Place, known, on_demand
from rmfx.modules import ChannelPad, ChannelSlice

GIVEN = "given_bounds"  # node.meta: what the user knows of a value
UNKNOWN = Bounds.of(EVERYTHING)


def give_ranges(gm: fx.GraphModule, value_ranges: Mapping[str, tuple[float, float] | tuple[Tensor, Tensor]]) -> None:
    """Note what the user knows of values; call it before :func:`rmfx.graph.facts.annotate` or any bounds are asked for.

    Args:
        gm: a graph in normal form.
        value_ranges: ``{name: (low, high)}`` with the name of an input, a layer or any node (as in reports, or as
            :func:`rmfx.bounds_from_data` returns), and numbers, or tensors with one number per channel.

    Raises:
        RmfxError: when a name is no node's, an interval is none, or there is not one for each channel.
    """
    named: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        for name in {value_name(node), node.name, *([node.target] if node.op == "call_module" else [])}:
            named.setdefault(str(name), []).append(node)
    for name, (low, high) in value_ranges.items():
        if name not in named:
            raise RmfxError(f"value_ranges names {name!r}, which is no input and no node of the network")
        ends = tuple(torch.as_tensor(end, dtype=torch.float64) for end in (low, high))
        _demand_vectors(name, ends, named[name])
        bounds = Bounds.of((ends[0], ends[1]))
        if not bool((bounds.low <= bounds.high).all()):
            raise RmfxError(f"value_ranges gives {name!r} an interval whose low end is not below its high end")
        for node in named[name]:
            node.meta[GIVEN] = bounds
            node.meta[GIVEN_RANGE] = bounds.range


def _demand_vectors(name: str, ends: tuple[Tensor, ...], nodes: list[fx.Node]) -> None:
    """Raise unless both ends are numbers, or both have as many as the value has channels, where that is known."""
    shapes = [tuple(end.shape) for end in ends]
    if shapes[0] != shapes[1] or len(shapes[0]) > 1:
        raise RmfxError(
            f"value_ranges gives {name!r} ends of shapes {shapes[0]} and {shapes[1]}: give two numbers, or two "
            "one-dimensional tensors with one number per channel"
        )
    for node in nodes if shapes[0] else ():
        known = _possible_channels(node)
        if known and shapes[0][0] not in known:
            told = " or ".join(map(str, sorted(known)))
            raise RmfxError(f"value_ranges gives {name!r}, which has {told} channels, {shapes[0][0]} numbers")


def _possible_channels(node: fx.Node) -> set[int]:
    """How many channels a value may have, as those count them who make and read it; empty where nobody tells."""
    readers = [module_of(user) for user in node.users]
    counts = (getattr(module, word, None) for module in readers for word in ("in_channels", "in_features"))
    read = {count for count in counts if isinstance(count, int)}
    made = {count for dims in (0, 2) if (count := channels_of(node, dims)) is not None}
    return made & read or made or read  # a shape alone does not tell on which axis they are


def is_map(node: fx.Node) -> bool:
    """Whether bounds come from the weights of the node's map; other layers are told by their type."""
    return type(module_of(node)) in (*MIXING, *PER_CHANNEL, *AVERAGES, nn.ChannelShuffle)


def keeps_channels(module: nn.Module) -> bool:
    """Whether each output channel holds values of the same input channel, or averages over some."""
    return isinstance(module, KEEPING_CHANNELS) or (isinstance(module, nn.Upsample) and module.mode != "bicubic")


def value_name(node: fx.Node) -> str:
    """What users call a node's value: the name of an input, or what reports call the node."""
    return str(node.target) if node.op == "placeholder" else str(node.meta.get("origin", node.name))


def bounds_of(node: fx.Node, dims: int, *, fully: bool = False) -> Bounds:
    """Bounds of each channel of ``node``'s value, or of all channels together where they cannot be told apart.

    Args:
        node: of a graph in normal form, annotated.
        dims: spatial dimensions of the layers it stands among: channels are dimension 1, or the last one for 0.
        fully: walk back to the inputs even behind layers that bound their values anyway, for tighter bounds.
    """
    needs = _inputs if fully else _inputs_of_unbounded
    fact = "bounds_fully" if fully else "bounds"
    return on_demand((node, dims), fact, needs, lambda place: _bounds(place, needs(place), fact))


def _inputs_of_unbounded(place: Place) -> list[Place]:
    node, _ = place
    low, high = range_of(node)
    return [] if GIVEN not in node.meta and low > -torch.inf and high < torch.inf else _inputs(place)


def _inputs(place: Place) -> list[Place]:
    """The places that bound this one; none where an operation is unknown."""
    node, dims = place
    module = module_of(node)
    if module is not None:
        if len(node.all_input_nodes) != 1:
            return []
        own = dims_of(node) if is_map(node) else None
        return [(node, own)] if own not in (None, dims) else [(node.all_input_nodes[0], dims_before(node, dims))]
    if node.target in (operator.add, operator.mul, torch.cat) and not node.meta.get("plain_value", False):
        return [(parent, dims) for parent in node.all_input_nodes]
    return []


def dims_before(node: fx.Node, dims: int) -> int:
    """Among how many dimensions the input's channels are meant: a flattened image of one position keeps its own."""
    shape = shape_of(node.all_input_nodes[0])
    if isinstance(module_of(node), nn.Flatten) and shape is not None and len(shape) > 2:
        return len(shape) - 2
    return dims


def _bounds(place: Place, needed: list[Place], fact: str) -> Bounds:
    node, dims = place
    bounds = _derived(node, dims, [known(other, fact) for other in needed])
    low, high = range_of(node)
    if low > -torch.inf or high < torch.inf:
        bounds = bounds.within(Bounds.of((low, high)))
    return bounds if (given := node.meta.get(GIVEN)) is None else bounds.within(given)


def _derived(node: fx.Node, dims: int, inputs: list[Bounds]) -> Bounds:
    if not inputs:
        return _constant(node) if node.op == "get_attr" else UNKNOWN
    if node.op == "call_module":
        if is_map(node):
            return _linear(node, dims, inputs[0])
        return _layer(node, dims, inputs[0])
    if node.target is torch.cat:
        return _concat(node, dims, inputs)
    return _binary(node, dims, inputs)


def _constant(node: fx.Node) -> Bounds:
    owner, _, name = str(node.target).rpartition(".")
    assert node.graph.owning_module is not None
    value = getattr(node.graph.owning_module.get_submodule(owner), name, None)
    if not isinstance(value, Tensor) or value.is_meta or not value.numel() or value.is_complex():
        return UNKNOWN
    return Bounds.of((float(value.detach().min()), float(value.detach().max())))


def _linear(node: fx.Node, dims: int, x: Bounds) -> Bounds:
    if dims_of(node) not in (None, dims):
        return x.hull()  # asked for other channels than its own: x is the node's own bounds
    try:
        return affine_bounds(affine_of(node, dims), x)
    except InexactError:
        return Bounds.of(module_range(called(node), x.range))
    except RuntimeError as error:  # weights on the meta device bound nothing
        if "meta tensor" not in str(error):
            raise
        return UNKNOWN


def _layer(node: fx.Node, dims: int, x: Bounds) -> Bounds:
    module = called(node)
    if is_pointwise(module):
        return activation_bounds(module, x) if acts_on_channels(module, dims) else UNKNOWN
    if keeps_channels(module):
        return x
    if isinstance(module, ZERO_PADDING):
        return Bounds.of((x.low.clamp(max=0.0), x.high.clamp(min=0.0)), x.rms)
    if isinstance(module, nn.Flatten):
        return x if is_plain_flatten(node) and not dims else x.hull()
    if isinstance(module, (ChannelSlice, ChannelPad)):
        return _moved_channels(node, module, dims, x)
    return Bounds.of(module_range(module, x.range), x.rms.max())


def acts_on_channels(module: nn.Module, dims: int) -> bool:
    """Whether an activation treats all channels alike, or knows them by the axis that is meant among ``dims``."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters == 1 or dims > 0
    return getattr(module, "axis", None) in (None, 1 if dims else -1)


def is_plain_flatten(node: fx.Node) -> bool:
    """Whether the node flattens an image of one position: its features are its channels."""
    module, shape = module_of(node), shape_of(node.all_input_nodes[0]) if node.all_input_nodes else None
    if not isinstance(module, nn.Flatten) or shape is None or module.start_dim != 1:
        return False
    return module.end_dim in (-1, len(shape) - 1) and all(size == 1 for size in shape[2:])


def _moved_channels(node: fx.Node, module: ChannelSlice | ChannelPad, dims: int, x: Bounds) -> Bounds:
    if module.axis != (1 if dims else -1):
        return x.hull() if isinstance(module, ChannelSlice) else x.hull().within(UNKNOWN)
    if isinstance(module, ChannelPad):
        channels = channels_of(node.all_input_nodes[0], dims)
        zero = Bounds.of((0.0, 0.0))
        if channels is None:
            return Bounds.of((x.low.min().clamp(max=0.0), x.high.max().clamp(min=0.0)), x.rms.max())
        return join([(zero, module.before), (x, channels), (zero, module.after)])
    if not x.low.dim():
        return x
    part = slice(module.start, module.start + module.length)
    return Bounds(x.low[part], x.high[part], x.rms[part])


def _concat(node: fx.Node, dims: int, inputs: list[Bounds]) -> Bounds:
    widths = [channels_of(parent, dims) for parent in node.all_input_nodes]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    parents = node.args[0]
    repeated = not isinstance(parents, (list, tuple)) or len(parents) != len(inputs)
    if axis == 1 and dims and not repeated and None not in widths:
        return join([(bounds, width or 0) for bounds, width in zip(inputs, widths, strict=True)])
    return join([(bounds.hull(), 1) for bounds in inputs]).hull()


def _binary(node: fx.Node, dims: int, inputs: list[Bounds]) -> Bounds:
    combine = sum_bounds if is_sum(node) else product_bounds
    found = dict(zip(node.all_input_nodes, inputs, strict=True))
    operands: list[Bounds] = []
    for arg in node.args:
        if isinstance(arg, fx.Node):
            operands.append(found[arg])
        elif isinstance(arg, (int, float)):
            operands.append(Bounds.of((float(arg), float(arg))))
        else:
            return UNKNOWN
    first, second = operands
    shapes = [shape_of(parent) for parent in node.all_input_nodes]
    alike = None not in shapes and len({(len(s), s[1:2] if dims else s[-1:]) for s in shapes if s is not None}) == 1
    return combine(first, second) if alike else combine(first.hull(), second.hull())
