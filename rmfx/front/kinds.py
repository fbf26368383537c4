"""What the graph alone tells of each value before any input is known: tensor or number, rank, floats, channels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from rmfx.front.aliasing import is_plain_value
from rmfx.front.opnames import op_name

_BY_DIMS: dict[int, tuple[type[nn.Module], ...]] = {
    dims: tuple(
        getattr(nn, f"{stem}{dims}d")
        for stem in (
            "Conv",
            "ConvTranspose",
            "MaxPool",
            "AvgPool",
            "AdaptiveAvgPool",
            "AdaptiveMaxPool",
            "InstanceNorm",
            *(() if dims == 1 else ("BatchNorm",)),
        )
    )
    for dims in (1, 2, 3)
}
_DIMS = {layer: dims for dims, layers in _BY_DIMS.items() for layer in layers}
_WEIGHTED = (
    *_BY_DIMS[1][:2],
    *_BY_DIMS[2][:2],
    *_BY_DIMS[3][:2],
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)
_RESHAPING = (
    nn.Flatten,
    nn.Unflatten,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Fold,
    nn.Unfold,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)

_KEEPING_FILES = "activation batchnorm dropout instancenorm linear normalization padding pooling upsampling"
_KEEPING_NAMES = """
    relu relu6 hardtanh clamp clip clamp_min clamp_max leaky_relu prelu elu selu celu gelu silu mish hardswish
    hardsigmoid sigmoid tanh softplus softsign tanhshrink hardshrink softshrink logsigmoid log_sigmoid threshold
    _threshold abs neg negative positive pos contiguous clone detach dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_alpha_dropout batch_norm group_norm softmax log_softmax interpolate exp sqrt square
"""
_RANK_KEEPING_NAMES = "permute transpose swapaxes movedim layer_norm cat concat roll flip"
_BINARY_NAMES = "add sub subtract rsub mul multiply div divide truediv true_divide maximum minimum pow"

# Files of torch.nn whose layers keep rank and channels, but for what _layer_kind names.
_KEEPING_HOMES = frozenset({"rmfx.modules"} | {f"torch.nn.modules.{file}" for file in _KEEPING_FILES.split()})
# Functions of one tensor that keep its rank, channels and dtype.
_KEEPING = frozenset(_KEEPING_NAMES.split())
# Functions that keep the rank and the floats, and move channels or add some.
_RANK_KEEPING = frozenset(_RANK_KEEPING_NAMES.split())
_BINARY = frozenset(_BINARY_NAMES.split())


@dataclass(frozen=True)
class Kind:
    """What is surely known of one value.

    Attributes:
        tensor: false when it is surely no tensor.
        rank: number of dimensions, where known.
        floating: true when it surely holds real floats.
        channels: size of dimension 1, where known.
    """

    tensor: bool = True
    rank: int | None = None
    floating: bool = False
    channels: int | None = None


_ANY = Kind()
Kinds = dict[fx.Node, Kind]


def infer_kinds(gm: fx.GraphModule) -> Kinds:
    """The kind of every node, from the layers that make it and from those that read it.

    >>> gm = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3)))
    >>> [kind.rank for kind in infer_kinds(gm).values()]
    [4, 4, 4, None]
    """
    modules = {node: gm.get_submodule(str(node.target)) for node in gm.graph.nodes if node.op == "call_module"}
    return _forward(gm, modules, _backward(gm, modules))


def _forward(gm: fx.GraphModule, modules: dict[fx.Node, nn.Module], wanted: Kinds) -> Kinds:
    kinds: Kinds = {}
    tensors: set[fx.Node] = set()
    for node in gm.graph.nodes:
        kind = _kind(gm, node, modules, kinds, tensors)
        hint = wanted.get(node, _ANY)
        if kind.tensor:
            tensors.add(node)
            rank = hint.rank if kind.rank is None else kind.rank
            kind = replace(kind, rank=rank, floating=kind.floating or hint.floating)
        kinds[node] = kind
    return kinds


def _kind(
    gm: fx.GraphModule, node: fx.Node, modules: dict[fx.Node, nn.Module], kinds: Kinds, tensors: set[fx.Node]
) -> Kind:
    if node.op == "get_attr":
        return _constant_kind(gm, str(node.target))
    if node.op == "call_module":
        sources = node.all_input_nodes
        return _layer_kind(modules[node], kinds[sources[0]] if sources else _ANY)
    if is_plain_value(node, tensors):
        return Kind(tensor=False)
    name = op_name(node)
    read = [kinds[source] for source in node.all_input_nodes if kinds[source].tensor]
    if name in _KEEPING and read:
        return read[0]
    if name in _RANK_KEEPING and read:
        return Kind(True, next((kind.rank for kind in read if kind.rank), None), any(kind.floating for kind in read))
    if name in _BINARY and read:
        ranks = [kind.rank for kind in read]
        rank = None if None in ranks else max(rank for rank in ranks if rank is not None)
        channels = {kind.channels for kind in read if kind.rank == rank and kind.channels}
        agreed = channels.pop() if len(channels) == 1 and rank is not None else None
        floats = any(kind.floating for kind in read) or any(isinstance(arg, float) for arg in node.args)
        return Kind(True, rank, floats, agreed)
    return _ANY


def _constant_kind(gm: fx.GraphModule, target: str) -> Kind:
    value: object = gm
    for part in target.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        return _ANY
    return Kind(True, value.dim(), value.is_floating_point(), value.shape[1] if value.dim() > 1 else None)


def _layer_kind(module: nn.Module, source: Kind) -> Kind:
    dims = _DIMS.get(type(module))
    rank = source.rank if dims is None else dims + 2
    if isinstance(module, _WEIGHTED):
        width = getattr(module, "out_channels", None) or getattr(module, "num_features", None)
        if isinstance(module, nn.Linear):
            width = module.out_features if rank == 2 else None
        return Kind(True, rank, True, width)
    if isinstance(module, _RESHAPING):
        flat = isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
        return Kind(True, 2 if flat else None, source.floating)
    if type(module).__module__ not in _KEEPING_HOMES or isinstance(module, nn.MultiheadAttention):
        return _ANY
    if getattr(module, "return_indices", False):
        return _ANY  # a tuple
    padding = getattr(module, "padding", None)
    pads_more = isinstance(padding, tuple) and len(padding) > 2 * ((rank or 2) - 2)
    changes = isinstance(module, nn.GLU) or (type(module).__module__.endswith("padding") and pads_more)
    return replace(source, rank=rank, channels=None if changes else source.channels)


def _backward(gm: fx.GraphModule, modules: dict[fx.Node, nn.Module]) -> Kinds:
    """What readers demand of the values they read: a Conv2d reads floats of rank 4."""
    wanted: Kinds = {}
    for node in reversed(gm.graph.nodes):
        sources = node.all_input_nodes
        if not sources or not (node.op == "call_module" or op_name(node) in _KEEPING):
            continue
        module = modules.get(node)
        if isinstance(module, _RESHAPING):
            continue
        dims = _DIMS.get(type(module)) if module is not None else None
        rank = wanted.get(node, _ANY).rank if dims is None else dims + 2
        floating = isinstance(module, _WEIGHTED)
        before = wanted.get(sources[0], _ANY)
        wanted[sources[0]] = Kind(True, before.rank or rank, before.floating or floating)
    return wanted


def parameter_dtype(gm: fx.GraphModule) -> torch.dtype:
    """The float type that constants of the network are kept in: its widest parameter's, at least float32."""
    dtypes = {parameter.dtype for parameter in gm.parameters()} or {torch.float64}
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest
