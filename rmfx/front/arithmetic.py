"""One spelling for sums, differences and scalings.

A sum of two tensors is ``operator.add`` of two nodes, a product of two is ``operator.mul``. A number, or a constant
with one value per channel, becomes a :class:`rmfx.modules.ChannelAffine`: ``x - y`` is ``x + (-1)·y``,
``torch.add(x, y, alpha=a)`` is ``x + a·y``, ``2 - x`` is ``(-1)·x + 2``. Arithmetic on what may hold integers (a scale
made of floats would change their type) stays as it is; sums and products among these are spelled ``torch.add`` and
``torch.mul``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.exact import exact, remember
from rmfx.front.builders import same_memory
from rmfx.front.install import Installer
from rmfx.front.kind_table import KindTable
from rmfx.front.kinds import Kind
from rmfx.modules import ChannelAffine

_ADD = (operator.add, torch.add, "add")
_SUB = (operator.sub, torch.sub, torch.subtract, "sub", "subtract")
_RSUB = (torch.rsub, "rsub", "__rsub__")
_MUL = (operator.mul, torch.mul, torch.multiply, "mul", "multiply")
_DIV = (operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide", "true_divide")
_NEG = (operator.neg, torch.neg, torch.negative, "neg", "negative")
_POS = (operator.pos, torch.positive, "positive")
_LINEAR = frozenset((*_ADD, *_SUB, *_RSUB, *_MUL, *_DIV, *_NEG, *_POS))

Constant = int | float | Tensor


@dataclass(frozen=True)
class _Term:
    """``scale * x + shift`` of one tensor node; a constant tensor has one value per channel of ``axis``, or is 0-d."""

    node: fx.Node
    scale: Constant = 1
    shift: Constant = 0
    axis: int = 1


@dataclass(frozen=True)
class _Channels:
    """A constant tensor seen as a vector along ``axis`` of the tensor beside it."""

    vector: Tensor
    axis: int


class Arithmetic:
    """Brings the arithmetic of one graph into normal form.

    Args:
        installer: puts the new layers in place.
        kinds: what is known of each node.
        constant: the tensor that a ``get_attr`` node reads, ``None`` for other nodes.
        dtype: the float type that new constants are kept in; ``None``: that of the constants beside them.
    """

    def __init__(
        self,
        installer: Installer,
        kinds: KindTable,
        constant: Callable[[fx.Node], Tensor | None],
        dtype: torch.dtype | None,
    ) -> None:
        self.installer, self.kinds, self.constant, self.dtype = installer, kinds, constant, dtype

    def rewrite(self, node: fx.Node) -> None:
        """Spell ``node`` in normal form, where it is linear arithmetic on tensors."""
        if node.op not in ("call_function", "call_method") or node.target not in _LINEAR:
            return
        if not self.kinds[node].tensor:
            return  # counting with sizes
        if (factors := self._factors(node)) is not None:
            node.op, node.target, node.args, node.kwargs = "call_function", operator.mul, factors, {}
            return
        terms = self._terms(node)
        if len(terms) == 2:
            self._sum(node, *terms)
        elif not terms:
            _respell(node)
        elif self._changes(terms[0]):
            term = self._with_scale(terms[0])
            self.installer.layer(node, self._layer(term), term.node)
        else:
            node.replace_all_uses_with(terms[0].node)  # 0 + x, x * 1, +x: dead code from now on

    # -- reading ------------------------------------------------------------------------------------------------------

    def _terms(self, node: fx.Node) -> tuple[_Term, ...]:
        """``node`` as a sum of one or two scaled tensors; empty where it is none that keeps its type."""
        given: dict[str, Any] = dict(node.kwargs)
        alpha = given.pop("alpha", 1)
        values = [*node.args, *(given.pop(name) for name in ("input", "self", "other") if name in given)]
        if given.pop("rounding_mode", None) is not None or given or not _is_number(alpha):
            return ()
        if node.target in _NEG or node.target in _POS:
            values, alpha = [values[0], -1 if node.target in _NEG else 1], 1
        if len(values) != 2 or not any(isinstance(value, fx.Node) for value in values):
            return ()
        first, second = reversed(values) if node.target in _RSUB else values
        if node.target in _NEG or node.target in _POS or node.target in _MUL:
            return self._product(first, second)
        if node.target in _DIV:
            return self._quotient(first, second)
        return self._difference(first, second, alpha if node.target in _ADD else -alpha)

    def _factors(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two tensors whose product ``node`` is, where neither is a constant with one value per channel."""
        given: dict[str, Any] = dict(node.kwargs)
        values = [*node.args, *(given.pop(name) for name in ("input", "self", "other") if name in given)]
        if node.target not in _MUL or given or len(values) != 2:
            return None
        first, second = values
        if not (self._is_tensor(first) and self._is_tensor(second)):
            return None
        either = self._constant(first, second) is not None or self._constant(second, first) is not None
        return None if either else (first, second)

    def _difference(self, first: Any, second: Any, factor: int | float) -> tuple[_Term, ...]:
        """``first + factor * second``."""
        left, right = self._constant(first, second), self._constant(second, first)
        if left is None and right is None:
            return self._two(first, second, factor)
        if left is None:
            return self._one(first, 1, right, factor)
        return self._one(second, factor, left) if right is None else ()

    def _two(self, first: Any, second: Any, factor: int | float) -> tuple[_Term, ...]:
        if not (self._is_tensor(first) and self._is_tensor(second)):
            return ()
        floats = self.kinds[first].floating or self.kinds[second].floating
        return (_Term(first), _Term(second, factor)) if factor == 1 or floats else ()

    def _product(self, first: Any, second: Any) -> tuple[_Term, ...]:
        left, right = self._constant(first, second), self._constant(second, first)
        if (left is None) == (right is None):
            return ()
        return self._one(first, right) if left is None else self._one(second, left)

    def _quotient(self, first: Any, second: Any) -> tuple[_Term, ...]:
        divisor = self._constant(second, first)
        if divisor is None or not self._is_tensor(first) or not self.kinds[first].floating:
            return ()
        if isinstance(divisor, _Channels):
            trains = isinstance(divisor.vector, nn.Parameter)
            inverse = _computed(torch.reciprocal, divisor.vector) if trains else exact(divisor.vector).reciprocal()
            return self._one(first, _Channels(inverse, divisor.axis))
        return self._one(first, 1 / divisor if divisor not in (0, 1) else divisor) if divisor else ()

    def _one(self, node: Any, scale: Any, shift: Any = 0, factor: int | float = 1) -> tuple[_Term, ...]:
        """``scale * node + factor * shift``, where both are numbers or constants along one axis."""
        if not self._is_tensor(node):
            return ()
        axis = next((value.axis for value in (scale, shift) if isinstance(value, _Channels)), 1)
        plain = [value.vector if isinstance(value, _Channels) else value for value in (scale, shift)]
        term = _Term(node, plain[0], plain[1] if factor == 1 else _times(plain[1], factor), axis)
        # A number leaves it to the tensor which type the result has; a layer that holds floats does not.
        by_channel = any(isinstance(value, Tensor) and value.dim() for value in plain)
        return (term,) if by_channel or self.kinds[node].floating or not self._changes(term) else ()

    def _is_tensor(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and self.kinds[value].tensor

    def _constant(self, value: Any, beside: Any) -> int | float | _Channels | None:
        if _is_number(value):
            return value
        if not isinstance(value, fx.Node) or not self._is_tensor(beside):
            return None
        tensor, kind = self.constant(value), self.kinds[beside]
        if tensor is None or tensor.is_floating_point():
            return None if tensor is None else _channels(tensor, kind)
        # A count, such as the number of heads, leaves it to floats which type the result has, as a number does.
        single = tensor.numel() == 1 and tensor.dim() <= (kind.rank or 0) and not tensor.is_meta
        return int(tensor) if single and kind.floating and not tensor.is_complex() else None

    def _changes(self, term: _Term) -> bool:
        if isinstance(term.scale, Tensor) or isinstance(term.shift, Tensor) or term.scale != 1 or term.shift != 0:
            return True
        whole = isinstance(term.scale, int) and isinstance(term.shift, int)
        return not whole and not self.kinds[term.node].floating  # x * 1.0 makes floats of integers

    def _with_scale(self, term: _Term) -> _Term:
        """``x * c + d`` as one term, where ``term`` is ``y + d`` and only that reads ``y = x * c``."""
        made = self.installer.gm.get_submodule(str(term.node.target)) if term.node.op == "call_module" else None
        if type(made) is not ChannelAffine or made.bias is not None or len(term.node.users) != 1:
            return term
        vectors = isinstance(term.shift, Tensor) and term.shift.shape == made.weight.shape and made.weight.dim() == 1
        if not vectors or isinstance(term.scale, Tensor) or term.scale != 1 or term.axis != made.axis:
            return term
        return _Term(term.node.all_input_nodes[0], made.weight, term.shift, made.axis)

    # -- writing ------------------------------------------------------------------------------------------------------

    def _sum(self, node: fx.Node, first: _Term, second: _Term) -> None:
        right = second.node
        if self._changes(second):
            right = self.installer.layer_before(node, self._layer(second), second.node)
            self.kinds[right] = self.kinds[second.node]
        node.op, node.target = "call_function", operator.add
        node.args, node.kwargs = (first.node, right), {}

    def _layer(self, term: _Term) -> ChannelAffine:
        like = next((value for value in (term.scale, term.shift) if isinstance(value, Tensor)), None)
        scale, shift = (self._as_tensor(value, like) for value in (term.scale, term.shift))
        without_shift = not isinstance(term.shift, Tensor) and term.shift == 0
        layer = ChannelAffine(scale, None if without_shift else shift, term.axis)
        dtype = self.dtype or (like.dtype if like is not None and like.is_floating_point() else torch.float64)
        for name, buffer in list(layer.named_buffers()):
            if buffer.dtype == torch.float64 != dtype:  # Python's numbers are float64
                layer.register_buffer(name, _rounded(buffer, dtype))
        return layer

    def _as_tensor(self, value: Constant, like: Tensor | None) -> Tensor:
        if isinstance(value, Tensor):
            return value
        if like is not None:
            return torch.full_like(like, value, dtype=torch.float64)
        return torch.tensor(value, dtype=torch.float64, device=self.installer.device)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _channels(tensor: Tensor, kind: Kind) -> _Channels | None:
    """``tensor`` as one value, or one value per channel, of the tensor it is combined with; ``None`` if neither."""
    shape, rank = tensor.shape, kind.rank
    if len(shape) > (1 if rank is None else rank):
        return None  # the result may have more dimensions
    if tensor.numel() == 1:
        return _Channels(same_memory(tensor, lambda whole: whole.reshape(())), 1)
    long = [index for index, size in enumerate(shape) if size != 1]
    if len(long) != 1:
        return None
    axis = long[0] - len(shape)
    if axis != -1 and (rank is None or axis + rank != 1):
        return None
    if rank is not None and kind.sizes[axis] not in (None, tensor.numel()):
        return None  # one channel that broadcasts to many
    return _Channels(same_memory(tensor, lambda whole: whole.reshape(-1)), -1 if axis == -1 else 1)


def _times(value: Constant, factor: int | float) -> Constant:
    return _computed(lambda whole: whole * factor, value) if isinstance(value, Tensor) else value * factor


def _computed(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """``function(value)``, of a parameter a parameter, so that what trains goes on training."""
    result = function(value.detach())
    result = nn.Parameter(result, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else result
    remember(result, lambda: function(exact(value)))
    return result


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = value.to(dtype)
    remember(rounded, lambda: value)
    return rounded


def _respell(node: fx.Node) -> None:
    """Keep ``operator.add`` and ``mul`` for two tensors: any other sum or product is spelled ``torch.add``, ``mul``."""
    plain: dict[Any, Any] = {operator.add: torch.add, operator.mul: torch.mul}
    if node.target in plain:
        first, second = node.args
        node.target = plain[node.target]
        node.args = (first, second) if isinstance(first, fx.Node) else (second, first)
