"""Weights and batch-norm statistics under which a wrong conversion shows.

A fresh network is a weak test: its batch norms have mean 0, variance 1, scale 1 and bias 0, so forgetting one
of them changes nothing; and statistics drawn at random make a deep network overflow, or amplify rounding
noise until no tolerance means anything. Here they are measured first and disturbed then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ModuleT = TypeVar("ModuleT", bound=nn.Module)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# A channel that hardly varies must not be scaled up to unit variance: that would amplify rounding noise.
VARIANCE_FLOOR = 0.01  # relative to the mean variance of the layer's channels


@torch.no_grad()
def randomise(model: ModuleT, example_inputs: Tensor | tuple[Tensor, ...], seed: int = 0) -> ModuleT:
    """Give ``model`` random weights and hostile but realistic norm statistics, in place; leaves it in eval mode.

    Weights of convs and linears are normal with variance 1 / fan-in, biases not zero, scales of norms of both
    signs in +-[0.5, 1.5], slopes of PReLU in [-0.25, 0.75]. One forward pass then sets each batch norm's
    running mean and variance, *in the order of execution*, to those of what it really sees, disturbed by up to
    about a third of a standard deviation and a factor of 2. Every layer thus works on outputs of about unit size,
    whatever the depth, and no branch is dead.

    Args:
        model: changed in place.
        example_inputs: for the forward pass; a few samples, random and of unit size. In the model's dtype.
        seed: of every random number; the same seed gives the same network.

    Returns:
        ``model`` itself.

    >>> net = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(4, 3, 8, 8))
    >>> bool((net[1].weight > 0).any() and (net[1].weight < 0).any() and (net[1].running_mean != 0).all())
    True
    """
    random = torch.Generator().manual_seed(seed)
    model.eval()
    for module in model.modules():
        _draw_parameters(module, random)
    seen: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(_measuring(random, seen)) for m in _batch_norms(model)]
    try:
        model(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))
    finally:
        _remove(handles)
    return model


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None]


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _draw_parameters(module: nn.Module, random: torch.Generator) -> None:
    if isinstance(module, WEIGHTED):
        fan_in = max(1, module.weight[0].numel())
        module.weight.normal_(0, fan_in**-0.5, generator=random)
        if module.bias is not None:
            module.bias.normal_(0, 0.3, generator=random)
    elif isinstance(module, NORMS) and module.weight is not None:
        module.weight.uniform_(0.5, 1.5, generator=random)
        module.weight.mul_(_signs(module.weight, random))
        if module.bias is not None:
            # Within one scale of zero, so that an activation behind the norm sees both signs in each channel.
            module.bias.uniform_(-1, 1, generator=random).mul_(module.weight)
    elif isinstance(module, nn.PReLU):
        module.weight.uniform_(-0.25, 0.75, generator=random)


def _signs(like: Tensor, random: torch.Generator) -> Tensor:
    signs = torch.empty_like(like).uniform_(-1, 1, generator=random).sign()
    return torch.where(signs == 0, torch.ones_like(signs), signs)


def _measuring(random: torch.Generator, seen: set[nn.Module]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A forward pre-hook that sets a batch norm's statistics from its first input and disturbs them."""

    def hook(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        if norm in seen:
            return
        seen.add(norm)
        x = args[0]
        rows = x.transpose(0, 1).reshape(x.shape[1], -1)
        variance, mean = torch.var_mean(rows, dim=1, correction=0)
        floor = VARIANCE_FLOOR * variance.mean()
        variance = torch.where(floor > 0, variance.clamp_min(floor), torch.ones_like(variance))
        shift = torch.empty_like(mean).normal_(0, 0.3, generator=random)
        factor = torch.empty_like(mean).uniform_(-1, 1, generator=random).exp2()
        assert isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor)
        norm.running_mean.copy_(mean + shift * variance.sqrt())
        norm.running_var.copy_(variance * factor)

    return hook
