"""Layers that act on each channel by itself, for some of their channels."""

from __future__ import annotations

import copy
import math

from torch import Tensor, nn

from rmfx.algebra.pointwise import CARRIED, NORMS
from rmfx.modules import ChannelAffine, ChannelClamp, FeatureNorm, MaskedActivation


def narrowed(layer: nn.Module, kept: Tensor) -> nn.Module:
    """A copy of ``layer`` on the channels ``kept``; of one that treats all alike, the very same.

    >>> import torch
    >>> narrowed(nn.PReLU(4), torch.tensor([0, 2])).num_parameters
    2
    """
    module = copy.deepcopy(layer)
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        module.num_parameters = len(kept)
        return _with_tensors(module, kept, ("weight",))
    if isinstance(module, ChannelClamp):
        return _with_tensors(module, kept, ("low", "high"))
    if isinstance(module, MaskedActivation):
        return _with_tensors(module, kept, ("mask",))
    if isinstance(module, ChannelAffine):
        return _with_tensors(module, kept, ("weight", "bias"))
    norm = module.norm if isinstance(module, FeatureNorm) else module
    if isinstance(norm, NORMS):
        norm.num_features = len(kept)
        carried = set(norm.__dict__.get(CARRIED, ()))
        norm.__dict__[CARRIED] = [new for new, old in enumerate(kept.tolist()) if old in carried]
        _with_tensors(norm, kept, ("weight", "bias", "running_mean", "running_var"))
    return module


def _with_tensors(module: nn.Module, kept: Tensor, names: tuple[str, ...]) -> nn.Module:
    """The entries ``kept`` of the per-channel tensors ``names``, in place."""
    for name in names:
        tensor = getattr(module, name)
        if tensor is None or not tensor.dim():
            continue
        part = tensor.detach()[kept.to(tensor.device)].clone()
        own = isinstance(tensor, nn.Parameter)
        setattr(module, name, nn.Parameter(part, requires_grad=tensor.requires_grad) if own else part)
    return module


def plainest(activation: nn.Module) -> nn.Module:
    """The same function without tensors per channel, where all channels are treated alike.

    >>> import torch
    >>> plainest(MaskedActivation(nn.SiLU(), torch.tensor([True, True]))), plainest(ChannelClamp(*torch.eye(2)))
    (SiLU(), ChannelClamp(channels=2, axis=1))
    """
    if isinstance(activation, MaskedActivation) and bool(activation.mask.all()):
        return activation.activation
    if isinstance(activation, nn.PReLU) and activation.num_parameters > 1 and not bool(activation.weight.any()):
        return nn.ReLU()
    if isinstance(activation, ChannelClamp) and all(
        bool((end == end[0]).all()) for end in (activation.low, activation.high)
    ):
        low, high = float(activation.low[0]), float(activation.high[0])
        if (low, high) == (0.0, 6.0):
            return nn.ReLU6()
        if (low, high) == (0.0, math.inf):
            return nn.ReLU()
        if math.isfinite(low) and math.isfinite(high) and low < high:
            return nn.Hardtanh(low, high)
    return activation
