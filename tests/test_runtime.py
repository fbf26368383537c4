"""Sessions run where they were asked to, or say why not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from rmfx.deploy import runtime
from rmfx.deploy.providers import Provider
from rmfx.errors import RmfxError, RuntimeUnavailableError


def two_inputs(operation: str = "Sub", element: int = TensorProto.FLOAT) -> bytes:
    """``z = x - y`` on vectors of any length."""
    entries = [helper.make_tensor_value_info(name, element, ["n"]) for name in "xyz"]
    graph = helper.make_graph([helper.make_node(operation, ["x", "y"], ["z"])], "g", entries[:2], entries[2:])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("optimise", [False, True])
def test_a_session_on_the_cpu(optimise: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(two_inputs())
    for source in (path, str(path), path.read_bytes()):
        session = runtime.session(source, "cpu", optimise)
        assert session.get_providers() == ["CPUExecutionProvider"]
        level = session.get_session_options().graph_optimization_level
        levels = onnxruntime.GraphOptimizationLevel
        assert level == (levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL)
        [z] = runtime.run(session, (torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([10.0, 30.0])))
        assert np.array_equal(z, np.array([-9, -28], np.float32))


def test_inputs_are_checked() -> None:
    session = runtime.session(two_inputs())
    x = torch.ones(2)
    with pytest.raises(RmfxError, match=r"the network takes 2 inputs \(x, y\), got 1"):
        runtime.run(session, (x,))
    with pytest.raises(RmfxError, match="onnxruntime failed: .*Unexpected input data type"):
        runtime.run(session, (x, x.double()))
    with pytest.raises(RmfxError, match="onnxruntime failed: .*BFloat16"):
        runtime.run(session, (x, x.bfloat16()))


@pytest.mark.parametrize("content", [b"", b"no network", two_inputs("NoSuchOperation")])
def test_a_broken_network_is_told(content: bytes) -> None:
    with pytest.raises(RmfxError, match="onnxruntime cannot run this network on cpu: "):
        runtime.session(content)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(RmfxError, match="doesn't exist"):
        runtime.session(tmp_path / "net.onnx")


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:", "cuda:x", "", "CUDA"])
def test_an_unknown_device(device: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match=f"unknown device '{device}': choose cpu, cuda, cuda:N, tensorrt"):
        runtime.session(two_inputs(), device)


@pytest.mark.parametrize(("device", "extra"), [("cpu", "cpu"), ("cuda", "gpu"), ("cuda:1", "gpu")])
def test_without_onnxruntime_the_extra_is_named(device: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # makes importing it fail
    with pytest.raises(RuntimeUnavailableError, match=rf"not installed .*: pip install 'rmfx\[{extra}\]'"):
        runtime.session(two_inputs(), device)


class FakeRuntime(SimpleNamespace):
    """An onnxruntime-gpu whose sessions do what ``start`` does."""

    def __init__(self, start: Any) -> None:
        self.asked: dict[str, Any] = {}

        def made(model: object, options: Any, providers: list[Any], enable_fallback: int) -> Any:
            self.asked.update(providers=providers, enable_fallback=enable_fallback, entries=options.entries)
            return start()

        super().__init__(
            get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
            SessionOptions=FakeOptions,
            GraphOptimizationLevel=onnxruntime.GraphOptimizationLevel,
            InferenceSession=made,
            preload_dlls=lambda: self.asked.update(preloaded=True),
        )


class FakeOptions(SimpleNamespace):
    def __init__(self) -> None:
        super().__init__(entries={})

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


def fails() -> None:
    raise ValueError("assigned to the default CPU EP, but fallback to CPU EP has been explicitly disabled\nmore")


def test_cuda_is_asked_for_without_any_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRuntime(lambda: SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"]))
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)  # type: ignore[arg-type]
    runtime.session(two_inputs(), "cuda:1")
    assert fake.asked == {
        "preloaded": True,
        "providers": [("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"})],
        "enable_fallback": 0,
        "entries": {"session.disable_cpu_ep_fallback": "1"},
    }


def test_a_session_that_fell_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRuntime(lambda: SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"]))
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)  # type: ignore[arg-type]
    with pytest.raises(RuntimeUnavailableError, match="asked .* for CUDAExecutionProvider, and it chose CPUExecution"):
        runtime.session(two_inputs(), "cuda")


@pytest.mark.parametrize(
    ("active", "error", "told"),
    [
        (False, RuntimeUnavailableError, "is installed, but does not start here: no libcudnn"),
        (True, RmfxError, "cannot run this network on cuda: assigned to the default CPU EP, .* disabled$"),
    ],
)
def test_a_dead_provider_is_told_from_an_unsupported_network(
    active: bool, error: type[RmfxError], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", FakeRuntime(fails))  # type: ignore[arg-type]
    monkeypatch.setattr(runtime, "probe", lambda: (Provider("CUDAExecutionProvider", active, "no libcudnn"),))
    with pytest.raises(error, match=told) as caught:
        runtime.session(two_inputs(), "cuda")
    assert type(caught.value) is error


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is here")
def test_cuda_without_its_package_is_an_error() -> None:
    with pytest.raises(RuntimeUnavailableError) as caught:
        runtime.session(two_inputs(), "cuda")
    assert "CUDAExecutionProvider is not active in this onnxruntime, which has " in str(caught.value)
    assert "CPUExecutionProvider" in str(caught.value) and "pip install 'rmfx[gpu]'" in str(caught.value)


@pytest.mark.gpu_runtime
def test_a_session_on_the_gpu() -> None:
    onnx.checker.check_model(two_inputs())
    session = runtime.session(two_inputs(), "cuda")
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    [z] = runtime.run(session, (torch.ones(3), torch.zeros(3)))
    assert np.array_equal(z, np.ones(3, np.float32))
