"""Weights from files: what loads, and what is said when a file is missing, hostile or does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rmfx.errors import ModelNameError
from rmfx.weights import load_weights


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


STATE = {key: value + 3 for key, value in _net().state_dict().items()}


def _safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path.with_suffix(".safetensors"))


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".safetensors", _safetensors),
        (".pt", torch.save),
        (".pth", lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path)),
        (".pt", lambda state, path: torch.save({"model": state, "lr": 0.1}, path)),
        (".pt", lambda state, path: torch.save({f"module.{key}": value for key, value in state.items()}, path)),
    ],
    ids=["safetensors", "plain", "nested", "nested-model", "parallel"],
)
def test_loads_every_common_layout(tmp_path: Path, suffix: str, write: Callable[..., None]) -> None:
    path = tmp_path / f"weights{suffix}"
    write(STATE, path)
    net = _net()
    load_weights(net, path, "net")
    assert all(torch.equal(value, STATE[key]) for key, value in net.state_dict().items())


class _Hostile:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return pytest.fail, ("the file was executed",)


def _drop(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("1.")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_drop(STATE), "it lacks 1.bias, 1.num_batches_tracked, 1.running_mean and 2 more"),
        ({**STATE, "fc.weight": torch.zeros(2)}, "it has unknown fc.weight"),
        ({**STATE, "0.bias": torch.zeros(5)}, "0.bias has shape (5,), not (4,)"),
        ({}, "holds no state dict, neither at its top nor under state_dict or model"),
        ([1, 2], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({**STATE, 1: torch.ones(1)}, "holds no state dict"),
        ({**STATE, "0.bias": STATE["0.bias"].to_sparse()}, "0.bias is sparse, quantised or without data"),
        ({**STATE, "0.bias": STATE["0.bias"].to("meta")}, "0.bias is sparse, quantised or without data"),
        ({**STATE, "0.bias": STATE["0.bias"].to(torch.complex64)}, "0.bias is of torch.complex64, not torch.float32"),
        ({**STATE, "0.bias": STATE["0.bias"] > 0}, "0.bias is of torch.bool, not torch.float32"),
        ({**STATE, "0.bias": STATE["0.bias"].int()}, "0.bias is of torch.int32, not torch.float32"),
        ({**STATE, "0.bias": STATE["0.bias"] * torch.nan}, "0.bias holds NaN"),
        ({**STATE, "0.bias": STATE["0.bias"].double() * 1e39}, "0.bias holds numbers too large for torch.float32"),
    ],
    ids=lambda value: value.rpartition("0.bias ")[2] if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    net = _net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ModelNameError) as error:
        load_weights(net, path, "net")
    assert message in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_code_in_a_file_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(_Hostile()))
    with pytest.raises(ModelNameError, match="whole pickled models are refused, because loading one runs the code"):
        load_weights(_net(), path, "net")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_and_missing_files_are_errors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(ModelNameError, match="there is no weights file"):
        load_weights(_net(), path, "net")
    path.write_bytes(b"PK\x03\x04 not weights")
    with pytest.raises(ModelNameError, match="cannot be read as weights"):
        load_weights(_net(), path, "net")


def test_other_precisions_and_infinities_load(tmp_path: Path) -> None:
    state = {key: value.double() if value.is_floating_point() else value for key, value in STATE.items()}
    state["1.bias"] = torch.tensor([0, torch.inf, -torch.inf, 0.5], dtype=torch.bfloat16)
    torch.save(state, tmp_path / "weights.pt")
    net = _net()
    load_weights(net, tmp_path / "weights.pt", "net")
    assert net[1].bias.tolist() == [0, torch.inf, -torch.inf, 0.5]
    assert torch.equal(net[0].weight, STATE["0.weight"]) and net[0].weight.dtype == torch.float32


@pytest.mark.parametrize("content", [b"", b"hello", b"e", b"<html>", b"PK\x03\x04"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_another_kind(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelNameError, match="cannot be read as weights"):
        load_weights(_net(), path, "net")
