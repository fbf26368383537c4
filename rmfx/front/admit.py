"""Which models rmfx takes: everything it must refuse before tracing, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from rmfx.errors import UnsupportedModelError

_QUANTISED = (
    "torch.ao.nn.",
    "torch.ao.quantization",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torchao.",
)


_UNLIFT = "torch.export._unlift"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_admissible(model: object, allow_training: bool = False, allow_meta: bool = False) -> None:
    """Refuse what cannot be converted as a whole; reads ``model`` and changes nothing.

    Args:
        model: what the caller gave.
        allow_training: accept a model in training mode (it will be traced as in eval mode).
        allow_meta: accept a model on the meta device, whose weights have no values.

    Raises:
        UnsupportedModelError: not a module, no ``forward``, wrapped, scripted, quantised, lazy, in training mode,
            on several devices, with integer or complex parameters, or under hooks that act on every module.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"rmfx converts a torch.nn.Module, but was given {_describe(model)}")
    _check_wrapper(model)
    for name, module in model.named_modules():
        _check_module(name, module)
    if type(model).forward is nn.Module.forward:
        raise UnsupportedModelError(f"{type(model).__name__} has no forward method, so it computes nothing")
    _check_tensors(model, allow_meta)
    _check_hooks(model)
    if not allow_training:
        _check_eval(model)


def _describe(value: object) -> str:
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f"the class {value.__name__}: build a model first, {value.__name__}(...)"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def _check_wrapper(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedModelError(
            f"the model is wrapped in {type(model).__name__}: give the model inside, model.module"
        )
    if "_orig_mod" in model._modules:
        raise UnsupportedModelError("the model was compiled by torch.compile: give the model inside, model._orig_mod")
    if "forward" in vars(model):
        raise UnsupportedModelError(
            "the model's forward was replaced on the instance, which tracing would not see: define it in a class"
        )


def _check_module(name: str, module: nn.Module) -> None:
    where = f"{name or 'the model'} ({type(module).__name__})"
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError(f"{where} is TorchScript, which cannot be traced: give the Python model")
    if type(module).__module__.startswith(_QUANTISED):
        raise UnsupportedModelError(f"{where} is quantised: convert the float model, then quantise the result")


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _check_tensors(model: nn.Module, allow_meta: bool) -> None:
    devices: dict[torch.device, str] = {}
    for name, tensor in _named_tensors(model):
        if is_lazy(tensor):
            raise UnsupportedModelError(f"{name} is lazy and has no shape yet: run the model on one batch first")
        if tensor.is_inference() and not isinstance(model, fx.GraphModule):  # whose writes stand in its graph
            raise UnsupportedModelError(
                f"{name} was made under torch.inference_mode(), which lets nobody follow writes into it: build or load "
                "the model outside of it (its use may stay inside), or convert copy.deepcopy(model)"
            )
        devices.setdefault(tensor.device, name)
    for name, parameter in model.named_parameters():
        if parameter.is_quantized or not parameter.is_floating_point():
            kind = "complex" if parameter.is_complex() else "integer"
            raise UnsupportedModelError(f"parameter {name} is {kind} ({parameter.dtype}); only real floats convert")
        if parameter.dtype not in _FLOATS:
            raise UnsupportedModelError(
                f"parameter {name} is {parameter.dtype}, which has no arithmetic: cast it first"
            )
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise UnsupportedModelError(f"the model is spread over several devices ({places}): move it to one")
    if not allow_meta and any(device.type == "meta" for device in devices):
        raise UnsupportedModelError("the model is on the meta device, where weights have no values: load it on cpu")


def _check_hooks(model: nn.Module) -> None:
    if torch_module._has_any_global_hook():
        raise UnsupportedModelError("hooks on all modules are registered (register_module_*_hook): remove them first")
    for hooks in (model._forward_hooks, model._forward_pre_hooks):
        for hook in hooks.values():
            # torch.export puts one on what it makes, to check sizes.
            if not type(hook).__module__.startswith("torch.nn.utils.") and getattr(hook, "__module__", "") != _UNLIFT:
                raise UnsupportedModelError(f"the model itself has a forward hook, {hook_name(hook)}: remove it first")


def hook_name(hook: object) -> str:
    """How a hook is called in its source, for messages."""
    named = hook if hasattr(hook, "__qualname__") else type(hook)
    return f"{named.__module__}.{named.__qualname__}"


def _check_eval(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training and not _only_holds(module):
            first = f"{name} ({type(module).__name__})" if name else "the model"
            raise UnsupportedModelError(
                f"{first} is in training mode, and rmfx converts what a model computes in eval mode: "
                "call model.eval() first"
            )


def _only_holds(module: nn.Module) -> bool:
    """Whether a module has nothing to switch: torch makes such ones, and in training mode.

    A bare ``nn.Module`` holds others, what a graph does in training stands in it, and ``torch.export`` adds a check.
    """
    return type(module) is nn.Module or isinstance(module, fx.GraphModule) or type(module).__module__ == _UNLIFT
