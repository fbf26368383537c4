"""Batch norms that normalise some channels and are the identity on those they only carry (the paper's equation 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rmfx.algebra.pointwise import Part

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CARRIED = "carried_channels"  # on a batch norm that a pass has made: which of its channels are only carried


def widen_norm(parts: Sequence[Part], channels: int) -> nn.Module | None:
    """A widened batch norm: the identity on carried channels, ``w = sqrt(var + eps), b = mean`` (equation 2).

    ``None`` where another activation is among ``parts``, or norms that differ in type, eps or momentum.
    """
    norms = [part.activation for part in parts if isinstance(part.activation, NORMS)]
    if len(norms) != sum(part.activation is not None for part in parts):
        return None
    if len({(type(norm), norm.eps, norm.momentum) for norm in norms}) != 1:
        return None
    wide = identity_norm(norms[0], channels)
    carried = torch.ones(channels, dtype=torch.bool)
    for part in parts:
        if isinstance(part.activation, NORMS):
            carried[part.positions] = False
            carried[part.positions[part.activation.__dict__.get(CARRIED, [])]] = True
            _copy_statistics(part.activation, wide, part.positions)
    wide.requires_grad_(any(p.requires_grad for norm in norms for p in norm.parameters()))
    wide.__dict__[CARRIED] = carried.nonzero().flatten().tolist()
    return wide


def identity_norm(like: nn.Module, channels: int) -> nn.modules.batchnorm._BatchNorm:
    """A batch norm of the type, eps and momentum of ``like`` that is the identity on all ``channels``."""
    assert isinstance(like, NORMS)
    norm = type(like)(channels, like.eps, like.momentum, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.fill_(math.sqrt(1.0 + like.eps))
    norm.requires_grad_(any(p.requires_grad for p in like.parameters()))
    norm.__dict__[CARRIED] = list(range(channels))
    return norm


def is_identity_at(norm: nn.Module) -> Tensor:
    """The channels on which a batch norm is the identity, bool ``[C]``: ``w = sqrt(var + eps)``, rounded to its dtype.

    >>> is_identity_at(identity_norm(nn.BatchNorm2d(3), 2).float()).tolist(), is_identity_at(nn.BatchNorm2d(1)).tolist()
    ([True, True], [False])
    """
    assert isinstance(norm, NORMS)
    mean, var, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
    if mean is None or var is None or weight is None or bias is None:
        return torch.zeros(norm.num_features, dtype=torch.bool)
    return ((weight == torch.sqrt(var.double() + norm.eps).to(weight.dtype)) & (bias == mean)).detach().cpu()


def _copy_statistics(
    norm: nn.modules.batchnorm._BatchNorm, wide: nn.modules.batchnorm._BatchNorm, positions: Tensor
) -> None:
    assert wide.running_mean is not None and wide.running_var is not None
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        wide.running_mean[positions] = norm.running_mean.double().cpu()
        wide.running_var[positions] = norm.running_var.double().cpu()
        wide.weight[positions] = 1.0 if norm.weight is None else norm.weight.double().cpu()
        wide.bias[positions] = 0.0 if norm.bias is None else norm.bias.double().cpu()
