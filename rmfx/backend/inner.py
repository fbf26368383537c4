"""The back end behind rmfx: what it makes of graphs as Dynamo recorded them, and of converted ones."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.codecache import PyCodeCache

from rmfx.backend.settings import Settings
from rmfx.measure.paired import compare

Run = Callable[..., Any]

_PAIRS = 9  # of calls, to decide whether weights are to be constants


def compile_as_is(gm: fx.GraphModule, inputs: list[Any], settings: Settings) -> Run:
    """Dynamo's graph, compiled as if rmfx were not there; to be called while Dynamo compiles."""
    options = dict(settings.inner_options)
    if settings.inner == "inductor":
        return torch._TorchCompileInductorWrapper(None, options, None)(gm, inputs)
    return lookup_backend(settings.inner)(gm, inputs, **({"options": options} if options else {}))


def compile_later(gm: fx.GraphModule, settings: Settings) -> Run:
    """The same, when Dynamo has done with it: at its first call."""
    again = fx.GraphModule(gm, gm.graph)
    return torch.compile(again, backend=settings.inner, options=dict(settings.inner_options) or None)


class Freezing:
    """Whether Inductor makes constants of weights: as it is told, or else whatever is faster on the first call.

    Frozen convolutions run in kernels of oneDNN, with weights laid out for them. That makes a ResNet twice as fast, and
    small depthwise networks slower than code that Inductor writes itself.
    """

    def __init__(self, settings: Settings) -> None:
        told = settings.inner_options.get("freezing")
        self.decided: bool | None = told if settings.inner == "inductor" else False


def compile_bound(module: fx.GraphModule, settings: Settings, freezing: Freezing) -> Run:
    """A module whose weights nobody else knows: they need no guards, and Inductor may freeze them.

    Args:
        module: the converted graph.
        settings: say how to compile.
        freezing: is decided by the first call, where it is not.
    """
    if any(tensor.dtype is torch.float64 for tensor in module.parameters()):
        freezing.decided = freezing.decided or False  # torch 2.13 fails on these
    if freezing.decided is not None:
        return _compiled(module, settings, freezing.decided)
    frozen, live = (_compiled(module, settings, flag) for flag in (True, False))

    def run(*args: Any) -> Any:
        if freezing.decided is None:
            wait = torch.cuda.synchronize if any(_is_cuda(value) for value in args) else lambda: None
            calls = [lambda call=call: (call(*args), wait()) for call in (live, frozen)]
            freezing.decided = compare("freezing", *calls, pairs=_PAIRS).verdict == "faster"
        return (frozen if freezing.decided else live)(*args)

    return run


def _compiled(module: fx.GraphModule, settings: Settings, freezing: bool) -> Run:
    """Compiled by the inner back end.

    Dynamo makes constants of weights only if the switch is on while it records; else it fetches each of them again on
    every call. So the switch is on for inputs of every new layout, and set right for Inductor. Should Dynamo record
    again for another reason, the code is right, and slower.
    """
    made: list[ModuleType] = []
    weakref.finalize(module, _forget, made)

    def compiler(gm: fx.GraphModule, inputs: list[Any]) -> Run:
        before = len(PyCodeCache.modules)
        with torch._inductor.config.patch(freezing=freezing):
            compiled = compile_as_is(gm, inputs, settings)
        made.extend(PyCodeCache.modules[before:])
        return compiled

    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    # the stubs of torch 2.13 do not know isolate_recompiles yet: both forms of a module are of one class
    compiled: Run = torch.compile(  # type: ignore[call-overload]
        module, backend=compiler, options=options, isolate_recompiles=True
    )
    known: set[object] = set()

    def run(*args: Any) -> Any:
        layout = tuple(map(_layout, args))
        if layout in known:
            return compiled(*args)
        known.add(layout)
        with torch._inductor.config.patch(freezing=True):
            return compiled(*args)

    return run


def _is_cuda(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def _layout(value: Any) -> object:
    """What code is compiled for: the strides, shape and type of a tensor."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return value


def _forget(made: list[ModuleType]) -> None:
    """Let go of code that Inductor wrote, and of the frozen weights in it: it would keep them to the end."""
    while made:
        module = made.pop()
        PyCodeCache.modules = [kept for kept in PyCodeCache.modules if kept is not module]
        if sys.modules.get(module.__name__) is module:
            del sys.modules[module.__name__]
