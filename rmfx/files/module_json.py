"""The tree of modules and tensors under a GraphModule as JSON, and back.

Two flat lists. Modules, parents first: ``{"name": "layer1.0.conv", "training": false, "layer": {...}}``, where
``layer`` is ``null`` for a container that only holds others. Tensors: ``{"name": "layer1.0.conv.weight", "kind":
"parameter", "requires_grad": true, "memory_format": null, "same_as": null}``; their values, dtypes and shapes are kept
under the same name in the tensor part of the file, except those that are the ``same_as`` an earlier one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rmfx.errors import FileFormatError
from rmfx.files.layer_json import decode_layer, encode_layer, is_layer, slots
from rmfx.files.values import Json, check_path, fields, shorten

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by rank
_BY_NAME = {str(memory_format): (rank, memory_format) for rank, memory_format in _FORMATS.items()}
_NONE = type(None)
_MODULE_FIELDS = {"name": str, "training": bool, "layer": (dict, _NONE)}
_TENSOR_FIELDS = {
    "name": str,
    "kind": str,
    "requires_grad": bool,
    "memory_format": (str, _NONE),
    "same_as": (str, _NONE),
}


def encode_modules(root: nn.Module, called: Collection[str]) -> list[Json]:
    """Every module below ``root``; ``called`` are those that the graph calls.

    Raises:
        FileFormatError: when a called module is no layer of the file format, or was tampered with.
    """
    entries: list[Json] = []
    inner: set[str] = set()  # layers and what lies inside them
    for name, module in root.named_modules(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if not name or owner in inner:
            inner |= {name} - {""}
            continue
        check_path(name)
        layer = _encode_layer(name, module) if is_layer(module) or name in called else None
        entries.append({"name": name, "training": module.training, "layer": layer})
        inner |= {name} if layer else set()
    return entries


def encode_tensors(root: nn.Module) -> tuple[list[Json], dict[str, Tensor]]:
    """The table of all tensors below ``root``, and their values: on the CPU, contiguous, no two sharing memory.

    Raises:
        FileFormatError: for tensors without plain values (meta, sparse, quantised).
    """
    entries: list[Json] = []
    values: dict[str, Tensor] = {}
    first: dict[tuple[int, str], str] = {}
    for name, kind, tensor in _all_tensors(root):
        check_path(name)
        same_as = first.setdefault((id(tensor), kind), name)
        entry = {"name": name, "kind": kind, "requires_grad": tensor.requires_grad, "memory_format": _format(tensor)}
        entries.append({**entry, "same_as": None if same_as == name else same_as})
        if same_as == name:
            values[name] = _plain(name, tensor)
    return entries, _unshared(values)


def attach(root: nn.Module, modules: list[Any], table: list[Any], values: Mapping[str, Tensor]) -> None:
    """Build under ``root`` what :func:`encode_modules` and :func:`encode_tensors` described.

    Raises:
        FileFormatError: when the lists are malformed, collide, or do not match the values.
    """
    containers = {""}
    expected: dict[str, str] = {}
    for entry in modules:
        name, training, layer = fields(entry, "module", _MODULE_FIELDS)
        module = nn.Module() if layer is None else decode_layer(layer)
        _add_module(root, name, module.train(training), containers)
        if layer is None:
            containers.add(name)
        expected |= {f"{name}.{slot}": kind for slot, kind in slots(module).items()}
    made: dict[str, Tensor] = {}
    for entry in table:
        name, *rest = fields(entry, "tensor", _TENSOR_FIELDS)
        made[name] = _make(name, made, values, *rest)
        _place(root, name, entry["kind"], made[name], expected.pop(name, None), containers)
    surplus = values.keys() - made.keys()
    if expected or surplus:
        raise FileFormatError(f"the tensor {sorted(expected.keys() | surplus)[0]!r} is {_plight(expected)}")


def _plight(expected: Mapping[str, str]) -> str:
    return "missing" if expected else "no part of the network"


def _encode_layer(name: str, module: nn.Module) -> dict[str, Json]:
    try:
        return encode_layer(module)
    except FileFormatError as problem:
        raise FileFormatError(f"cannot be saved: module {name!r}: {problem}") from problem


def _all_tensors(root: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in root.named_parameters(remove_duplicate=False):
        yield name, "parameter", parameter
    for name, buffer in root.named_buffers(remove_duplicate=False):
        owner, _, key = name.rpartition(".")
        passing = key in root.get_submodule(owner)._non_persistent_buffers_set
        yield name, "temporary" if passing else "buffer", buffer


def _plain(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        raise FileFormatError(
            f"cannot be saved: tensor {name!r} has no plain values ({tensor.layout}, {tensor.dtype}, {tensor.device})"
        )
    return tensor.detach().cpu().contiguous()


def _unshared(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy each tensor that views memory of an earlier one: a safetensors file has no views."""
    seen: set[int] = set()
    for name, value in values.items():
        address = value.untyped_storage().data_ptr()
        values[name] = value.clone() if address in seen else value
        seen.add(address)
    return values


