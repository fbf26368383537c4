"""Load a state dict from a file into a network, strictly, and say precisely what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rmfx.errors import ModelNameError

_NESTS = ("state_dict", "model")  # keys under which checkpoints commonly hold their state dict
_PARALLEL = "module."  # prefix that DistributedDataParallel puts before every name
_SHOWN = 3


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Load the state dict in ``path`` into ``model``; every name and shape must match, and every number fit.

    Args:
        model: changed in place.
        path: a ``.safetensors`` file, or a ``.pt`` or ``.pth`` file, read with ``weights_only=True`` so that
            nothing in it is executed. A state dict under ``"state_dict"`` or ``"model"`` is found, and the
            prefix ``module.`` of parallel training is removed.
        name: of the network, for messages.

    Raises:
        ModelNameError: when the file cannot be read or does not fit.
    """
    state = _unwrap(_read(path), path)
    expected = model.state_dict()
    _check_names("lacks", expected.keys() - state.keys(), path, name)
    _check_names("has unknown", state.keys() - expected.keys(), path, name)
    for key, value in state.items():
        if problem := _misfit(value, expected[key]):
            raise ModelNameError(f"{path} does not fit {name}: {key} {problem}")
    model.load_state_dict(state)


def _misfit(value: Tensor, wanted: Tensor) -> str | None:
    """Why ``value`` cannot be meant for ``wanted``: torch would cast whatever it gets."""
    if value.shape != wanted.shape:
        return f"has shape {tuple(value.shape)}, not {tuple(wanted.shape)}"
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "is sparse, quantised or without data, and no plain tensor"
    if value.is_complex() != wanted.is_complex() or (wanted.is_floating_point() and not value.is_floating_point()):
        return f"is of {value.dtype}, not {wanted.dtype}"
    if not wanted.is_floating_point():
        return None
    exact, cast = value.double(), value.to(wanted.dtype)
    if bool(exact.isnan().any()):
        return "holds NaN"
    return f"holds numbers too large for {wanted.dtype}" if not torch.equal(exact.isinf(), cast.isinf()) else None


def _read(path: Path) -> object:
    if not path.is_file():
        raise ModelNameError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers of both formats raise many classes on files of other kinds
        raise ModelNameError(
            f"{path} cannot be read as weights: give a .safetensors file, or a .pt file that holds only a state "
            "dict (whole pickled models are refused, because loading one runs the code in it)"
        ) from error


def _unwrap(data: object, path: Path) -> dict[str, Tensor]:
    for key in _NESTS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not data or not all(map(_is_entry, data.items())):
        raise ModelNameError(f"{path} holds no state dict, neither at its top nor under {' or '.join(_NESTS)}")
    prefix = _PARALLEL if all(key.startswith(_PARALLEL) for key in data) else ""
    return {key.removeprefix(prefix): value for key, value in data.items()}


def _is_entry(entry: tuple[object, object]) -> bool:
    return isinstance(entry[0], str) and isinstance(entry[1], Tensor)


def _check_names(verb: str, keys: set[str], path: Path, name: str) -> None:
    if not keys:
        return
    shown = sorted(keys)[:_SHOWN]
    more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
    raise ModelNameError(f"{path} does not fit {name}: it {verb} {', '.join(shown)}{more}")
