"""Makes up for removed channels without training: least squares, layer by layer (He et al., 2017, eq. 1).

Of a layer with weights ``W``, ``X`` what it reads in the pruned network and ``Y`` what it gave in the whole one at the
channels that stayed,

    min over D of |Y - (W + D) X|^2 + r |D|^2        =>        D = (Y - W X) X^T (X X^T + r I)^-1

over positions of calibration images. Half of the images tell which ``r`` predicts the other half best; where none is
better than to leave a layer alone, it is left alone, so few images do no harm. Layers are taken in order, so each also
makes up for what is left of the errors in front of it. Where removing channels changed nothing, neither does this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rmfx.errors import RmfxError
from rmfx.graph.linear import CONVS
from rmfx.pruning.importance import Data

_RIDGES = (1e-10, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # choices of r, by the mean of the diagonal of X X^T
_POSITIONS = 64  # of each image, at most
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Reached(Exception):
    """A layer's input and output are known: the rest of the network need not run."""


def reconstruct(narrow: fx.GraphModule, whole: nn.Module, kept: Mapping[str, Tensor], data: Data) -> int:
    """Change the weights of ``narrow``, in place, so that each layer gives more nearly what it gave in ``whole``.

    Args:
        narrow: a pruned network in eval mode.
        whole: the network before pruning, with layers of the same names; left untouched.
        kept: by the names of convolutions and linear layers, in order: for each output channel that is left, which one
            of the whole layer it was, int64; -1 for one that is to stay as it is. Other layers stay as they are.
        data: pairs of what both networks take, a tensor or a tuple of them, and something that is not read.

    Returns:
        How many layers have changed.

    Raises:
        RmfxError: when there is no batch.

    >>> net = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval())
    >>> reconstruct(net, net, {"2": torch.arange(2)}, [(torch.randn(4, 3, 8, 8), None)])  # nothing is missing
    0
    """
    inputs = [batch if isinstance(batch, (tuple, list)) else (batch,) for batch, _ in data]
    if not inputs:
        raise RmfxError("reconstruction needs batches of calibration data: got none")
    done = 0
    for name, rows in kept.items():
        layers = narrow.get_submodule(name), whole.get_submodule(name)
        done += _solve(layers[0], _errors(layers, (narrow, whole), rows, inputs))
    return done


@dataclass(frozen=True, eq=False)
class _Moments:
    """``gram = X X^T`` and ``cross = (Y - W X) X^T`` of some positions, per group, in float64."""

    gram: Tensor
    cross: Tensor

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.gram + other.gram, self.cross + other.cross)

    def change(self, ridge: float) -> Tensor:
        """The best ``D`` for these positions, ``[groups, outputs, inputs]``."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        floor = ridge * diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        factor = torch.linalg.cholesky(self.gram + torch.diag_embed(floor.expand_as(diagonal)))
        return torch.cholesky_solve(self.cross.transpose(1, 2), factor).transpose(1, 2)

    def loss(self, change: Tensor) -> float:
        """The error that ``D`` leaves at these positions, over that of 0: ``tr(D G D^T) - 2 tr(D C^T)``."""
        return float((change @ self.gram * change).sum() - 2 * (change * self.cross).sum())


@torch.no_grad()
def _solve(layer: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Change ``layer`` by the best ``D``; ``pairs`` are what it reads, and what its output misses."""
    halves = _moments(layer, pairs)
    if len(halves) < 2:  # of a single image: nothing tells whether what fits it fits others
        return False
    losses = [halves[1].loss(halves[0].change(ridge)) for ridge in _RIDGES]
    best = min(range(len(losses)), key=losses.__getitem__)
    if not losses[best] < 0:
        return False
    change = (halves[0] + halves[1]).change(_RIDGES[best]).flatten(0, 1)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    change = change.to(weight)
    if isinstance(bias, Tensor):
        bias.add_(change[:, -1])
        change = change[:, :-1]
    weight.add_(change.reshape(weight.shape))
    return True


def _moments(layer: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[_Moments]:
    """Those of every other image, counted over all batches, and of the rest, if there are others."""
    groups, random = getattr(layer, "groups", 1), torch.Generator().manual_seed(0)
    found: tuple[list[_Moments], list[_Moments]] = [], []
    images = 0
    for read, missing in pairs:
        for half in range(min(2, len(read))):
            part = slice(half, None, 2)
            patches, wanted = _columns(layer, read[part]), _positions(layer, missing[part])
            chosen = torch.randperm(len(patches), generator=random)[: _POSITIONS * len(read[part])]
            patches, wanted = (x[chosen.to(x.device)].double().cpu() for x in (patches, wanted))
            if layer.bias is not None:
                patches = torch.cat([patches, torch.ones_like(patches[..., :1])], -1)
            gram = torch.einsum("pgi,pgj->gij", patches, patches)
            cross = torch.einsum("pgo,pgi->goi", wanted.unflatten(1, (groups, -1)), patches)
            found[(images + half) % 2].append(_Moments(gram, cross))
        images += len(read)
    return [reduce(add, half) for half in found if half]


def _errors(
    layers: tuple[nn.Module, nn.Module], networks: tuple[nn.Module, nn.Module], rows: Tensor, inputs: list[Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch, what the narrow layer reads, and what its output misses of the whole one's."""
    for given in inputs:
        (read, now), (_, then) = (_at(*which, given) for which in zip(layers, networks, strict=True))
        axis = then.dim() - 1 if isinstance(layers[0], nn.Linear) else 1
        known = (rows >= 0).to(now).reshape([-1 if dim == axis else 1 for dim in range(now.dim())])
        yield read, known * (then.index_select(axis, rows.clamp(min=0).to(then.device)) - now)


@torch.no_grad()
def _at(layer: nn.Module, network: nn.Module, inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """What ``layer`` reads and gives when the network is called."""
    found: list[Tensor] = []

    def note(_: nn.Module, read: tuple[Tensor, ...], output: Tensor) -> None:
        found.extend((read[0], output))
        raise _Reached

    handle = layer.register_forward_hook(note)
    try:
        with suppress(_Reached):
            network(*inputs)
    finally:
        handle.remove()
    return found[0], found[1]


def _columns(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer reads at each position: ``[positions, groups, inputs of a group x taps]``."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, 1, x.shape[-1])
    assert isinstance(layer, CONVS)
    dims, taps = len(layer.kernel_size), layer.weight[0, 0].numel()
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    pick = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(taps, 1, *layer.kernel_size)
    flat = x.reshape(-1, 1, *x.shape[2:])
    found = _CONV[dims](flat, pick, None, layer.stride, padding, layer.dilation)  # each tap as a channel
    found = found.reshape(len(x), layer.groups, -1, found.shape[2:].numel())
    return found.permute(0, 3, 1, 2).flatten(0, 1)


def _positions(layer: nn.Module, y: Tensor) -> Tensor:
    """``[positions, channels]``."""
    return y.reshape(-1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.flatten(2).transpose(1, 2).flatten(0, 1)
