"""The few layer types rmfx adds to ``torch.nn``; everything else in a converted network is plain.

All are exact, stateless apart from buffers, trace as leaves, and export to ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Layers that are the identity in eval mode and random in training.
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def along_channels(vector: Tensor, rank: int, axis: int) -> Tensor:
    """View a per-channel vector so that it broadcasts over ``rank`` dimensions along ``axis``."""
    if vector.dim() == 0:
        return vector
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


class ChannelAffine(nn.Module):
    """``y = x * weight + bias`` with one weight and bias per channel, or one for all.

    The normal form of LayerScale, ``0.2 * x``, ``-x`` and ``x / 2``.

    Args:
        weight: shape ``[C]``, or ``[]`` for one scalar. Parameters stay parameters, other tensors become buffers.
        bias: shape of ``weight``, or ``None``.
        axis: the channel axis of ``x``; -1 for channels-last features such as those of ``nn.Linear``.

    >>> ChannelAffine(torch.tensor(0.5))(torch.ones(1, 2, 1, 1)).flatten().tolist()
    [0.5, 0.5]
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        for name, tensor in (("weight", weight), ("bias", bias)):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        y = x * along_channels(self.weight, x.dim(), self.axis)
        return y if self.bias is None else y + along_channels(self.bias, x.dim(), self.axis)

    def extra_repr(self) -> str:
        shown = float(self.weight.detach()) if self.weight.dim() == 0 else f"channels={len(self.weight)}"
        return f"{shown}, bias={self.bias is not None}, axis={self.axis}"


class ChannelClamp(nn.Module):
    """Clamp each channel to its own ``[low, high]``; infinite bounds let a channel pass unchanged.

    The masked form of ReLU6 and Hardtanh: a PReLU there would drop the upper bound.

    Args:
        low, high: shape ``[C]``.
        axis: the channel axis of ``x``.

    >>> clamp = ChannelClamp(torch.tensor([0.0, -torch.inf]), torch.tensor([6.0, torch.inf]))
    >>> clamp(torch.tensor([[[[9.0]], [[-9.0]]]])).flatten().tolist()
    [6.0, -9.0]
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, x: Tensor) -> Tensor:
        low = along_channels(self.low, x.dim(), self.axis)
        high = along_channels(self.high, x.dim(), self.axis)
        return torch.maximum(torch.minimum(x, high), low)

    def extra_repr(self) -> str:
        return f"channels={len(self.low)}, axis={self.axis}"


class MaskedActivation(nn.Module):
    """Apply ``activation`` to the channels of ``mask`` and pass the others unchanged.

    The masked carrier of any pointwise activation that no PReLU or clamp can express.

    Args:
        activation: a pointwise module.
        mask: bool, shape ``[C]``, true where the activation acts.
        axis: the channel axis of ``x``.

    >>> masked = MaskedActivation(nn.Sigmoid(), torch.tensor([True, False]))
    >>> masked(torch.zeros(1, 2, 1, 1)).flatten().tolist()
    [0.5, 0.0]
    """

    mask: Tensor

    def __init__(self, activation: nn.Module, mask: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        self.activation = activation
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(along_channels(self.mask, x.dim(), self.axis), self.activation(x), x)

    def extra_repr(self) -> str:
        return f"active={int(self.mask.sum())} of {len(self.mask)}, axis={self.axis}"


class Elementwise(nn.Module):
    """Apply a function of torch that no layer of ``torch.nn`` stands for to every element.

    Args:
        function: the name of the function, one of :data:`FUNCTIONS`; all are finite at 0.
        exponent: of ``"pow"``, which is the only one that has any; positive.

    Raises:
        ValueError: when there is no such function, or for another exponent.

    >>> Elementwise("square")(torch.tensor([-3.0])), Elementwise("pow", 3)(torch.tensor([-3.0]))
    (tensor([9.]), tensor([-27.]))
    """

    FUNCTIONS = frozenset(
        ("abs", "atan", "cos", "cosh", "erf", "exp", "expm1", "log1p", "pow", "sin", "sinh", "sqrt", "square")
    )

    def __init__(self, function: str, exponent: int | float | None = None) -> None:
        super().__init__()
        fits = exponent is not None and exponent > 0 if function == "pow" else exponent is None
        if function not in self.FUNCTIONS or not fits:
            raise ValueError(f"no function of single elements that is finite at 0: {function!r}, {exponent!r}")
        self.function, self.exponent = function, exponent

    def forward(self, x: Tensor) -> Tensor:
        function = getattr(torch, self.function)
        return function(x) if self.exponent is None else function(x, self.exponent)

    def extra_repr(self) -> str:
        return self.function if self.exponent is None else f"{self.function}, {self.exponent}"


class ChannelSlice(nn.Module):
    """Channels ``start`` to ``start + length - 1`` of ``x``: the normal form of ``x[:, a:b]`` and of a part of a split.

    Args:
        start, length: the channels that are read.
        axis: the channel axis of ``x``.

    >>> ChannelSlice(1, 2)(torch.arange(4.0).reshape(1, 4, 1, 1)).flatten().tolist()
    [1.0, 2.0]
    """

    def __init__(self, start: int, length: int, axis: int = 1) -> None:
        super().__init__()
        self.start, self.length, self.axis = start, length, axis

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.axis, self.start, self.length)

    def extra_repr(self) -> str:
        return f"start={self.start}, length={self.length}, axis={self.axis}"


class ChannelPad(nn.Module):
    """Zero channels in front of and behind those of ``x``: the shortcut of PyramidNet and of a ResNet of option A.

    Args:
        before, after: numbers of zero channels.
        axis: the channel axis of ``x``.

    >>> ChannelPad(0, 1)(torch.ones(1, 2, 1, 1)).flatten().tolist()
    [1.0, 1.0, 0.0]
    """

    def __init__(self, before: int, after: int, axis: int = 1) -> None:
        super().__init__()
        self.before, self.after, self.axis = before, after, axis

    def forward(self, x: Tensor) -> Tensor:
        behind = x.dim() - 1 - self.axis % x.dim()
        return nn.functional.pad(x, (0, 0) * behind + (self.before, self.after))

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}, axis={self.axis}"


class FeatureNorm(nn.Module):
    """Batch norm of the last axis of ``x``, over all others: what ``nn.BatchNorm1d`` does to a list of positions.

    Args:
        norm: an ``nn.BatchNorm1d`` of as many features.

    >>> FeatureNorm(nn.BatchNorm1d(4).eval())(torch.zeros(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.norm = norm

    @property
    def num_features(self) -> int:
        """Size of the last axis."""
        return self.norm.num_features

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).reshape(x.shape)


class ChannelsLast(nn.Module):
    """Lay images out with their channels last in memory, which CPU kernels of torch prefer; values stay what they are.

    >>> ChannelsLast()(torch.zeros(1, 3, 4, 5)).stride()
    (60, 1, 15, 3)
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


class SizeGuard(nn.Module):
    """Pass ``x`` on unchanged, or raise where its sizes are not those a rewrite was proven for.

    Args:
        sizes: of the last dimensions, those the network was converted for: as a rule all after batch and channels.
        reason: the size condition, for the message.

    Raises:
        ValueError: when ``x`` has other sizes there.
    """

    def __init__(self, sizes: tuple[int, ...], reason: str) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.reason = reason

    def forward(self, x: Tensor) -> Tensor:
        sizes = tuple(x.shape[-len(self.sizes) :])
        if sizes != self.sizes:
            raise ValueError(
                f"this network was converted for spatial size {self.sizes}, got {sizes}: "
                f"{self.reason}. Convert again with example inputs of the new size."
            )
        return x

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"