def _format(tensor: Tensor) -> str | None:
    """The memory format to restore, ``None`` for the ordinary one."""
    wanted = _FORMATS.get(tensor.dim())
    if wanted is None or tensor.stride() == _strides(tensor, torch.contiguous_format):
        return None
    return str(wanted) if tensor.stride() == _strides(tensor, wanted) else None


def _strides(tensor: Tensor, memory_format: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()


def _make(
    name: str,
    made: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    kind: str,
    requires_grad: bool,
    memory_format: str | None,
    same_as: str | None,
) -> Tensor:
    if name in made or (same_as is not None and same_as not in made) or (same_as is None and name not in values):
        raise FileFormatError(f"the tensor {name!r} is missing, or listed twice")
    if same_as is not None:
        return made[same_as]
    value = values[name]
    if memory_format is not None:
        value = _restored(name, value, memory_format)
    if requires_grad and not value.is_floating_point():
        raise FileFormatError(f"the tensor {name!r} of {value.dtype} cannot require gradients")
    return nn.Parameter(value, requires_grad) if kind == "parameter" else value.requires_grad_(requires_grad)


def _restored(name: str, value: Tensor, memory_format: str) -> Tensor:
    rank, wanted = _BY_NAME.get(memory_format, (None, None))
    if rank != value.dim():
        raise FileFormatError(f"the tensor {name!r} of shape {tuple(value.shape)} cannot be {memory_format!r}")
    return torch.empty(value.shape, dtype=value.dtype, device=value.device, memory_format=wanted).copy_(value)


def _add_module(root: nn.Module, name: str, module: nn.Module, containers: Collection[str]) -> None:
    owner, key = check_path(name)
    if owner not in containers:
        raise FileFormatError(f"there is no container {owner!r} for the module {name!r}")
    parent = root.get_submodule(owner)
    if hasattr(parent, key):
        raise FileFormatError(f"the module name {name!r} is taken")
    parent.add_module(key, module)


def _place(
    root: nn.Module, name: str, kind: str, tensor: Tensor, slot: str | None, containers: Collection[str]
) -> None:
    """Put ``tensor`` where its name says: into the ``slot`` of a layer, or freshly into a container."""
    owner, key = check_path(name)
    kinds = ("parameter", "buffer", "temporary") if slot is None else (slot,)
    if kind not in kinds or isinstance(tensor, nn.Parameter) != (kind == "parameter"):
        raise FileFormatError(f"the tensor {name!r} cannot be a {shorten(kind)}")
    if slot is not None:
        _fill(root.get_submodule(owner), key, name, tensor)
        return
    if owner not in containers:
        raise FileFormatError(f"there is no place for the {kind} {name!r}")
    parent = root.get_submodule(owner)
    if hasattr(parent, key):
        raise FileFormatError(f"the tensor name {name!r} is taken")
    if isinstance(tensor, nn.Parameter):
        parent.register_parameter(key, tensor)
        return
    parent.register_buffer(key, tensor, persistent=kind == "buffer")


def _fill(layer: nn.Module, key: str, name: str, tensor: Tensor) -> None:
    slot = getattr(layer, key)
    same_sort = slot.dtype == tensor.dtype or (slot.is_floating_point() and tensor.is_floating_point())
    if slot.shape != tensor.shape or not same_sort:
        raise FileFormatError(
            f"the tensor {name!r} is a {tensor.dtype} of shape {tuple(tensor.shape)}, "
            f"where the layer has a {slot.dtype} of shape {tuple(slot.shape)}"
        )
    setattr(layer, key, tensor)
