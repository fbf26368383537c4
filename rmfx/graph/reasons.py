"""Says in one sentence that a user understands why an operation cannot stand on a branch that is made plain."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch import fx, nn
from torch.utils import _pytree as pytree

from rmfx.algebra.pointwise import NORMS
from rmfx.graph.facts import is_plain, is_product, is_sum, module_of, shape_of

_CARRIED = "so what is carried beside it would change it"
_LAYERS: dict[type[nn.Module], str] = {
    nn.LayerNorm: f"normalises by the mean and variance over all features of a position, {_CARRIED}",
    nn.RMSNorm: f"divides by the size of all features of a position, {_CARRIED}",
    nn.GroupNorm: f"normalises by the mean and variance over channels and positions of each input, {_CARRIED}",
    nn.LocalResponseNorm: f"divides each channel by the size of its neighbours, {_CARRIED}",
    nn.MultiheadAttention: "is attention: it multiplies matrices computed from its input, which no linear layer does",
    nn.Softmax: f"divides by a sum over channels or positions, {_CARRIED}",
    nn.GLU: "multiplies two halves of its input: no linear layer does that",
    nn.Embedding: "looks up rows by number, which no linear layer does",
    nn.Upsample: "repeats or interpolates positions, which no convolution does",
    nn.Flatten: "moves positions into channels, which a convolution cannot carry beside it",
    **dict.fromkeys(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        "normalises by the statistics of each input, which is no fixed linear map",
    ),
    **dict.fromkeys(
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        "takes a maximum over positions, so nothing but a maximum can be carried past it",
    ),
    **dict.fromkeys(
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        "averages windows whose size depends on that of the input",
    ),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        "is a transposed convolution, which spreads positions apart; the algebra knows convolutions only",
    ),
    **dict.fromkeys(
        (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
        "pads with a value that is not zero, which no convolution does",
    ),
    nn.PixelShuffle: "moves channels into positions, which no convolution does",
}
ATTENTION = ("matmul", "bmm", "einsum", "baddbmm", "scaled_dot_product_attention", "mm")
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_NORM_FUNCTIONS = ("layer_norm", "rms_norm", "group_norm", "instance_norm")
_RESHAPING = "brings values into another order than channels and positions, which the layers of a plain network keep"
_FUNCTIONS = {
    **dict.fromkeys(("softmax", "log_softmax"), _LAYERS[nn.Softmax]),
    **dict.fromkeys(
        ATTENTION, "is attention or another product of matrices computed from the input, which no linear layer does"
    ),
    **dict.fromkeys(("layer_norm",), _LAYERS[nn.LayerNorm]),
    **dict.fromkeys(("rms_norm",), _LAYERS[nn.RMSNorm]),
    **dict.fromkeys(("group_norm",), _LAYERS[nn.GroupNorm]),
    **dict.fromkeys(
        (
            *("view", "reshape", "permute", "transpose", "flatten", "unflatten", "unsqueeze", "squeeze", "roll"),
            *("movedim", "swapaxes", "reshape_as", "view_as", "stack", "unbind", "expand", "repeat"),
        ),
        _RESHAPING,
    ),
    **dict.fromkeys(("getitem", "select", "index_select", "gather"), "picks positions or channels that are not known"),
    **dict.fromkeys(
        ("mean", "sum", "amax", "std", "var", "norm", "normalize"),
        "sums over channels or positions without a layer that says which",
    ),
    **dict.fromkeys(("interpolate", "upsample"), _LAYERS[nn.Upsample]),
    **dict.fromkeys(
        ("div", "truediv", "true_divide", "divide"), "divides by a tensor computed from the input: no linear layer does"
    ),
}


def why_not(node: fx.Node) -> str:
    """Why ``node`` cannot stand on a branch, naming it.

    >>> gm = fx.symbolic_trace(nn.Sequential(nn.LayerNorm(4)))
    >>> print(why_not(list(gm.graph.nodes)[1]))
    '_0', a LayerNorm on the branch, normalises by the mean and variance over all features of a position, so what is \
carried beside it would change it
    """
    named = _named(node)
    module = module_of(node)
    if module is not None:
        return f"{named}, a {type(module).__name__} on the branch, {_layer(module)}"
    if node.op == "placeholder":
        return f"{named} is an input of the network"
    if node.op == "get_attr":
        return f"{named} on the branch is a constant with a value of its own for every position"
    if is_plain(node):
        return f"{named} on the branch is a number read off a tensor"
    if is_sum(node) or is_product(node):
        return _joined(node, named)
    word = _word(node)
    return f"{named}, a {word} on the branch, {_FUNCTIONS.get(word, 'is an operation that rmfx does not know')}"


def decisive(nodes: Iterable[fx.Node]) -> fx.Node | None:
    """The node among those of a branch that rules out a plain form whatever else is in the way.

    That is attention or, where there is none, a norm by statistics of each input; ``None`` where there is neither.

    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.LayerNorm(4)))
    >>> decisive(gm.graph.nodes), decisive(list(gm.graph.nodes)[:2])
    (_1, None)
    """
    norm: fx.Node | None = None
    for node in nodes:
        module = module_of(node)
        word = None if module is not None else _word(node)
        if isinstance(module, nn.MultiheadAttention) or (word in ATTENTION and _multiplies_tensors(node)):
            return node
        if norm is None and (isinstance(module, _NORMS) or word in _NORM_FUNCTIONS):
            norm = node
    return norm


def _multiplies_tensors(node: fx.Node) -> bool:
    operands = pytree.tree_leaves((node.args, node.kwargs))
    return sum(isinstance(operand, fx.Node) and operand.op != "get_attr" for operand in operands) > 1


def _layer(module: nn.Module) -> str:
    if isinstance(module, NORMS) and module.running_mean is None:
        return "normalises by the statistics of each batch, which is no fixed linear map"
    reason = _LAYERS.get(type(module))
    return reason or "is neither linear nor an activation that acts on every element by itself"


def _joined(node: fx.Node, named: str) -> str:
    word = "sum" if is_sum(node) else "product"
    shapes = [shape for source in node.all_input_nodes if (shape := shape_of(source)) is not None]
    if len(set(shapes)) > 1:
        small = tuple(min(shapes, key=prod))
        return f"{named} on the branch is a {word} that broadcasts one operand of shape {small}"
    if any(source.op == "get_attr" for source in node.all_input_nodes):
        return f"{named} on the branch is a {word} with a constant that differs from position to position"
    if is_product(node):
        return f"{named} on the branch multiplies two tensors computed from the input, which is not linear in either"
    return f"{named} on the branch is a sum that stays"


def _named(node: fx.Node) -> str:
    place = node.meta.get("place", "")
    return f"{node.name!r} (in {place})" if place else f"{node.name!r}"


def _word(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
