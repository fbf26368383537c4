"""How operators of ATen are spelled that no function of ``torch`` has the arguments of.

Each entry gets a :class:`Speller`, which makes nodes and knows values, and the operator's arguments by name (its input
is ``x``). It gives the node that stands for the operator; a tuple for one with several results; or ``None`` where the
call is not what the entry spells, and is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.nn import functional as F

_END = 2**62  # larger sizes stand for "to the end"


class Speller(Protocol):
    """What an entry of the table works with.

    Attributes:
        node: the call that is being spelled, in the old graph.
    """

    node: fx.Node

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of ``function`` in the place of the node that is being spelled."""

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a tensor's method."""

    def value(self, node: Any) -> Any:
        """What is known of a node's value: a fake tensor, a size, or ``None``."""


Entry = Callable[[Speller, Any], Any]


# -- views and reads --------------------------------------------------------------------------------------------------


def _slice(t: Speller, a: Any) -> Any:
    start, end = a.start or 0, a.end
    if isinstance(end, int) and end >= _END:
        end = None
    if isinstance(start, int) and start == 0 and end is None and a.step == 1:
        return a.x
    return _index(t, a.x, a.dim, slice(a.start or None, end, None if a.step == 1 else a.step))


def _index(t: Speller, x: Any, dim: int, key: Any) -> Any:
    if dim < 0:
        known = t.value(x)
        if not isinstance(known, Tensor):
            return None
        dim += known.dim()
    return t.call(operator.getitem, x, (*(slice(None),) * dim, key))


def _slice_scatter(t: Speller, a: Any) -> Any:
    """``x`` with ``src`` in the place of ``x[start:end]``: what lies before, ``src``, what lies behind."""
    known = t.value(a.x)
    if not isinstance(known, Tensor) or a.step != 1:
        return None
    dim = a.dim % known.dim()
    size = known.shape[dim]
    start, end, _ = slice(a.start, a.end).indices(size) if isinstance(size, int) else (a.start or 0, a.end, 1)
    whole = isinstance(end, int) and (end >= _END or end == size)
    if start == 0 and whole:
        return a.src
    if not all(isinstance(at, int) for at in (start, end, size)):
        return None
    if _is_part(a.src, a.x, dim, start, size if whole else end, size):
        return a.x  # what ``x[a:b] += y`` does last: it writes what was added into where it was added
    before = [] if start == 0 else [_index(t, a.x, dim, slice(None, start))]
    behind = [] if whole else [_index(t, a.x, dim, slice(end, None))]
    return t.call(torch.cat, (*before, a.src, *behind), dim)


def _is_part(part: Any, x: Any, dim: int, start: int, end: int, size: int) -> bool:
    """Whether ``part`` is just ``x[start:end]`` along ``dim``."""
    if not isinstance(part, fx.Node) or part.target is not operator.getitem or part.args[0] is not x:
        return False
    key = part.args[1]
    if not isinstance(key, tuple) or len(key) != dim + 1 or any(other != slice(None) for other in key[:-1]):
        return False
    return isinstance(key[-1], slice) and key[-1].indices(size) == (start, end, 1)


def _copy(t: Speller, a: Any) -> Any:
    """``x.copy_(src)`` without the writing: ``src``, spread to the shape of ``x``."""
    into, source = t.value(a.x), t.value(a.src)
    if not isinstance(into, Tensor) or not isinstance(source, Tensor) or into.dtype != source.dtype:
        return None
    return a.src if into.shape == source.shape else t.method("expand_as", a.src, a.x)


def _cast(t: Speller, a: Any) -> Any:
    """``x.to(dtype)``, where that does something."""
    known, dtype = t.value(a.x), getattr(a, "dtype", None)
    device = getattr(a, "device", None)
    if isinstance(device, fx.Node) or (isinstance(known, Tensor) and known.device == device):
        device = None  # it lies there already
    if isinstance(known, Tensor) and known.dtype == dtype:
        dtype = None
    wanted = [value for value in (device, dtype) if value is not None]
    if wanted:
        return t.method("to", a.x, *wanted)
    return t.method("clone", a.x) if getattr(a, "copy", True) else a.x  # _to_copy has no such argument: it copies


def _cast_like(t: Speller, a: Any) -> Any:
    known, other = t.value(a.x), t.value(a.other)
    same = isinstance(known, Tensor) and isinstance(other, Tensor) and known.dtype == other.dtype
    return a.x if same else t.method("type_as", a.x, a.other)


def _same(t: Speller, a: Any) -> Any:
    return a.x


def _transposed(t: Speller, node: Any) -> Any:
    """``w`` where ``node`` is the transpose of a matrix ``w``, else ``None``."""
    known = t.value(node)
    if not isinstance(known, Tensor) or known.dim() != 2 or node.op not in ("call_function", "call_method"):
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    plain = name == "t" and len(node.args) == 1
    swapped = name in ("transpose", "swapaxes") and set(node.args[1:]) in ({0, 1}, {-1, -2})
    permuted = name == "permute" and list(node.args[1:]) in ([[1, 0]], [1, 0])
    return node.args[0] if plain or swapped or permuted else None


