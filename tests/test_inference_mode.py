"""What is asked for under ``torch.inference_mode()`` is made of ordinary tensors, which rmfx takes again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import build
from oracle import relative_difference
from torch import Tensor, nn

import rmfx


def converted(model: nn.Module, x: Tensor) -> nn.Module:
    return rmfx.convert(model, x)


def lowered(model: nn.Module, x: Tensor) -> nn.Module:
    return rmfx.lower(rmfx.convert(model, x), x)


def pruned(model: nn.Module, x: Tensor) -> nn.Module:
    return rmfx.prune(model, x, threshold=-1.0, importance="l2").network


def pruned_by_gradients(model: nn.Module, x: Tensor) -> nn.Module:
    head = nn.Sequential(model, nn.Flatten()).eval()
    return rmfx.prune(head, x, threshold=-1.0, data=[(x, torch.zeros(len(x), dtype=torch.int64))]).network


def planned(model: nn.Module, x: Tensor) -> nn.Module:
    return rmfx.apply_plan(rmfx.make_plan(model, x, measure=False, cache=None), model, x)


@pytest.mark.parametrize("make", [converted, lowered, pruned, pruned_by_gradients, planned])
def test_results_are_ordinary(make: Callable[[nn.Module, Tensor], nn.Module]) -> None:
    model, x = build("basic_chain")
    with torch.inference_mode():
        made = make(model, x.clone())
        assert torch.is_inference_mode_enabled()
        expected, actual = model(x).flatten(1), made(x).flatten(1)
    assert relative_difference(expected.clone(), actual.clone()) < 1e-12
    assert not any(tensor.is_inference() for tensor in made.state_dict().values())
    made(x).sum().backward()
    again = rmfx.convert(made, x)
    assert relative_difference(expected.clone(), again(x).detach().flatten(1)) < 1e-12
