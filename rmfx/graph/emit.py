"""Turns a planned graph into a network that owns its weights: every map is computed once, in float64, rounded once.

Until here new layers are shapes on the meta device and untouched layers share tensors with the user's model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rmfx.algebra import kernels
from rmfx.algebra.affine import Affine
from rmfx.algebra.exact import exact, forget, is_rounded
from rmfx.algebra.grid import layer_grid
from rmfx.graph.facts import module_of

UNTOUCHED = "untouched"  # node.meta: the layer or tensor of the user's model that a node still names


@dataclass(frozen=True)
class Storage:
    """How the weights of one layer are held: dtype, device, whether they train, memory format."""

    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    channels_last: bool


def storage_table(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor of the normalised network by name: what new layers take dtype, device and format from."""
    return dict(gm.state_dict(keep_vars=True))


def emit(gm: fx.GraphModule, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Give every layer of ``gm`` tensors of its own, in place; may be called again for another ``dtype``.

    Args:
        gm: a graph whose new layers have an :class:`rmfx.algebra.affine.Affine` in ``node.meta["affine"]``.
        tensors: the network's tensors before the passes ran (:func:`storage_table`).
        dtype: of all floating tensors; by default each layer has that of the layers it is made of.
    """
    fallback = _storage(tensors.values(), dtype)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            _own_tensor(gm, node, dtype)
        module = module_of(node)
        if module is None:
            continue
        affine = node.meta.get("affine")
        if affine is None:
            _own(gm, node, module, fallback, dtype)
            continue
        sources = [tensors[name] for name in sorted(affine.sources) if name in tensors]
        storage = _storage(sources, dtype) if sources else fallback
        if storage.device.type != "meta":
            _fill(module, affine, storage)


def _fill(layer: nn.Module, affine: Affine, storage: Storage) -> None:
    grid, where = layer_grid(affine.grid)
    weight, bias = affine.compute(storage.dtype)
    weight = kernels.spread(weight, grid.kernel, where.slices(affine.grid.kernel))
    layer.register_parameter("weight", _parameter(weight, storage))
    layer.register_parameter("bias", None if bias is None else _parameter(bias.to(storage.dtype), storage))


def _parameter(tensor: Tensor, storage: Storage) -> nn.Parameter:
    four_dimensional = storage.channels_last and tensor.dim() == 4
    layout = torch.channels_last if four_dimensional else torch.contiguous_format
    owned = tensor.detach().to(storage.device).contiguous(memory_format=layout)
    if owned.untyped_storage().nbytes() != owned.numel() * owned.element_size():
        owned = owned.clone(memory_format=layout)
    return nn.Parameter(owned, requires_grad=storage.requires_grad)


def _own(gm: fx.GraphModule, node: fx.Node, module: nn.Module, fallback: Storage, dtype: torch.dtype | None) -> None:
    """Copy an untouched layer; give one that a pass has made the dtype and device of the layer it reads."""
    if "made" not in node.meta:
        untouched = node.meta.setdefault(UNTOUCHED, module)
        own = copy.deepcopy(untouched).to(dtype)
        for tensor, original in zip(tensors_of(own), tensors_of(untouched), strict=True):
            forget(tensor)
            if dtype == torch.float64 and is_rounded(original):
                tensor.data = exact(original)
        gm.set_submodule(str(node.target), own)
    elif fallback.device.type != "meta":
        near = _nearest_weight(node)
        module.to(near.device, near.dtype) if near is not None else module.to(fallback.device, fallback.dtype)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in a fixed order."""
    return [*module.parameters(), *module.buffers()]


def _own_tensor(gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype | None) -> None:
    owner, _, attribute = str(node.target).rpartition(".")
    holder = gm.get_submodule(owner)
    tensor = node.meta.setdefault(UNTOUCHED, getattr(holder, attribute))
    if not isinstance(tensor, Tensor):
        return
    if dtype == torch.float64 and is_rounded(tensor):
        own = exact(tensor).clone()
    else:
        own = tensor.detach().clone().to(dtype if tensor.is_floating_point() else tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        setattr(holder, attribute, nn.Parameter(own, requires_grad=tensor.requires_grad))
    else:
        holder.register_buffer(attribute, own, persistent=attribute not in holder._non_persistent_buffers_set)


def _nearest_weight(node: fx.Node) -> Tensor | None:
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        weight = getattr(module_of(node), "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight
    return None


def _storage(tensors: Iterable[Tensor], dtype: torch.dtype | None) -> Storage:
    """The storage of the largest floating tensor; trainable where any is."""
    floating = [t for t in tensors if t.is_floating_point()]
    if not floating:
        return Storage(dtype or torch.get_default_dtype(), torch.device("cpu"), False, False)
    largest = max(floating, key=lambda t: t.numel())
    images = [t for t in floating if t.dim() == 4]
    channels_last = bool(images) and all(t.is_contiguous(memory_format=torch.channels_last) for t in images)
    return Storage(
        dtype or largest.dtype,
        largest.device,
        any(t.requires_grad for t in floating),
        channels_last and any(not t.is_contiguous() for t in images),
    )