# -- layers -----------------------------------------------------------------------------------------------------------

_CONVS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def _convolution(t: Speller, a: Any) -> Any:
    known = t.value(a.weight)
    if not isinstance(known, Tensor) or known.dim() not in _CONVS:
        return None
    where = tuple(tuple(value) for value in (a.stride, a.padding))
    if a.transposed:
        more = tuple(a.output_padding), a.groups, tuple(a.dilation)
        return t.call(_TRANSPOSED[known.dim()], a.x, a.weight, a.bias, *where, *more)
    return t.call(_CONVS[known.dim()], a.x, a.weight, a.bias, *where, tuple(a.dilation), a.groups)


def _addmm(t: Speller, a: Any) -> Any:
    weight, bias = _transposed(t, a.mat2), t.value(a.x)
    if weight is None or a.beta != 1 or a.alpha != 1 or not isinstance(bias, Tensor) or bias.dim() != 1:
        return None
    return t.call(F.linear, a.mat1, weight, a.x)


def _mm(t: Speller, a: Any) -> Any:
    weight = _transposed(t, a.mat2 if hasattr(a, "mat2") else a.other)
    return None if weight is None else t.call(F.linear, a.x, weight)


def _norm(t: Speller, a: Any) -> Any:
    given = (a.running_mean, a.running_var, a.weight, a.bias)
    return t.call(F.batch_norm, a.x, *given, getattr(a, "training", False), a.momentum, a.eps)


def _first(build: Callable[[Speller, Any], Any]) -> Callable[[Speller, Any], Any]:
    """For operators that return more than their layer does: the layer, and nothing for the rest."""

    def several(t: Speller, a: Any) -> Any:
        for user in t.node.users:
            if user.target is not operator.getitem or (user.args[1] != 0 and user.users):
                return None
        layer = build(t, a)
        return None if layer is None else (layer, *(None,) * (len(t.node.target._schema.returns) - 1))  # type: ignore[union-attr]

    return several


def _eval_norm(t: Speller, a: Any) -> Any:
    return None if getattr(a, "training", False) else _norm(t, a)


def _layer_norm(t: Speller, a: Any) -> Any:
    return t.call(F.layer_norm, a.x, tuple(a.normalized_shape), a.weight, a.bias, a.eps)


def _max_pool(dims: int) -> Callable[[Speller, Any], Any]:
    function = (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)[dims - 1]
    return lambda t, a: t.call(function, a.x, a.kernel_size, a.stride, a.padding, a.dilation, a.ceil_mode)


def _adaptive_max_pool(function: Callable[..., Any]) -> Callable[[Speller, Any], Any]:
    plain = _first(lambda t, a: t.call(function, a.x, tuple(a.output_size)))
    return lambda t, a: plain(t, a) or t.call(function, a.x, tuple(a.output_size), return_indices=True)


def _elu(function: Callable[..., Any]) -> Entry:
    return lambda t, a: t.call(*((function, a.x, a.alpha) if a.scale == 1 and a.input_scale == 1 else _as_it_is(t, a)))


def _as_it_is(t: Speller, a: Any) -> tuple[Any, ...]:
    """The operator itself: the function of its name takes fewer arguments."""
    return t.node.target, *vars(a).values()


def _interpolate(mode: str, antialias: bool = False) -> Callable[[Speller, Any], Any]:
    def resize(t: Speller, a: Any) -> Any:
        size, factors = a.output_size, getattr(a, "scale_factors", None)
        scales = [value for key, value in vars(a).items() if key.startswith("scales")]
        if any(value is not None for value in scales):
            return None  # a size and factors that do not follow from it
        how = {} if mode.startswith("nearest") else {"align_corners": a.align_corners}
        how |= {"antialias": True} if antialias else {}
        wanted = {"size": tuple(size)} if size is not None else {"scale_factor": tuple(factors or ())}
        return t.call(F.interpolate, a.x, **wanted, mode=mode, **how)

    return resize


def _attention(t: Speller, a: Any) -> Any:
    given = (a.query, a.key, a.value, a.attn_mask, a.dropout_p, a.is_causal)
    more = {name: value for name, value in (("scale", a.scale), ("enable_gqa", a.enable_gqa)) if value}
    return t.call(F.scaled_dot_product_attention, *given, **more)


def _pad(mode: str) -> Callable[[Speller, Any], Any]:
    return lambda t, a: t.call(F.pad, a.x, tuple(a.padding), mode=mode)


