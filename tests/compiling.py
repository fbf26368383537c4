"""What the tests of the back end share: how they compile, what is the same, how weights change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import relative_difference
from torch import nn

EAGER = {"inner": "eager", "policy": "all"}


def compiled(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="rmfx", options={**EAGER, **options})


def assert_same(model: Callable[..., Any], run: Callable[..., Any], *inputs: Any) -> None:
    with torch.no_grad():
        assert relative_difference(model(*inputs), run(*inputs)) < 1e-12


def in_place(layer: nn.Conv2d) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def replaced(layer: nn.Conv2d) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def loaded(layer: nn.Conv2d) -> None:
    layer.load_state_dict({name: tensor * 2 for name, tensor in layer.state_dict().items()})
