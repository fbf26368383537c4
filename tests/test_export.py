"""An exported file computes what torch computes, or there is no file."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn

import rmfx
from rmfx.deploy import onnx_check, runtime
from rmfx.deploy.export import export
from rmfx.errors import ExportError, RmfxError, RuntimeUnavailableError, UnsupportedModelError
from rmfx.front.tracer import Tracer
from rmfx.hostile import randomise
from rmfx.modules import ChannelAffine, ChannelClamp, MaskedActivation

export_module = importlib.import_module("rmfx.deploy.export")  # `rmfx.export` is the function


class Mixed(nn.Module):
    """The layers that conversions make, with two inputs and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        mask = torch.arange(8) % 2 == 0
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.masked, self.slopes = MaskedActivation(nn.SiLU(), mask), nn.PReLU(8)
        self.clamp = ChannelClamp(torch.where(mask, 0.0, -torch.inf), torch.where(mask, 6.0, torch.inf))
        self.scale = ChannelAffine(torch.randn(8), torch.randn(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        x = self.clamp(self.slopes(self.masked(self.norm(self.conv(x)))))
        x = self.scale(x) + x
        return {"features": x, "rest": (self.head(x.mean((2, 3))) - y, x.argmax(1))}


def mixed() -> tuple[fx.GraphModule, tuple[Tensor, Tensor]]:
    model = Mixed()
    inputs = (torch.randn(2, 3, 9, 7) * 8, torch.randn(2, 5))
    randomise(model, inputs)
    model.norm.weight.data *= 8  # reach the clamp
    return fx.GraphModule(model.eval(), Tracer().trace(model)), inputs


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_network_with_two_inputs_and_nested_outputs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    network, inputs = mixed()
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        path = export(network, tmp_path / "net.onnx", inputs)
    assert path == tmp_path / "net.onnx" and os.listdir(tmp_path) == ["net.onnx"]
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert not network.training
    model = onnx.load(path)
    dims = [entry.type.tensor_type.shape.dim[0].dim_param for entry in (*model.graph.input, *model.graph.output)]
    assert dims == ["batch"] * 5
    assert str(Path(__file__).parent).encode() not in path.read_bytes(), "paths of this machine are in the file"
    session = runtime.session(path)
    larger = (torch.randn(5, 3, 9, 7) * 8, torch.randn(5, 5))
    expected = network(*larger)
    for array, tensor in zip(runtime.run(session, larger), (expected["features"], *expected["rest"]), strict=True):
        assert np.allclose(array, tensor.detach().numpy(), rtol=1e-4, atol=1e-3)


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x) - 2 * y


def test_the_same_tensor_given_twice_is_two_inputs(tmp_path: Path) -> None:
    x, y = torch.randn(2, 2, 5)
    with rmfx.Session(export(Two().eval(), tmp_path / "two.onnx", (x, x))) as session:
        assert len(session.inputs) == 2 and torch.equal(session(x, y)[0], Two()(x, y))


@pytest.mark.parametrize("name", ["basic_projection", "inverted_relu6"])
def test_converted_networks(name: str, tmp_path: Path) -> None:
    model, x = nets.build(name)
    model, x = model.float(), x.float()
    converted = rmfx.convert(model, x)
    path = export(converted, tmp_path / "net.onnx", x)
    session = runtime.session(path)
    one = x[:1]
    truth = model.double()(one.double()).detach().numpy()
    [array] = runtime.run(session, (one,))
    assert np.abs(array - truth).max() < 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(2, 6, dtype=dtype)
    path = export(linear().to(dtype), tmp_path / "net.onnx", x)
    [array] = runtime.run(runtime.session(path), (x,))
    assert torch.from_numpy(array).dtype == dtype


def test_a_fixed_batch_and_an_opset(tmp_path: Path) -> None:
    path = export(linear(), tmp_path / "net.onnx", torch.randn(2, 6), dynamic_batch=False, opset=21)
    model = onnx.load(path)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [21]


def test_weights_of_a_large_network_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "SELF_CONTAINED_LIMIT", 1000)
    x = torch.randn(2, 300)
    model = nn.Linear(300, 5).eval()
    path = export(model, tmp_path / "net.onnx", x)
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]
    assert path.stat().st_size < 5000 < (tmp_path / "net.onnx.data").stat().st_size
    [array] = runtime.run(runtime.session(path), (x,))
    assert np.allclose(array, model(x).detach().numpy(), atol=1e-5)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusal(error: type[RmfxError], folder: Path, model: Any, inputs: Any, **options: Any) -> str:
    """The message of a refused export, which leaves ``folder`` as it was."""
    target = folder / "net.onnx"
    target.write_bytes(b"old")
    with pytest.raises(error) as caught:
        export(model, target, inputs, **options)
    assert os.listdir(folder) == ["net.onnx"] and target.read_bytes() == b"old"
    return str(caught.value)


