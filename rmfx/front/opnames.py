"""What the operations of torch do to memory, by name: the tables that alias analysis and constant folding share.

A name stands for the function of ``torch`` or ``torch.nn.functional`` and for the method of a tensor alike. What is
in no table is unknown: its result may share memory with any of its inputs. ``tests/test_opnames.py`` runs every
entry of ``FRESH`` against torch.
"""

from __future__ import annotations

import inspect
import operator
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from rmfx.front.tracer import IN_PLACE_OPERATORS

_FRESH = """
    abs acos add addcdiv addcmul addmm all amax amin any argmax argmin asin atan avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d baddbmm batch_norm bmm cat ceil celu clamp clamp_max clamp_min clip clone concat conv1d conv2d
    conv3d conv_transpose1d conv_transpose2d conv_transpose3d cos cosh cumprod cumsum div divide elu embedding eq erf
    erfc exp expm1 flip floor floor_divide fmod ge gelu glu group_norm gt hardshrink hardsigmoid hardswish hardtanh
    index_select instance_norm interpolate layer_norm le leaky_relu lerp linear local_response_norm log log10 log1p
    log2 log_sigmoid log_softmax logical_and logical_not logical_or logsigmoid logsumexp lt masked_fill matmul
    max_pool1d max_pool2d max_pool3d maximum mean minimum mish mm mul multiply ne neg negative norm normalize one_hot
    ones_like pad pow prelu prod reciprocal relu relu6 remainder repeat roll round rrelu rsqrt rsub selu sigmoid sign
    silu sin sinh softmax softmin softplus softshrink softsign sqrt square stack std sub subtract sum tan tanh
    tanhshrink threshold _threshold topk tril triu true_divide trunc var where zeros_like full_like
    truediv floordiv mod new_zeros new_ones new_full scaled_dot_product_attention
"""
_VIEWS = """
    as_strided broadcast_to chunk contiguous detach diagonal expand expand_as flatten getitem movedim narrow permute
    pixel_shuffle pixel_unshuffle channel_shuffle reshape reshape_as select split squeeze swapaxes t to transpose
    type_as unbind unflatten unfold unsqueeze view view_as double float half bfloat16
"""
_METADATA = "size dim ndimension numel nelement stride is_floating_point is_contiguous element_size"
_METADATA_ATTRIBUTES = "shape ndim dtype device layout is_cuda requires_grad itemsize nbytes"
_DROPOUTS = """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout stochastic_depth
"""
_NO_OUT_OF_PLACE = """
    alpha_dropout_ apply_ bernoulli_ cauchy_ copy_ dropout_ exponential_ feature_alpha_dropout_ feature_dropout_ fill_
    geometric_ log_normal_ map_ normal_ random_ resize_ resize_as_ set_ uniform_ zero_
"""

# The result is new memory, whatever the arguments.
FRESH = frozenset(_FRESH.split())

# The result may be a view of an argument, or that argument itself; nothing is computed.
VIEWS = frozenset(_VIEWS.split())

# Views in which no element stands twice, unless it does in the argument.
DISTINCT = VIEWS - {"as_strided", "broadcast_to", "expand", "expand_as", "unfold"}

# Views that hand out parts which do not overlap, unless the argument does.
SPLITS = frozenset({"chunk", "split", "unbind"})

# Reads sizes and kinds, never values: the result is no tensor.
METADATA = frozenset(_METADATA.split())
METADATA_ATTRIBUTES = frozenset(_METADATA_ATTRIBUTES.split())

# Random functions that hand their input back in eval mode.
DROPOUTS = frozenset(_DROPOUTS.split())

# In-place functions and methods whose name without the underscore is missing or means something else.
NO_OUT_OF_PLACE = frozenset(_NO_OUT_OF_PLACE.split())

_TORCH_HOMES = ("torch", "_operator", "builtins", "math", "torchvision.ops.stochastic_depth")


def op_name(node: fx.Node) -> str | None:
    """The bare name of the torch operation that a function or method node calls; ``None`` for anything else.

    >>> graph = fx.Graph()
    >>> op_name(graph.call_function(torch.relu_, (graph.placeholder("x"),)))
    'relu_'
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function" or not is_torch_function(node.target):
        return None
    return getattr(node.target, "__name__", None)


def is_torch_function(function: Any) -> bool:
    """Whether ``function`` belongs to torch, its builtins or Python's operators, and not to a user."""
    home = getattr(function, "__module__", None)
    if home is None:  # methods of torch._C's classes have no home
        return type(function).__name__ in ("builtin_function_or_method", "method_descriptor")
    return home in _TORCH_HOMES or home.startswith(("torch.nn.functional", "torch._C", "torch.functional"))


def is_eval_dropout(node: fx.Node) -> bool:
    """Whether the node calls a dropout that does nothing, because it is told that it is not training."""
    if op_name(node) not in DROPOUTS:
        return False
    arguments = dict(zip(_dropout_arguments(node.target), node.args, strict=False)) | dict(node.kwargs)
    return arguments.get("training", arguments.get("train", True)) is False or _is_zero(arguments.get("p"))


def _is_zero(probability: Any) -> bool:
    return isinstance(probability, int | float) and probability == 0


def _dropout_arguments(target: Any) -> tuple[str, ...]:
    return parameters(target) or ("input", "p", "train")  # the builtins torch.dropout, ... have no signature


@cache
def parameters(function: Any) -> tuple[str, ...]:
    """Names of a Python function's parameters; empty for a builtin, which does not tell.

    >>> parameters(functional.relu)
    ('input', 'inplace')
    """
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def out_of_place(function: Any) -> Any | None:
    """The function that computes what an in-place ``function`` writes, or ``None`` where torch has none.

    >>> out_of_place(operator.iadd) is operator.add, out_of_place(torch.relu_) is torch.relu
    (True, True)
    """
    name = getattr(function, "__name__", "")
    if name in IN_PLACE_OPERATORS and getattr(operator, name) is function:
        return getattr(operator, _PLAIN_OPERATORS.get(name, name[1:]))
    if not name.endswith("_") or name.endswith("__") or name in NO_OUT_OF_PLACE:
        return None
    for namespace in (torch, functional, torch._C._nn):
        if getattr(namespace, name, None) is function and hasattr(namespace, name[:-1]):
            return getattr(namespace, name[:-1])
    return None


_PLAIN_OPERATORS = {"iand": "and_", "ior": "or_"}
