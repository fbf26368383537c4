"""A network and its inputs as one call without arguments, in each runtime."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmfx.deploy.export import export
from rmfx.deploy.quantise import quantise
from rmfx.deploy.session import Session
from rmfx.measure.paired import Call
from rmfx.measure.target import Target
from rmfx.quiet import quiet


def runner(model: nn.Module, inputs: Sequence[Tensor], target: Target, *, draft: bool = False) -> Call:
    """A call that runs ``model`` once on ``inputs`` on ``target`` and returns when the work is done.

    Args:
        model: in eval mode; where it is not on the device of ``target``, a copy of it there is what runs.
        inputs: positional tensors; copied there, too. They are what int8 is calibrated on: latency does not depend on
            scales.
        draft: for ONNX files, export by torch's older exporter, which takes milliseconds: enough to time a few plain
            layers that nobody will deploy.

    Raises:
        RuntimeUnavailableError: when the device or onnxruntime is missing.
        ExportError: when the network has no ONNX form.

    >>> runner(nn.ReLU(), (torch.zeros(2),), Target("eager"))()
    tensor([0., 0.])
    """
    values = tuple(inputs)
    if target.runtime.startswith("onnxruntime"):
        return _session(model, values, target, draft)
    model, values = _on(target.device, model), tuple(value.to(target.device) for value in values)
    call = _bound(model if target.runtime == "eager" else _compiled(model), values)
    return call if target.threads is None else _held_to(call, target.threads)


def _on(device: str, model: nn.Module) -> nn.Module:
    """``model`` on ``device``; the caller's stays where it is."""
    there = {torch.empty(0, device=device).device}  # with its number
    homes = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return model if homes <= there else copy.deepcopy(model).to(device)


def _compiled(model: nn.Module) -> Callable[..., Any]:
    """``model`` compiled with its weights as constants.

    ``options={"freezing": True}`` comes too late for Dynamo, which has then made inputs of the weights: it changes
    nothing, and the network is half as fast. So the switch itself is on while the first call compiles.
    """
    # the stubs of torch 2.13 do not know isolate_recompiles yet: networks of one class must not share a limit
    compiled: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]
        model, isolate_recompiles=True, dynamic=False
    )
    freezing = all(
        parameter.dtype is not torch.float64 for parameter in model.parameters()
    )  # torch 2.13 fails on these
    is_first = True

    def call(*inputs: Tensor) -> Any:
        nonlocal is_first
        if not is_first:
            return compiled(*inputs)
        is_first = False
        with torch._inductor.config.patch(freezing=freezing):
            return compiled(*inputs)

    return call


def _session(model: nn.Module, inputs: tuple[Tensor, ...], target: Target, draft: bool) -> Call:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        if draft:
            with quiet():
                torch.onnx.export(model, inputs, path, dynamo=False)
        else:
            export(model, path, inputs, check=False, dynamic_batch=False)
        if target.runtime == "onnxruntime-int8":
            path = quantise(path, path.with_suffix(".int8.onnx"), [inputs]).path
        return session_call(path, inputs, target)


def session_call(path: str | Path, inputs: Sequence[Tensor], target: Target) -> Call:
    """A call that runs an ONNX file in onnxruntime, on tensors that lie on its device."""
    session = Session(path, target.device, threads=target.threads)
    return session.bound(*(value.to(session.device) for value in inputs))


def _bound(model: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Call:
    wait = torch.cuda.synchronize if inputs and inputs[0].is_cuda else None

    def call() -> object:
        with torch.inference_mode():
            result = model(*inputs)
        if wait is not None:
            wait()
        return result

    return call


def _held_to(call: Call, threads: int) -> Call:
    """``call`` with torch held to so many threads."""

    def held() -> object:
        with _threads(threads):
            return call()

    return held


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