def test_training_mode(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    told = refusal(UnsupportedModelError, tmp_path, linear().train(), x)
    assert told == "the network is in training mode: call .eval() before exporting"
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    model[1].train()
    assert "its '1' (BatchNorm1d) is in training mode" in refusal(UnsupportedModelError, tmp_path, model, x)


def test_not_a_module(tmp_path: Path) -> None:
    assert "takes an nn.Module, got str" in refusal(UnsupportedModelError, tmp_path, "resnet", torch.ones(1))


@pytest.mark.parametrize("inputs", [None, {"x": torch.ones(1)}, (), (torch.ones(1), 3)], ids=repr)
def test_inputs_that_are_no_tensors(inputs: Any, tmp_path: Path) -> None:
    assert "must be a tensor or a sequence of tensors" in refusal(ExportError, tmp_path, linear(), inputs)


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    told = refusal(ExportError, tmp_path, linear(), torch.randn(2, 7))
    assert told.startswith("the network does not run on the example inputs of shape (2, 7): mat1 and mat2")
    assert "has no dimensions" in refusal(ExportError, tmp_path, linear(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("path", "reason"),
    [("missing/net.onnx", "there is no folder"), (".", "it is a folder"), ("/proc/net.onnx", "cannot write")],
)
def test_a_path_that_cannot_be_written_is_told_before_any_work(
    path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("worked for nothing"))
    with pytest.raises(ExportError, match=reason):
        export(linear(), tmp_path / path, torch.randn(2, 6))
    assert os.listdir(tmp_path) == []


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.ones(2, 1)


class DependsOnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_a_network_that_fixes_the_batch_size(tmp_path: Path) -> None:
    told = refusal(ExportError, tmp_path, FixedBatch().eval(), torch.randn(2, 6))
    assert told.startswith("torch.onnx cannot export this network: ") and "static shape of 2" in told
    assert told.endswith("dynamic_batch=False fixes the batch size of the example inputs")
    assert export(FixedBatch().eval(), tmp_path / "net.onnx", torch.randn(2, 6), dynamic_batch=False).is_file()


def test_a_network_that_cannot_be_exported(tmp_path: Path) -> None:
    told = refusal(ExportError, tmp_path, DependsOnValues().eval(), torch.randn(2, 6))
    assert told.startswith("torch.onnx cannot export this network: ") and "step 1" not in told


def test_an_opset_that_cannot_be_had(tmp_path: Path) -> None:
    told = refusal(ExportError, tmp_path, linear(), torch.randn(2, 6), opset=9)
    assert "instead of 9" in told


def test_a_dtype_that_onnxruntime_lacks(tmp_path: Path) -> None:
    told = refusal(ExportError, tmp_path, nn.Conv2d(3, 4, 3).double().eval(), torch.randn(2, 3, 5, 5).double())
    assert "optimiser off: onnxruntime cannot run this network on cpu" in told and "check=False" in told


@pytest.mark.skipif("CUDAExecutionProvider" in runtime.require().get_available_providers(), reason="CUDA is here")
def test_cuda_that_is_not_there(tmp_path: Path) -> None:
    told = refusal(RuntimeUnavailableError, tmp_path, linear(), torch.randn(2, 6), device="cuda")
    assert "CUDAExecutionProvider is not active" in told


@pytest.mark.gpu_runtime
def test_the_check_runs_on_the_gpu(tmp_path: Path) -> None:
    network, inputs = mixed()
    assert export(network, tmp_path / "net.onnx", inputs, device="cuda").is_file()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_the_old_file(
    interruption: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise interruption

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", interrupted)
    expected = ExportError if isinstance(interruption, OSError) else KeyboardInterrupt
    told = refusal(expected, tmp_path, linear(), torch.randn(2, 6))  # type: ignore[arg-type]
    assert not isinstance(interruption, OSError) or "No space left on device; what was there before is unch" in told


# -- the comparison can fail -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network, inputs = mixed()
    return export(network, tmp_path_factory.mktemp("onnx") / "net.onnx", inputs, check=False)


def checked(path: Path, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    onnx_check.check_file(path, network, inputs, [True, True], "cpu")


def shift_weight(network: fx.GraphModule) -> None:
    network.conv.weight.data[3, 1, 1, 1] += 1e-3


def drop_bias(network: fx.GraphModule) -> None:
    network.scale.bias = None


def drop_clamp(network: fx.GraphModule) -> None:
    network.clamp.high.fill_(torch.inf)


def swap_channels(network: fx.GraphModule) -> None:
    network.head.weight.data[:, [0, 1]] = network.head.weight.data[:, [1, 0]]


def other_mask(network: fx.GraphModule) -> None:
    network.masked.mask[0] = False


def other_eps(network: fx.GraphModule) -> None:
    network.norm.eps = 1e-3


@pytest.mark.parametrize("change", [shift_weight, drop_bias, drop_clamp, swap_channels, other_mask, other_eps])
def test_a_file_of_another_network_is_found(change: Any, written: Path) -> None:
    torch.manual_seed(0)
    network, inputs = mixed()
    checked(written, network, inputs)
    change(network)
    with pytest.raises(ExportError, match=r"optimiser off, .*, output \d: the file computes .*, where float64 gives"):
        checked(written, network, inputs)


def test_a_mismatch_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really, other = torch.onnx.export, linear()
    monkeypatch.setattr(torch.onnx, "export", lambda model, inputs, **options: really(other, inputs, **options))
    told = refusal(ExportError, tmp_path, linear(), torch.randn(2, 6))
    assert "onnxruntime on cpu, optimiser off, the example inputs, output 0: the file computes" in told


class Outputs(nn.Module):
    def __init__(self, *outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(output(x) for output in self.outputs)


HALVES = torch.full((2, 6), -0.5)


@pytest.fixture(scope="module")
def two_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = Outputs(lambda x: x, lambda x: x > 0).eval()
    return export(network, tmp_path_factory.mktemp("onnx") / "net.onnx", HALVES, check=False)


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        ([lambda x: x], "the file has 2 outputs, the network 1"),
        ([lambda x: x.sum(1), lambda x: x > 0], "output 0: torch.float32 of shape (2, 6) from the file, torch.float32"),
        ([lambda x: x, lambda x: x.long()], "output 1: torch.bool of shape (2, 6) from the file, torch.int64"),
        ([lambda x: x, lambda x: x < 0], "output 1: 12 of 12 numbers differ"),
        ([lambda x: x / 0, lambda x: x > 0], "the network's output for the example inputs is not finite"),
        ([lambda x: x.exp().exp(), lambda x: x > 0], "the network overflows its dtype on inputs in ±12, so"),
        ([lambda x: x + (x + 1e9 - 1e9), lambda x: x > 0], "in torch.float32 this network computes noise"),
        ([lambda x: x @ torch.ones(6, 6), lambda x: x > 0], "the network does not run in float64"),
    ],
)
def test_outputs_that_do_not_fit(
    outputs: list[Any], told: str, two_outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_check, "AMPLITUDES", (12.0,))
    with pytest.raises(ExportError) as caught:
        onnx_check.check_file(two_outputs, Outputs(*outputs).eval(), (HALVES,), [True], "cpu")
    assert told in str(caught.value)


def test_a_network_that_overflows_is_tried_on_smaller_inputs(tmp_path: Path) -> None:
    network = Outputs(lambda x: x.exp().exp()).eval()
    assert not network(torch.tensor(12.0))[0].isfinite()
    assert export(network, tmp_path / "net.onnx", torch.ones(2, 6)).is_file()


def test_inputs_reach_beyond_the_clamps_and_keep_integers() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = onnx_check._drawn(torch.ones(2, 50), 3, 12.0, draw)
    assert noise.shape == (3, 50) and noise.min() < -6 and noise.max() > 6
    rows = onnx_check._drawn(torch.tensor([[1, 2], [3, 4]]), 3, 12.0, draw)
    assert rows.tolist() == [[1, 2], [3, 4], [1, 2]]
