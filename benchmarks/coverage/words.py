"""What one node of a normal form does, in one word: the vocabulary in which residual sums are classified.

This is a reading of its own, apart from what the passes know, so that the table does not shrink with the library.
"""

from __future__ import annotations

import operator
from enum import Enum
from typing import Any

from torch import Tensor, fx, nn

from rmfx.front.opnames import op_name


class Word(Enum):
    """What a node does to a tensor."""

    MIX = "conv"  # a convolution or matrix product with constant weights
    SCALE = "scale"  # a scale and shift by constants
    BATCH_NORM = "bn"
    AVERAGE = "avg"
    MAX_POOL = "maxpool"
    MOVE = "move"  # reshapes, transposes, padding, upsampling: linear, and no values are mixed by weights
    SPLIT = "split"  # takes some channels, or joins channels
    SUM = "sum"
    RELU = "relu"  # ReLU and ReLU6
    ACTIVATION = "act"
    NORM = "norm"  # statistics of the sample itself: LayerNorm, GroupNorm, RMSNorm
    PRODUCT = "gate"  # of two tensors that both depend on the input
    ATTENTION = "attention"
    OTHER = "other"


LINEAR = frozenset({Word.MIX, Word.SCALE, Word.BATCH_NORM, Word.AVERAGE, Word.MOVE, Word.SPLIT})

_LAYERS: tuple[tuple[type | tuple[type, ...], Word], ...] = (
    ((nn.modules.conv._ConvNd, nn.Linear), Word.MIX),
    ((nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.RMSNorm, nn.LocalResponseNorm), Word.NORM),
    (nn.modules.batchnorm._NormBase, Word.BATCH_NORM),
    (nn.MultiheadAttention, Word.ATTENTION),
    ((nn.ReLU, nn.ReLU6), Word.RELU),
)
_LAYER_NAMES = {
    "AvgPool": Word.AVERAGE,
    "MaxPool": Word.MAX_POOL,
    "ChannelSlice": Word.SPLIT,
    "ChannelPad": Word.MOVE,
    "ChannelAffine": Word.SCALE,
    "SizeGuard": Word.MOVE,
    "Identity": Word.MOVE,
    "Dropout": Word.MOVE,
}
_MOVING_FILES = ("padding", "flatten", "pixelshuffle", "upsampling", "channelshuffle", "fold")
_NAMES = {
    Word.MIX: "conv1d conv2d conv3d conv_transpose2d linear addmm",
    Word.BATCH_NORM: "batch_norm",
    Word.AVERAGE: "mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d",
    Word.MAX_POOL: "max_pool1d max_pool2d max_pool3d adaptive_max_pool2d amax max_pool2d_with_indices",
    Word.MOVE: """reshape view permute transpose flatten unflatten squeeze unsqueeze contiguous interpolate pad roll
        expand expand_as clone detach to t movedim flip repeat repeat_interleave pixel_shuffle type_as float double half
        unfold fold constant_pad_nd upsample_bilinear2d upsample_nearest2d reshape_as view_as broadcast_to alias
        swapaxes channel_shuffle slice_scatter""",
    Word.SPLIT: """cat concat chunk split narrow select unbind stack split_with_sizes slice tensor_split
        index_select sum""",
    Word.RELU: "relu relu6",
    Word.NORM: """layer_norm group_norm rms_norm instance_norm native_layer_norm native_group_norm rsqrt var
        std normalize var_mean std_mean""",
    Word.ATTENTION: "scaled_dot_product_attention matmul bmm einsum baddbmm __matmul__ mm",
    Word.ACTIVATION: """softmax log_softmax _safe_softmax gelu
        silu sigmoid tanh hardswish hardsigmoid leaky_relu elu selu
        celu mish softplus prelu clamp hardtanh exp abs pow sqrt square clamp_min""",
}
_WORD_OF = {name: word for word, names in _NAMES.items() for name in names.split()}
_PRODUCTS = ("mul", "multiply", "truediv", "div", "divide", "true_divide", "neg", "negative")
_SUMS = ("add", "sub", "subtract", "rsub")


def word_of(node: fx.Node, dynamic: frozenset[fx.Node] | set[fx.Node]) -> Word:
    """The word for ``node``; ``dynamic`` are the nodes whose values depend on the network's input."""
    if node.op == "call_module":
        return _layer(node)
    name = op_name(node)
    if name is None:  # a function of the model's own, kept whole by torch.fx.wrap
        return Word.ATTENTION if "attention" in getattr(node.target, "__name__", "") else Word.OTHER
    if name == "getitem":
        return _item(node)
    read = sum(parent in dynamic for parent in node.all_input_nodes)
    if name == "addcmul":
        return Word.SCALE if read == 1 else Word.OTHER
    if name in _PRODUCTS:
        return Word.PRODUCT if read > 1 else Word.SCALE
    if name in _SUMS:
        return Word.SUM if read > 1 else Word.SCALE
    word = _WORD_OF.get(name, Word.OTHER)
    if word is Word.MIX and read > 1:
        return Word.OTHER  # its weights depend on the input
    if word is Word.MIX and _is_averaging(_constant(node, 1)):
        return Word.AVERAGE
    return Word.MIX if word is Word.ATTENTION and read == 1 else word


