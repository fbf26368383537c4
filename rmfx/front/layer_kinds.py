"""The kind of what a layer gives, and what a layer demands of the value that it reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx, nn

from rmfx.front.kinds import ANY, Kind, Kinds, Sizes, flattened
from rmfx.front.opnames import op_name
from rmfx.modules import ChannelPad, ChannelSlice

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
_ADAPTIVE = tuple(layer for layers in _BY_DIMS.values() for layer in layers[4:6])
_CONVS = tuple(layer for layers in _BY_DIMS.values() for layer in layers[:2])
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_WEIGHTED = (*_CONVS, nn.Linear, *_NORMS)
RESHAPING = (
    nn.Flatten,
    nn.Unflatten,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Fold,
    nn.Unfold,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)
# Files of torch.nn whose layers keep rank and channels, but for what layer_kind names; the first keep all sizes.
_ELEMENTWISE_FILES = "activation batchnorm dropout instancenorm normalization"
_KEEPING_FILES = f"{_ELEMENTWISE_FILES} linear padding pooling upsampling channelshuffle"
_ELEMENTWISE_HOMES = frozenset({"rmfx.modules", *(f"torch.nn.modules.{file}" for file in _ELEMENTWISE_FILES.split())})
_KEEPING_HOMES = frozenset({"rmfx.modules", *(f"torch.nn.modules.{file}" for file in _KEEPING_FILES.split())})


def layer_kind(module: nn.Module, source: Kind) -> Kind:
    """The kind of what ``module`` gives for a value of kind ``source``."""
    dims = _DIMS.get(type(module))
    rank = source.rank if dims is None else dims + 2
    if source.rank not in (None, rank):
        return Kind(True, source.rank, source.floating)  # an image without a batch
    source = replace(source, tensor=True, rank=rank, value=None)
    if isinstance(module, _WEIGHTED):
        return _weighted_kind(module, source)
    if isinstance(module, RESHAPING):
        return _reshaped_kind(module, source)
    home = type(module).__module__
    if home not in _KEEPING_HOMES or isinstance(module, nn.MultiheadAttention):
        return ANY
    if getattr(module, "return_indices", False):
        return ANY  # a tuple
    if rank is None:
        return Kind(True, None, source.floating)
    return _moved_channels(module, source) or _resized_kind(module, source, rank)


def _moved_channels(module: nn.Module, source: Kind) -> Kind | None:
    """The kind after a layer that has fewer or more channels than it reads."""
    if isinstance(module, ChannelSlice):
        return source.with_size(module.axis, module.length)
    if isinstance(module, ChannelPad):
        size = source.sizes[module.axis]
        return source.with_size(module.axis, None if size is None else size + module.before + module.after)
    if isinstance(module, nn.GLU):
        size = source.sizes[module.dim]
        return source.with_size(module.dim, None if size is None else size // 2)
    return None


def _resized_kind(module: nn.Module, source: Kind, rank: int) -> Kind:
    home = type(module).__module__
    if home in _ELEMENTWISE_HOMES or home.endswith("channelshuffle"):
        return source
    padding = getattr(module, "padding", None)
    if rank < 3 or (home.endswith("padding") and isinstance(padding, tuple) and len(padding) > 2 * (rank - 2)):
        return Kind(True, rank, source.floating)
    sizes: Sizes = (None,) * (rank - 2)
    if isinstance(module, _ADAPTIVE):
        given: Any = module.output_size
        sizes = (given,) * (rank - 2) if isinstance(given, int | None) else tuple(given)
    return replace(source, sizes=(*source.sizes[:2], *sizes))


def _weighted_kind(module: nn.Module, source: Kind) -> Kind:
    source = replace(source, floating=True)
    if source.rank is None:
        return source
    if isinstance(module, nn.Linear):
        return source.with_size(-1, module.out_features)
    if isinstance(module, _NORMS):
        return source.with_size(1, int(module.num_features))
    return Kind(True, source.rank, True, (source.sizes[0], int(module.out_channels), *(None,) * (source.rank - 2)))  # type: ignore[arg-type]


def _reshaped_kind(module: nn.Module, source: Kind) -> Kind:
    if isinstance(module, nn.Flatten):
        if (module.start_dim, module.end_dim) == (1, -1) and source.rank is None:
            return Kind(True, 2, source.floating)
        return flattened(source, module.start_dim, module.end_dim)
    if isinstance(module, nn.PixelShuffle | nn.PixelUnshuffle) and source.channels and source.rank:
        unshuffle = isinstance(module, nn.PixelUnshuffle)
        factor = (module.downscale_factor if unshuffle else module.upscale_factor) ** 2  # type: ignore[operator]
        channels = int(source.channels * factor if unshuffle else source.channels // factor)
        return Kind(True, source.rank, source.floating, (source.sizes[0], channels, *(None,) * (source.rank - 2)))
    return Kind(True, None, source.floating)


def demands(gm: fx.GraphModule) -> Kinds:
    """What readers demand of the values they read: a Conv2d reads floats of rank 4 and as many channels as it has."""
    wanted: Kinds = {}
    for node in reversed(gm.graph.nodes):
        sources = node.all_input_nodes
        if not sources or not (node.op == "call_module" or op_name(node) in KEEPING):
            continue
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, RESHAPING):
            continue
        dims = _DIMS.get(type(module)) if module is not None else None
        rank = wanted.get(node, ANY).rank if dims is None else dims + 2
        before = wanted.get(sources[0], ANY)
        demand = Kind(True, before.rank or rank, before.floating or isinstance(module, _WEIGHTED), before.sizes)
        above = wanted.get(node, ANY).channels
        if demand.rank and demand.rank > 2 and above and demand.channels is None and _keeps_channels(module):
            demand = demand.with_size(1, above)
        channels = getattr(module, "in_channels", None) or getattr(module, "num_features", None)
        if demand.rank and demand.rank > 2 and isinstance(channels, int) and isinstance(module, _WEIGHTED):
            demand = demand.with_size(1, channels)
        wanted[sources[0]] = demand
    return wanted


_KEEPING_NAMES = """
    relu relu6 hardtanh clamp clip clamp_min clamp_max leaky_relu prelu elu selu celu gelu silu mish hardswish
    hardsigmoid sigmoid tanh softplus softsign tanhshrink hardshrink softshrink logsigmoid log_sigmoid threshold
    _threshold abs neg negative positive pos contiguous clone detach dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_alpha_dropout batch_norm group_norm layer_norm softmax log_softmax exp sqrt square roll flip normalize
"""
# Functions of one tensor that keep its sizes and dtype.
KEEPING = frozenset(_KEEPING_NAMES.split())


def _keeps_channels(module: nn.Module | None) -> bool:
    """Whether a layer, or a function of :data:`KEEPING` where there is none, has the channels that it reads."""
    home = type(module).__module__
    keeps = home in _ELEMENTWISE_HOMES or home.endswith(("pooling", "upsampling", "channelshuffle"))
    return module is None or (keeps and not isinstance(module, _MOVING))


_MOVING = (nn.GLU, nn.MultiheadAttention, ChannelSlice, ChannelPad)
