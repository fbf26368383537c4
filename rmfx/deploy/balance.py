"""Scale channels by powers of two so that they share one int8 scale better; the network stays the same, bit for bit.

Between two linear layers with nothing but homogeneous activations (``phi(s t) = s phi(t)`` for positive ``s``: ReLU,
PReLU, LeakyReLU, none), channel ``c`` may be multiplied by ``s_c`` in the first layer and divided by it in the second:

    y = W phi(V x + b)  =  (W / s) phi((s V) x + s b)

In int8 all channels of a tensor share one scale, and all weights of a filter. Carried channels make both harder: a
filter that merges them holds a 1 for the carried channel beside weights of some hundredths. Growing the carried channel
shrinks that 1, and takes digits from the other channels. With errors spread evenly over one step of rounding, the error
that the pair makes is, up to a factor,

    sum_t R_t(s)^2 sum_oc W_oc^2 / s_c^2   +   k sum_o (2 max_c |W_oc| / s_c)^2 sum_c s_c^2 E[x_c^2]

where ``t`` are the tensors between the layers that are rounded, ``R_t`` their ranges, and ``x`` what the second layer
reads, measured on data; and ``k = 4``, since errors of weights are the same at every position and add up, where those
of activations average out. The best of the family ``s_c = w_c^p`` is taken, with ``w_c`` the largest share of channel
``c`` in a filter, and ``p`` from 0 (no scaling) to 1. Families that look at the range of each channel, too (cross-layer
equalisation, Nagel et al. 2019; SmoothQuant, Xiao et al. 2023), were tried: they win on some networks, lose on others.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.check.verify import verify as verify_models
from rmfx.errors import RmfxError
from rmfx.graph.facts import ZERO_PADDING
from rmfx.inputs import as_tuple, describe

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR = (nn.Linear, *_CONVS)
_FUSED = (nn.Identity, nn.ReLU, *ZERO_PADDING)  # onnxruntime rounds once, behind them
_SEPARATE = (nn.PReLU, nn.LeakyReLU)  # it rounds before and behind them
_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SYSTEMATIC = 4.0  # k
_LARGEST = 10.0  # of the exponents of two: no number comes near the ends of its type
_TINY = 1e-12


def balance(
    network: fx.GraphModule, data: Iterable[Tensor | Sequence[Tensor]], *, verify: bool = True
) -> fx.GraphModule:
    """A copy of ``network`` whose channels are scaled for int8; it computes the same numbers.

    Layers are taken in pairs, the first read by the second alone. Others, and clamped ones (ReLU6), stay as they are.

    Args:
        network: of :func:`rmfx.convert`, in eval mode; not changed.
        data: inputs like those that it will be quantised with, on its device.
        verify: compare ``network`` and the result in float64, at the shapes of the first batch.

    Raises:
        RmfxError: when there is no data, it does not fit the network, or it or a value of the network on it is not
            finite.
        VerificationError: when the result differs, which is a bug of rmfx.

    >>> import rmfx
    >>> x = torch.randn(2, 3, 9, 9)
    >>> net = rmfx.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval(), x)
    >>> torch.equal(balance(net, [x])(x), net(x))
    True
    """
    balanced = copy.deepcopy(network)
    pairs = [*_pairs(balanced)]
    hooks = [hook for pair in pairs for hook in pair.watch()]
    first: tuple[Tensor, ...] | None = None
    with torch.no_grad():
        for batch in data:
            inputs = as_tuple(batch)
            _run(balanced, inputs)
            first = first or inputs
    if first is None:
        raise RmfxError("there is no data to balance the network with: give at least one batch of inputs")
    for hook in hooks:
        hook.remove()
    for pair in pairs:
        pair.scale()
    if verify:
        verify_models(network, balanced, first, quick=True)
    return balanced


def _run(network: fx.GraphModule, batch: tuple[Any, ...]) -> None:
    if not all(isinstance(value, Tensor) and bool(value.isfinite().all()) for value in batch):
        raise RmfxError(f"a batch of the data is {describe(batch)}: give tensors that are finite")
    try:
        network(*batch)
    except Exception as problem:  # torch raises many classes
        raise RmfxError(f"the network does not run on a batch of the data, {describe(batch)}: {problem}") from problem


class _Seen:
    """What passed a place: smallest, largest and mean square of each channel. Zero is always in the range."""

    def __init__(self, layer: Any) -> None:  # a convolution or nn.Linear
        self.axis = _axis(layer)
        self.low = self.high = self.squares = torch.zeros(())
        self.batches = 0

    def see(self, x: Tensor) -> None:
        channels = x.double().movedim(self.axis, 0).flatten(1)
        self.low = torch.minimum(channels.amin(1), self.low.to(channels))
        self.high = torch.maximum(channels.amax(1), self.high.to(channels))
        self.squares = self.squares.to(channels) + channels.square().mean(1)
        self.batches += 1


class _Pair:
    """A linear layer and the only one that reads it; ``separate``: the activation between them is rounded by itself."""

    def __init__(self, name: str, first: Any, second: Any, separate: bool) -> None:
        self.name, self.first, self.second = name, first, second
        self.read, self.made = _Seen(second), _Seen(first)
        self.separate = separate

    def watch(self) -> Iterator[Any]:
        """Have the layers tell what passes; yields the handles that end it."""
        yield self.first.register_forward_hook(lambda module, given, made: self.made.see(made))
        yield self.second.register_forward_pre_hook(lambda module, given: self.read.see(given[0]))

    def scale(self) -> None:
        """Scale the channels between the layers."""
        rounded = (self.read, self.made) if self.separate else (self.read,)
        if not bool(self.made.squares.isfinite().all()):
            raise RmfxError(f"what {self.name!r} gives is not finite on the data, so it has no scale in int8")
        ranges = [(seen.low, seen.high) for seen in rounded]
        factors = best_factors(*_dense(self.second), ranges, self.read.squares / self.read.batches)
        _multiply(self.first.weight, factors)
        if self.first.bias is not None:
            _multiply(self.first.bias, factors)
        weight, groups = self.second.weight, _groups(self.second)
        rows = (1 / factors).reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
        _multiply(weight, rows)


def best_factors(largest: Tensor, squares: Tensor, ranges: Sequence[tuple[Tensor, Tensor]], power: Tensor) -> Tensor:
    """The powers of two that scale the channels between two layers best, by the estimate in the head of this file.

    Args:
        largest, squares: of the weights from each channel to each output, the largest size and the sum of squares,
            ``[O, C]``.
        ranges: smallest and largest number per channel ``[C]``, at most and at least 0, of each rounded tensor.
        power: mean square per channel ``[C]``.

    >>> weights = torch.tensor([[1.0, 0.05, 0.05]])
    >>> span = (torch.zeros(3), torch.ones(3))
    >>> best_factors(weights, weights.square(), [span], torch.full((3,), 0.3)).tolist()
    [1.0, 0.125, 0.125]
    """
    columns, reads = squares.sum(0), (largest > 0).to(power)

    def error(factors: Tensor) -> float:
        spans = [float((factors * high).amax() - (factors * low).amin()) ** 2 for low, high in ranges]
        steps = 2 * (largest / factors).amax(1)
        activations = sum(spans) * (columns / factors.square()).sum()
        weights = (steps.square() * (reads @ (factors.square() * power))).sum()
        return float(activations + _SYSTEMATIC * weights)

    share = (largest / largest.amax(1, keepdim=True).clamp(min=_TINY)).amax(0)
    logs = (torch.where(share > 0, p * share.log2().clamp(min=-_LARGEST), 0.0) for p in _POWERS)
    return min((log.round().exp2() for log in logs), key=error)


def _pairs(network: fx.GraphModule) -> Iterator[_Pair]:
    layers = dict(network.named_modules())
    called = Counter(str(node.target) for node in network.graph.nodes if node.op == "call_module")
    held = Counter(id(weight) for layer in layers.values() for weight in layer.parameters(recurse=False))
    own = {
        name: layer
        for name, layer in layers.items()
        if called[name] == 1 and all(held[id(weight)] == 1 for weight in layer.parameters(recurse=False))
    }
    for node in network.graph.nodes:
        first = own.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(first, _LINEAR):
            between, second = _reader(node, own)
            if second is not None and _share_channels(first, second):
                yield _Pair(node.name, first, second, any(isinstance(layer, _SEPARATE) for layer in between))


def _reader(node: fx.Node, own: dict[str, nn.Module]) -> tuple[list[nn.Module], Any]:
    """The homogeneous activations behind ``node``, and the linear layer that alone reads them, if it is one."""
    between: list[nn.Module] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        layer = own.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, (*_FUSED, *_SEPARATE)):
            return between, layer if isinstance(layer, _LINEAR) else None
        between.append(layer)
    return between, None


def _share_channels(first: Any, second: Any) -> bool:
    """Whether ``second`` reads as channels what ``first`` makes as channels: nn.Linear behind a conv reads columns."""
    return _axis(first) == _axis(second) and second.weight.shape[1] * _groups(second) == len(first.weight)


def _axis(layer: Any) -> int:
    """Of the channels, from the end: a batch may be missing."""
    return -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()


def _groups(layer: Any) -> int:
    return layer.groups if isinstance(layer, _CONVS) else 1


def _dense(layer: Any) -> tuple[Tensor, Tensor]:
    """Largest size and sum of squares of the weights from each channel to each output, ``[outputs, channels]``."""
    weight, groups = layer.weight.detach().double(), _groups(layer)
    parts = weight.reshape(*weight.shape[:2], -1).chunk(groups)
    return (
        torch.block_diag(*(part.abs().amax(2) for part in parts)),
        torch.block_diag(*(part.square().sum(2) for part in parts)),
    )


def _multiply(weight: Tensor, factors: Tensor) -> None:
    """Multiply the leading dimensions of ``weight`` in place; powers of two round nothing."""
    weight.data *= factors.to(weight.dtype).reshape(*factors.shape, *[1] * (weight.dim() - factors.dim()))
