"""Sessions of onnxruntime that run where they were asked to, or not at all.

By default onnxruntime moves to the CPU whatever an execution provider cannot do: the whole session when the provider
does not start, single operators when it lacks them. Here both are errors.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from rmfx.deploy.providers import probe
from rmfx.errors import RmfxError, RuntimeUnavailableError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_DEVICE = re.compile(r"(?P<kind>cpu|cuda|tensorrt)(:(?P<index>\d+))?")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_SILENT = 4  # log only what is fatal: every error reaches the caller as an exception


def session(
    path_or_bytes: str | os.PathLike[str] | bytes,
    device: str = "cpu",
    optimise: bool = True,
    *,
    threads: int | None = None,
    tf32: bool = False,
    graphs: bool = False,
) -> InferenceSession:
    """An ``onnxruntime.InferenceSession`` on ``device``, with no fallback to another one.

    Args:
        path_or_bytes: an ONNX file, or its contents.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"tensorrt"`` or ``"tensorrt:1"``.
        optimise: let onnxruntime rewrite the graph; ``False`` runs the file node by node as it stands.
        threads: of one operator on the CPU; ``None`` for one per core.
        tf32: let CUDA compute float32 in TF32, which reads 10 bits of each mantissa; without it, in IEEE float32.
            TensorRT uses TF32 as it likes: its provider has no switch for it.
        graphs: record the work as a CUDA graph and replay it; needs IO binding with buffers that stay where they are.

    Raises:
        RuntimeUnavailableError: when onnxruntime is not installed, or ``device`` is not active in it.
        RmfxError: when the file is no network that onnxruntime can run on ``device``.
    """
    kind, index = parse(device)
    runtime = require(device)
    options = runtime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads or 0
    level = runtime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    providers: list[Any] = ["CPUExecutionProvider"]
    if kind != "cpu":
        # The CPU provider must not be listed: naming it contradicts forbidding the fallback to it.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        switches = {"use_tf32": str(int(tf32))} if kind == "cuda" else {}
        switches |= {"enable_cuda_graph": "1"} if graphs else {}
        providers = [(_PROVIDERS[kind], {"device_id": index, **switches})]
    model = path_or_bytes if isinstance(path_or_bytes, bytes) else os.fspath(path_or_bytes)
    try:
        made = runtime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as problem:  # onnxruntime raises a class of its own for each status code, and RuntimeError
        _demand_active(_PROVIDERS[kind])
        raise RmfxError(f"onnxruntime cannot run this network on {device}: {first_line(problem)}") from problem
    active = made.get_providers()[0]
    if active != _PROVIDERS[kind]:
        raise RuntimeUnavailableError(f"asked onnxruntime for {_PROVIDERS[kind]}, and it chose {active}")
    return made


def run(session: InferenceSession, inputs: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
    """Run ``session`` on positional ``inputs``; one array per output.

    Raises:
        RmfxError: for a wrong number, shape or dtype of inputs, and for what fails inside.
    """
    names = [item.name for item in session.get_inputs()]
    if len(names) != len(inputs):
        raise RmfxError(f"the network takes {len(names)} inputs ({', '.join(names)}), got {len(inputs)}")
    try:
        feed = {name: value.detach().cpu().numpy() for name, value in zip(names, inputs, strict=True)}
        return list(session.run(None, feed))
    except Exception as problem:  # as above; numpy raises TypeError for dtypes it lacks
        raise RmfxError(f"onnxruntime failed: {first_line(problem)}") from problem


def require(device: str = "cpu") -> ModuleType:
    """The onnxruntime package, proven to have ``device``.

    Raises:
        RuntimeUnavailableError: naming what is missing and the command that installs it.

    >>> require("tpu")
    Traceback (most recent call last):
        ...
    rmfx.errors.RuntimeUnavailableError: unknown device 'tpu': choose cpu, cuda, cuda:N, tensorrt or tensorrt:N
    """
    kind, _ = parse(device)
    extra = "cpu" if kind == "cpu" else "gpu"
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError as problem:
        raise RuntimeUnavailableError(
            f"onnxruntime is not installed ({problem}): pip install 'rmfx[{extra}]'"
        ) from problem
    if kind != "cpu" and hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()  # finds the CUDA libraries that pip installed
    available = runtime.get_available_providers()
    if _PROVIDERS[kind] not in available:
        raise RuntimeUnavailableError(
            f"{_PROVIDERS[kind]} is not active in this onnxruntime, which has {', '.join(available)}: "
            f"pip uninstall onnxruntime, then pip install 'rmfx[{extra}]'"
        )
    return runtime


def _demand_active(name: str) -> None:
    """Raise when the provider does not start for any network, for want of a GPU or of its libraries."""
    for provider in probe():
        if provider.name == name and not provider.active:
            raise RuntimeUnavailableError(f"{name} is installed, but does not start here: {provider.reason}")


def parse(device: str) -> tuple[str, str]:
    """Kind and index of a device.

    Raises:
        RuntimeUnavailableError: for one that onnxruntime is not asked for here.

    >>> parse("cuda:1")
    ('cuda', '1')
    """
    match = _DEVICE.fullmatch(device)
    if match is None or (match["kind"] == "cpu" and match["index"]):
        raise RuntimeUnavailableError(f"unknown device {device!r}: choose cpu, cuda, cuda:N, tensorrt or tensorrt:N")
    return match["kind"], match["index"] or "0"


def first_line(problem: Exception) -> str:
    """The first line of a message; onnxruntime appends where in its sources it failed."""
    return next(iter(str(problem).splitlines()), type(problem).__name__)
