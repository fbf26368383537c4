"""A layer that treats channels differently, on some of its channels only."""

from __future__ import annotations

import copy
from typing import TypeGuard

from torch import nn

from rmfx.algebra.pointwise import CARRIED, NORMS, is_per_channel
from rmfx.algebra.restrict import Span


def part_of(module: nn.Module, span: Span, width: int) -> nn.Module:
    """The activation, norm or stage on some of its channels.

    Raises:
        InexactError: when it cannot be taken apart.
    """
    if span == (0, width) or not is_per_channel(module):
        return module
    inside = slice(span[0], span[0] + span[1])
    part = copy.copy(module)
    part.__dict__ = dict(vars(module))
    part._parameters = {name: _cut(tensor, width, inside) for name, tensor in module._parameters.items()}  # type: ignore[misc]
    part._buffers = {name: _cut(tensor, width, inside) for name, tensor in module._buffers.items()}  # type: ignore[misc]
    if isinstance(part, NORMS):
        part.num_features = span[1]
        carried = [channel - span[0] for channel in part.__dict__.get(CARRIED, ())]
        part.__dict__[CARRIED] = [channel for channel in carried if 0 <= channel < span[1]]
    elif isinstance(part, nn.PReLU):
        part.num_parameters = span[1]
    return part


def _cut(tensor: object, width: int, inside: slice) -> object:
    if not _is_per_channel_tensor(tensor, width):
        return tensor
    cut = tensor.detach()[inside]
    return nn.Parameter(cut, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut


def _is_per_channel_tensor(tensor: object, width: int) -> TypeGuard[nn.Parameter]:
    return hasattr(tensor, "dim") and tensor.dim() == 1 and len(tensor) == width  # type: ignore[arg-type]
