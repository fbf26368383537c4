"""Turns weights that are computed on every call into plain parameters, before tracing.

Parametrizations, weight norm, spectral norm and pruning masks are fixed functions of parameters in eval mode: their
value is stored once and the machinery goes away. Any other hook on a layer is refused. Nothing is written into an
existing tensor, nor into a class: the parametrized class of a copy is the class of the caller's model too, so
``torch.nn.utils.parametrize.remove_parametrizations`` would break that one.
"""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rmfx.algebra.exact import exact, remember
from rmfx.errors import UnsupportedModelError
from rmfx.front.admit import hook_name
from rmfx.front.tracer import is_leaf


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Materialise every computed weight of ``model``, in place; ``model`` is a structural copy in eval mode.

    Raises:
        UnsupportedModelError: when a layer has a hook that is none of the known ones.
    """
    for name, module in list(model.named_modules()):
        if parametrize.is_parametrized(module):
            _settle_parametrizations(module)
        _settle_hooks(module)
        module._backward_hooks.clear()  # they watch gradients; the function is the same without them
        module._backward_pre_hooks.clear()
        if is_leaf(module):
            _refuse_hooks(name, module)


def _settle_parametrizations(module: nn.Module) -> None:
    settled: dict[str, Tensor] = {}
    for name, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
        originals = [*chain._parameters.values(), *chain._buffers.values()]
        value = getattr(module, name).detach().clone()
        if any(isinstance(original, nn.Parameter) for original in originals):
            value = nn.Parameter(value, requires_grad=any(original.requires_grad for original in originals))
        remember(value, partial(_in_float64, chain))
        settled[name] = value
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in settled.items():
        if isinstance(value, nn.Parameter):
            module.register_parameter(name, value)
        else:
            module.register_buffer(name, value)


def _settle_hooks(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, WeightNorm | SpectralNorm):
            originals = {**module._parameters, **module._buffers}
            hook.remove(module)
            remember(getattr(module, hook.name), partial(_normed_in_float64, hook, originals))
        elif isinstance(hook, prune.BasePruningMethod):
            _detach_pruned(module, hook._tensor_name)
            hook.remove(module)
        else:
            continue
        del module._forward_pre_hooks[key]


def _in_float64(chain: nn.Module) -> Tensor:
    value = copy.deepcopy(chain).double()()
    assert isinstance(value, Tensor)
    return value


def _normed_in_float64(hook: WeightNorm | SpectralNorm, originals: dict[str, Tensor | None]) -> Tensor:
    module: Any = SimpleNamespace(**{name: exact(tensor) for name, tensor in originals.items() if tensor is not None})
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(module)
    return hook.compute_weight(module, do_power_iteration=False)


def _detach_pruned(module: nn.Module, name: str) -> None:
    # Removing a mask rebinds the data of the original Parameter object, which the caller's model shares.
    original = module._parameters[f"{name}_orig"]
    assert original is not None
    module._parameters[f"{name}_orig"] = nn.Parameter(original.detach(), requires_grad=original.requires_grad)


def _refuse_hooks(name: str, leaf: nn.Module) -> None:
    for inner, module in leaf.named_modules(prefix=name):
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            raise UnsupportedModelError(
                f"layer {inner} ({type(module).__name__}) has a forward hook, {hook_name(hook)}, "
                "whose effect cannot be put into the graph: remove it, or call it in the forward of a module of yours"
            )