def _item(node: fx.Node) -> Word:
    """Indexing: of a tuple, or with sizes only kept whole, nothing happens; else part of the tensor is taken."""
    source, key = node.args
    if isinstance(source, fx.Node) and op_name(source) in ("chunk", "split", "unbind", "tensor_split"):
        return Word.SPLIT
    if isinstance(key, int):
        return Word.MOVE
    keys = key if isinstance(key, tuple) else (key,)
    whole = all(part in (None, Ellipsis, slice(None)) for part in keys)
    return Word.MOVE if whole else Word.SPLIT


def _module(node: fx.Node) -> Any:
    """The layer that ``node`` calls, if it calls one."""
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if node.op == "call_module" and owner is not None else None


def _constant(node: fx.Node, position: int) -> Tensor | None:
    """The tensor of the network that stands at ``position`` among the arguments of ``node``, if one does."""
    source = node.args[position] if len(node.args) > position else None
    if not isinstance(source, fx.Node) or source.op != "get_attr" or source.graph.owning_module is None:
        return None
    value: Any = source.graph.owning_module
    for part in str(source.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, Tensor) else None


def _is_averaging(weight: Tensor | None) -> bool:
    """Whether a depthwise kernel is a blur: all channels alike, nothing negative, of sum 1."""
    if weight is None or weight.is_meta or weight.dim() != 4 or weight.shape[1] != 1 or weight[0].numel() == 1:
        return False
    first = weight[0].detach()
    alike = bool((first >= 0).all()) and abs(float(first.sum()) - 1) < 1e-6
    return alike and bool((weight.detach() == first).all())


def _layer(node: fx.Node) -> Word:
    module = _module(node)
    if isinstance(module, nn.Conv2d) and _is_averaging(module.weight):
        return Word.AVERAGE
    for types, word in _LAYERS:
        if isinstance(module, types):
            return word
    name, home = type(module).__name__, type(module).__module__
    for part, word in _LAYER_NAMES.items():
        if part in name:
            return word
    if home.rpartition(".")[2] in _MOVING_FILES:
        return Word.MOVE
    return Word.ACTIVATION if home.endswith(("activation", "rmfx.modules")) else Word.OTHER


def is_softmax(node: fx.Node) -> bool:
    """Whether the node makes attention weights of logits."""
    return isinstance(_module(node), nn.Softmax) or op_name(node) in ("softmax", "_safe_softmax")


def is_difference(node: fx.Node) -> bool:
    """Whether a sum was written as ``x - y``: a term is multiplied with -1."""
    for term in node.all_input_nodes:
        module = _module(term)
        scalar = type(module).__name__ == "ChannelAffine" and module.weight.dim() == 0 and not module.weight.is_meta
        if scalar and module.bias is None and float(module.weight) == -1:
            return True
    return False


def splits_channels(node: fx.Node) -> bool:
    """Whether the node takes a part of the channels of images, as far as that is written there."""
    shape = node.all_input_nodes[0].meta.get("shape") if node.all_input_nodes else None
    if shape is not None and len(shape) != 4:
        return False  # dimension 1 holds tokens
    if type(_module(node)).__name__ == "ChannelSlice":
        return bool(_module(node).axis == 1)
    dims = [*node.args[2:], node.kwargs.get("dim")]
    return op_name(node) in ("chunk", "split", "split_with_sizes", "tensor_split") and 1 in dims


def makes_weights(node: fx.Node) -> bool:
    """Whether the node maps values to weights between 0 and 1, as the last step of a gate does."""
    if type(_module(node)).__name__ in ("Sigmoid", "Hardsigmoid", "Softmax", "Hardtanh"):
        return True
    return op_name(node) in ("sigmoid", "hardsigmoid", "softmax", "clamp", "hardtanh", "relu6")


def is_dense(node: fx.Node) -> bool:
    """Whether the node calls a linear layer, as MLPs on tokens do."""
    return isinstance(_module(node), nn.Linear) or op_name(node) in ("linear", "addmm")


def spelled(node: fx.Node, word: Word) -> str:
    """The word as it is shown: with the operation's own name where there is no word for it."""
    return (
        word.value if word is not Word.OTHER else f"?{op_name(node) or getattr(node.target, '__name__', node.target)}"
    )


def is_sum(node: fx.Node) -> bool:
    """Whether the node adds two values of the graph, in normal form."""
    return node.op == "call_function" and node.target is operator.add and not node.meta.get("plain_value", False)