# name, or name.overload where overloads differ: what spells it; None there means "as any other operator".
TABLE: dict[str, Callable[[Speller, Any], Any]] = {
    "slice": _slice,
    "select.int": lambda t, a: _index(t, a.x, a.dim, a.index),
    "index.Tensor": lambda t, a: t.call(
        operator.getitem, a.x, tuple(slice(None) if index is None else index for index in a.indices)
    ),
    "slice_scatter": _slice_scatter,
    "copy": _copy,
    "sym_size.int": lambda t, a: t.method("size", a.x, a.dim),
    **dict.fromkeys(("alias", "detach_", "lift", "lift_fresh"), _same),
    "lift_fresh_copy": lambda t, a: t.method("clone", a.x),
    "clone": lambda t, a: t.method("contiguous" if a.memory_format is torch.contiguous_format else "clone", a.x),
    "contiguous": lambda t, a: t.method("contiguous", a.x),
    "to": lambda t, a: _cast_like(t, a) if hasattr(a, "other") else _cast(t, a),
    "type_as": _cast_like,
    "_to_copy": _cast,
    **dict.fromkeys(("_unsafe_view", "_reshape_copy"), lambda t, a: t.method("reshape", a.x, a.size)),
    "split": lambda t, a: t.method("split", a.x, getattr(a, "split_size", None) or list(a.split_sizes), a.dim),
    "split_with_sizes": lambda t, a: t.method("split", a.x, list(a.split_sizes), a.dim),
    "add.Tensor": lambda t, a: t.call(operator.add, a.x, a.other) if a.alpha == 1 else None,
    "cat": lambda t, a: t.call(torch.cat, tuple(a.tensors), a.dim),
    "mm": _mm,
    "matmul": _mm,
    "addmm": _addmm,
    "convolution": _convolution,
    "batch_norm": _norm,
    "_native_batch_norm_legit_no_training": _first(_norm),
    "_native_batch_norm_legit": _first(_eval_norm),
    "native_batch_norm": _first(_eval_norm),
    "layer_norm": _layer_norm,
    "native_layer_norm": _first(_layer_norm),
    "group_norm": lambda t, a: t.call(F.group_norm, a.x, a.num_groups, a.weight, a.bias, a.eps),
    "native_group_norm": _first(lambda t, a: t.call(F.group_norm, a.x, a.group, a.weight, a.bias, a.eps)),
    "embedding": lambda t, a: t.call(F.embedding, a.indices, a.weight),
    **{f"max_pool{dims}d_with_indices": _first(_max_pool(dims)) for dims in (1, 2, 3)},
    "_adaptive_avg_pool2d": lambda t, a: t.call(F.adaptive_avg_pool2d, a.x, tuple(a.output_size)),
    "_adaptive_avg_pool3d": lambda t, a: t.call(F.adaptive_avg_pool3d, a.x, tuple(a.output_size)),
    "adaptive_max_pool1d": _adaptive_max_pool(F.adaptive_max_pool1d),
    "adaptive_max_pool2d": _adaptive_max_pool(F.adaptive_max_pool2d),
    "adaptive_max_pool3d": _adaptive_max_pool(F.adaptive_max_pool3d),
    "elu": _elu(F.elu),
    "elu_": _elu(torch._C._nn.elu_),
    "_softmax": lambda t, a: None if a.half_to_float else t.call(torch.softmax, a.x, a.dim),
    "_log_softmax": lambda t, a: None if a.half_to_float else t.call(torch.log_softmax, a.x, a.dim),
    "pad": lambda t, a: t.call(F.pad, a.x, tuple(a.pad), a.mode, a.value),
    "constant_pad_nd": lambda t, a: t.call(F.pad, a.x, tuple(a.pad), "constant", a.value),
    **{f"reflection_pad{dims}d": _pad("reflect") for dims in (1, 2, 3)},
    **{f"replication_pad{dims}d": _pad("replicate") for dims in (1, 2, 3)},
    **{f"upsample_nearest{dims}d": _interpolate("nearest") for dims in (1, 2, 3)},
    **{f"_upsample_nearest_exact{dims}d": _interpolate("nearest-exact") for dims in (1, 2, 3)},
    "upsample_linear1d": _interpolate("linear"),
    "upsample_bilinear2d": _interpolate("bilinear"),
    "upsample_bicubic2d": _interpolate("bicubic"),
    "upsample_trilinear3d": _interpolate("trilinear"),
    "_upsample_bilinear2d_aa": _interpolate("bilinear", antialias=True),
    "_upsample_bicubic2d_aa": _interpolate("bicubic", antialias=True),
    "einsum": lambda t, a: t.call(torch.einsum, a.equation, *a.tensors),
    "im2col": lambda t, a: t.call(F.unfold, a.x, a.kernel_size, a.dilation, a.padding, a.stride),
    "col2im": lambda t, a: t.call(F.fold, a.x, a.output_size, a.kernel_size, a.dilation, a.padding, a.stride),
    "scaled_dot_product_attention": _attention,
}
