"""The back end behind rmfx: what it makes of graphs as Dynamo recorded them, and of converted ones."""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
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
    """Whether Inductor freezes weights: as it is told, or else whatever is faster on the first call.

    Frozen convolutions run in kernels of oneDNN, with weights laid out for them. That makes a ResNet twice as fast, and
    small depthwise networks slower than code that Inductor writes itself.
    """

    def __init__(self, settings: Settings) -> None:
        told = settings.inner_options.get("freezing")
        self.decided: bool | None = told if settings.inner == "inductor" else False


def compile_bound(
    module: fx.GraphModule, settings: Settings, freezing: Freezing, fixed: tuple[Any, ...] | None = None
) -> Run:
    """A module whose weights nobody else knows: they need no guards, and Inductor may freeze them.

    Args:
        module: the converted graph.
        settings: say how to compile.
        freezing: is decided by the first call, where it is not.
        fixed: inputs, where all others will be of the same layout: Inductor gets the graph at once, since there is
            nothing that Dynamo would have to look after on each call.
    """
    if any(tensor.dtype is torch.float64 for tensor in module.parameters()):
        freezing.decided = freezing.decided or False  # torch 2.13 fails on these
    compiler = partial(_through_dynamo, module, settings)
    if fixed is not None and settings.inner == "inductor":
        compiler = partial(_at_once, module, settings, fixed)
    flags = (True, False) if freezing.decided is None else (freezing.decided,)
    made = {flag: compiler(flag) for flag in flags}

    one_at_a_time = threading.Lock()

    def run(*args: Any) -> Any:
        if len(made) > 1:
            with one_at_a_time:
                if freezing.decided is None:
                    freezing.decided = _frozen_is_faster(made, args)
                made.pop(not freezing.decided, None)
        assert freezing.decided is not None
        return made[freezing.decided](*args)

    return run


def _frozen_is_faster(made: Mapping[bool, Run], args: tuple[Any, ...]) -> bool:
    wait = torch.cuda.synchronize if any(_is_cuda(value) for value in args) else lambda: None
    calls = [lambda flag=flag: (made[flag](*args), wait()) for flag in (False, True)]
    return compare("freezing", *calls, pairs=_PAIRS).verdict == "faster"


def _at_once(module: fx.GraphModule, settings: Settings, fixed: tuple[Any, ...], freezing: bool) -> Run:
    """Compiled by Inductor, for inputs of one layout, which somebody else vouches for."""
    made: list[ModuleType] = []
    compiled = _recording(made, settings, freezing)(_with_constants(module), list(fixed))
    weakref.finalize(compiled, _forget, made)
    return compiled


def _with_constants(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares the weights, as plain tensors: parameters would be inputs, which the code checks each time."""
    own = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    for layer in own.modules():
        for table in (layer._parameters, layer._buffers):
            for name in list(table):
                tensor = table.pop(name)
                setattr(layer, name, None if tensor is None else tensor.detach())
    return own


def _through_dynamo(module: fx.GraphModule, settings: Settings, freezing: bool) -> Run:
    """Compiled by the inner back end.

    Dynamo makes constants of weights only if the switch is on while it records; else it fetches each of them again on
    every call. So the switch is on for inputs of every new layout, and set right for Inductor. Should Dynamo record
    again for another reason, the code is right, and slower.
    """
    made: list[ModuleType] = []
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    # the stubs of torch 2.13 do not know isolate_recompiles yet: both forms of a module are of one class
    compiled: Run = torch.compile(  # type: ignore[call-overload]
        module, backend=_recording(made, settings, freezing), options=options, isolate_recompiles=True
    )
    known: set[object] = set()

    def run(*args: Any) -> Any:
        layout = tuple(map(_layout, args))
        if layout in known:
            return compiled(*args)
        known.add(layout)
        with torch._inductor.config.patch(freezing=True):
            return compiled(*args)

    weakref.finalize(run, _forget, made)
    return run


def _recording(made: list[ModuleType], settings: Settings, freezing: bool) -> Callable[..., Run]:
    """The inner back end; what Inductor writes for it goes to ``made``."""

    def compiler(gm: fx.GraphModule, inputs: list[Any]) -> Run:
        before = len(PyCodeCache.modules)
        with torch._inductor.config.patch(freezing=freezing):
            compiled = compile_as_is(gm, inputs, settings)
        made.extend(PyCodeCache.modules[before:])
        return compiled

    return compiler


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
