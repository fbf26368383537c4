"""Which execution providers of onnxruntime really start here, as opposed to being listed."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import onnx
from onnx import TensorProto, helper

_REMOTE = {"AzureExecutionProvider"}  # runs nothing on this machine


@dataclass(frozen=True)
class Provider:
    """One execution provider: ``active`` when a session really ran on it, else the ``reason`` why not."""

    name: str
    active: bool
    reason: str | None = None


def probe() -> tuple[Provider, ...]:
    """Run a one-node network on every local provider that the installed onnxruntime lists.

    Returns:
        one entry per provider; empty when onnxruntime is not installed.

    >>> [provider.active for provider in probe() if provider.name == "CPUExecutionProvider"]
    [True]
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    runtime = importlib.import_module("onnxruntime")
    listed = [name for name in runtime.get_available_providers() if name not in _REMOTE]
    if "CUDAExecutionProvider" in listed:
        runtime.preload_dlls()  # finds the CUDA libraries that pip installed
    return tuple(_try(runtime, name) for name in listed)


def _try(runtime: ModuleType, name: str) -> Provider:
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(_one_relu(), options, providers=[name], enable_fallback=0)
        session.run(None, {"x": np.zeros(1, np.float32)})
    except Exception as error:  # onnxruntime raises its own classes, and RuntimeError, and ValueError
        return Provider(name, False, next(iter(str(error).splitlines()), type(error).__name__))
    active = session.get_providers()[0] == name
    return Provider(name, active, None if active else f"the session ran on {session.get_providers()[0]} instead")


def _one_relu() -> bytes:
    shape = [1]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
