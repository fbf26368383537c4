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

Run = Callable[..., Any]


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


def compile_bound(module: fx.GraphModule, settings: Settings) -> Run:
    """A module whose weights nobody else knows: they need no guards, and Inductor may freeze them.

    Dynamo makes constants of weights only if the switch is on while it records, so the call does that for inputs of
    every new layout. Should Dynamo record again for another reason, the code is right, and not frozen.
    """
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    if settings.inner != "inductor":
        return torch.compile(module, backend=lambda gm, args: compile_as_is(gm, args, settings), options=options)
    made: list[ModuleType] = []
    weakref.finalize(module, _forget, made)

    def compiler(gm: fx.GraphModule, inputs: list[Any]) -> Run:
        before = len(PyCodeCache.modules)
        compiled = compile_as_is(gm, inputs, settings)
        made.extend(PyCodeCache.modules[before:])
        return compiled

    float64 = any(tensor.dtype is torch.float64 for tensor in module.parameters())  # torch 2.13 fails on these
    freezing = settings.inner_options.get("freezing", not float64)
    compiled, known = torch.compile(module, backend=compiler, options=options), set()

    def run(*args: Any) -> Any:
        layout = tuple(map(_layout, args))
        if layout in known:
            return compiled(*args)
        known.add(layout)
        with torch._inductor.config.patch(freezing=freezing):
            return compiled(*args)

    return run


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
