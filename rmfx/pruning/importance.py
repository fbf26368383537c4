"""How much each set of channels says: a number per set, the larger the dearer to lose.

* ``taylor``: what the loss would change, to first order, if the channel were the constant that is left of it
  (:mod:`rmfx.pruning.constants`): ``E[(sum g * (a - v))^2]`` over samples, with ``a`` what its readers read and ``g``
  the gradient there (Molchanov et al., 2019). It compares channels of all layers, and carried ones with new ones.
* ``bn``: the mean size of its scales in batch norms (network slimming, the paper's section 3.4).
* ``l1``, ``l2``: the mean size of its filters, in units of the mean of their layer (Li et al., 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rmfx.errors import RmfxError
from rmfx.graph.facts import module_of
from rmfx.graph.linear import map_of, mixes
from rmfx.ordinary import differentiable
from rmfx.pruning.constants import constants_of, scales_of
from rmfx.pruning.coupling import Coupling, is_group_wise

Importance = str | Callable[[fx.GraphModule, Coupling], Tensor]
Loss = Callable[[Any, Any], Tensor]
Data = Iterable[tuple[Any, Any]]


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of a classifier, summed over samples."""
    return F.cross_entropy(outputs, labels, reduction="sum")


def scores(
    gm: fx.GraphModule, coupling: Coupling, importance: Importance, data: Data | None = None, loss: Loss = cross_entropy
) -> Tensor:
    """A score for each set, float64 ``[count]``; infinite where the measure says nothing of it.

    Args:
        gm: in normal form; in the mode that the gradients are to be taken in.
        coupling: of it.
        importance: a measure; or a function of both that gives one number per set.
        data: for ``taylor``: pairs of what the network takes and what ``loss`` compares its answer with.
        loss: of outputs and such targets, summed over the samples of a batch.

    Raises:
        RmfxError: when the measure is unknown, needs data that is missing, finds nothing to measure, or gives NaN.
    """
    found = _measured(gm, coupling, importance, data, loss)
    if missing := int(found.isnan().sum()):
        raise RmfxError(
            f"importance {importance!r} gives NaN for {missing} of {coupling.count} sets of channels: there is NaN, or "
            "an overflow, in data, loss or weights"
        )
    return found


def _measured(gm: fx.GraphModule, coupling: Coupling, importance: Importance, data: Data | None, loss: Loss) -> Tensor:
    if callable(importance):
        found = importance(gm, coupling)
        if not isinstance(found, Tensor) or found.shape != (coupling.count,):
            got = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise RmfxError(f"importance must give a tensor of {coupling.count} numbers, one per set, got {got}")
        return found.detach().double().cpu()
    if importance == "taylor":
        if data is None:
            raise RmfxError("importance='taylor' needs data=, batches of (inputs, labels); 'l2' needs none")
        return _taylor(gm, coupling, data, loss)
    if importance == "bn":
        return _mean(coupling, _norm_scales(gm), "batch norm; convert with keep_bn=True, or choose another importance")
    if importance not in ("l1", "l2"):
        raise RmfxError(f"unknown importance {importance!r}: choose 'taylor', 'bn', 'l1', 'l2', or give a function")
    return _mean(coupling, _filter_sizes(gm, 1 if importance == "l1" else 2), "convolution or linear layer")


def _mean(coupling: Coupling, sizes: Iterable[tuple[fx.Node, Tensor]], what: str) -> Tensor:
    """The mean of what the nodes say of a set's channels."""
    total, seen = torch.zeros(2, coupling.count, dtype=torch.float64)
    for node, size in sizes:
        if (channels := coupling.channels.get(node)) is not None:
            total.index_add_(0, channels.sets, size.double().cpu())
            seen.index_add_(0, channels.sets, torch.ones(len(size), dtype=torch.float64))
    if not bool(seen.any()):
        raise RmfxError(f"the network has no {what}")
    return torch.where(seen > 0, total / seen.clamp(min=1), math.inf)


def _norm_scales(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Tensor]]:
    for node in gm.graph.nodes:
        module = module_of(node)
        if module is not None and (layer := scales_of(module)) is not None:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            yield node, weight.detach().abs()


def _filter_sizes(gm: fx.GraphModule, power: int) -> Iterator[tuple[fx.Node, Tensor]]:
    for node in gm.graph.nodes:
        if mixes(node):
            weight, _ = map_of(node).weights()
            size = weight.flatten(1).norm(power, dim=1)
            yield node, size / (size.mean() or 1.0)


def _taylor(gm: fx.GraphModule, coupling: Coupling, data: Data, loss: Loss) -> Tensor:
    constants = constants_of(gm, coupling, coupling.free)
    total, samples = torch.zeros(coupling.count, dtype=torch.float64), 0
    read: dict[fx.Node, Tensor] = {}
    with _recording(gm, coupling, read), torch.enable_grad():
        for batch in data:
            inputs, targets = differentiable(_pair(batch))
            read.clear()
            outputs = gm(*inputs) if isinstance(inputs, (tuple, list)) else gm(inputs)
            gradients = torch.autograd.grad(_one_number(loss(outputs, targets)), [*read.values()], allow_unused=True)
            found = {node: gradient for node, gradient in zip(read, gradients, strict=True) if gradient is not None}
            change = torch.zeros(len(next(iter(found.values()), ())), coupling.count, dtype=torch.float64)
            for node, gradient in found.items():
                source = node.all_input_nodes[0]
                channels, value = coupling.channels[source], read[node].detach()
                change.index_add_(1, channels.sets, _change(value, gradient, channels.axis, constants[source]))
            total += change.square().sum(0)
            samples += len(change)
    if not samples:
        raise RmfxError("data holds no batch, or the loss does not depend on the network")
    return total / samples


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise RmfxError(f"data must hold pairs of inputs and labels, got a {type(batch).__name__}")
    return batch[0], batch[1]


def _one_number(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise RmfxError(f"loss must give one number, summed over the samples of a batch, got {got}")
    if not loss.requires_grad:
        raise RmfxError("the loss does not depend on the network: no gradient leads from it to the layers")
    return loss


def _change(value: Tensor, gradient: Tensor, axis: int, constants: Tensor) -> Tensor:
    """To first order, what the loss of each sample changes when a channel becomes its constant, ``[N, C]``."""
    constants = constants.nan_to_num().to(value)
    shape = [1] * value.dim()
    shape[axis] = -1
    product = gradient * (value - constants.reshape(shape))
    rest = [dim for dim in range(1, value.dim()) if dim != axis]
    return (product.sum(rest) if rest else product).double().cpu()


@contextmanager
def _recording(gm: fx.GraphModule, coupling: Coupling, read: dict[fx.Node, Tensor]) -> Iterator[None]:
    """Note what every layer that mixes channels reads, as a tensor of its own in the graph of gradients."""

    def note(node: fx.Node, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        value = inputs[0].view_as(inputs[0])
        read[node] = value if value.requires_grad else value.detach().requires_grad_()
        return (read[node],)

    nodes = [node for node in gm.graph.nodes if mixes(node) and not is_group_wise(node)]
    known = [node for node in nodes if node.all_input_nodes[0] in coupling.channels]
    handles = []
    try:
        for node in known:
            module = module_of(node)
            assert module is not None
            handles.append(module.register_forward_pre_hook(partial(note, node)))
        yield
    finally:
        for handle in handles:
            handle.remove()
