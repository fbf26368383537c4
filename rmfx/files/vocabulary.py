"""The closed lists of functions, methods and attributes that a saved graph may name.

Everything here computes with tensors, numbers and shapes and does nothing else (``iadd`` writes into a tensor of the
network itself). A file that names anything else is refused, so
loading a file can never reach a function with side effects. To admit one more, add its name to a line below.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

_OPERATOR = """
    add sub mul truediv floordiv mod pow matmul neg pos abs invert and_ or_ xor not_ eq ne lt le gt ge getitem iadd
"""

_MATH = "ceil floor sqrt prod"

_TORCH = """
    abs acos addcdiv addcmul addmm all amax amin any arange argmax argmin asin atan baddbmm bitwise_and bitwise_not
    bitwise_or bmm broadcast_to cat ceil chunk clamp clamp_max clamp_min clip clone concat conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d cos cumsum diff div einsum eq erf exp expm1 eye flatten flip
    floor floor_divide fmod full full_like gather ge gt index_select isfinite isinf isnan le lerp linspace log log10
    log1p log2 log_softmax logical_and logical_not logical_or logical_xor logsumexp lt masked_fill matmul max maximum
    mean meshgrid min minimum mm movedim mul multiply narrow ne neg norm numel ones ones_like outer permute
    pixel_shuffle pixel_unshuffle pow prelu prod reciprocal relu repeat_interleave reshape roll round rsqrt rsub
    select selu sigmoid sign sin softmax split sqrt square squeeze stack std sub subtract sum swapaxes tan tanh
    tensordot tile topk transpose tril triu true_divide trunc unbind unflatten unsqueeze var where zeros zeros_like
    _assert
"""

_FUNCTIONAL = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear celu dropout dropout1d dropout2d
    dropout3d elu embedding fold gelu glu grid_sample affine_grid group_norm hardshrink hardsigmoid hardswish hardtanh
    instance_norm interpolate layer_norm leaky_relu linear local_response_norm logsigmoid lp_pool1d lp_pool2d
    max_pool1d max_pool2d max_pool3d mish normalize one_hot pad prelu relu relu6 rms_norm rrelu
    scaled_dot_product_attention selu sigmoid silu softmax softmin softplus softshrink softsign tanh tanhshrink
    threshold unfold upsample
"""

_METHODS = """
    abs add all amax amin any argmax argmin bmm bool ceil chunk clamp clamp_max clamp_min clone contiguous cos cumsum
    detach dim div double eq exp expand expand_as flatten flip float floor ge gt half index_select int item le log
    log_softmax long lt masked_fill matmul max maximum mean min minimum mm movedim mul narrow ne neg new_ones
    new_zeros norm numel permute pow prod reciprocal relu repeat repeat_interleave reshape reshape_as roll round rsqrt
    select sigmoid sin size softmax split sqrt square squeeze stride std sub sum swapaxes t tanh tile to topk
    transpose type_as unbind unflatten unfold unsqueeze var view view_as where
"""


def _named(namespace: ModuleType, prefix: str, names: str) -> dict[str, Callable[..., Any]]:
    # A name that this version of torch lacks cannot stand in a graph that this version built.
    return {f"{prefix}.{name}": getattr(namespace, name) for name in names.split() if hasattr(namespace, name)}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **_named(operator, "operator", _OPERATOR),
    **_named(math, "math", _MATH),
    **_named(torch, "torch", _TORCH),
    **_named(functional, "torch.nn.functional", _FUNCTIONAL),
    "getattr": getattr,  # only with a name from ATTRIBUTES, see graph_json
}
FUNCTION_NAMES: dict[Callable[..., Any], str] = {function: name for name, function in FUNCTIONS.items()}
METHODS: frozenset[str] = frozenset(_METHODS.split())
ATTRIBUTES: frozenset[str] = frozenset({"shape", "ndim", "dtype", "device", "T", "mT"})
