"""The caller's model is as it was, also where hooks that were made inside it keep what they see."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from front import hostile
from nets import conv
from torch import Tensor, nn

import rmfx
from rmfx.untouched import untouched


class Keeping(nn.Module):
    """A residual block with a hook that knows the model, as one gets at intermediate features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(conv(4, 4), nn.ReLU()), conv(4, 4)
        self.seen: list[Tensor] = []
        self.named: dict[str, Tensor] = {}
        self.last: Tensor | None = None
        self.a.register_forward_hook(lambda m, i, o: self.keep(o))

    def keep(self, value: Tensor) -> None:
        self.seen.append(value)
        self.named["a"] = value
        self.last = value

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


@pytest.mark.parametrize(
    "work", [rmfx.convert, rmfx.explain, rmfx.lower, lambda model, x: rmfx.verify(model, model, x)]
)
def test_hooks_leave_nothing_behind(work: Callable[..., object]) -> None:
    model, x = Keeping().double().eval(), hostile(2, 4, 9, 7)
    first = torch.zeros(1)
    model.keep(first)
    for _ in range(2):
        work(model, x)
        assert model.seen == [first] and model.named == {"a": first} and model.last is first
        copy.deepcopy(model)


def test_what_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    names, weight = {"x"}, model[0].weight
    model.names, model.order = names, {"b": 1, "a": 2}
    with pytest.raises(KeyError), untouched(model):
        model[0].weight = nn.Parameter(torch.zeros(3, 2))
        names.add("y")
        model.order = {}
        del model.order
        model.append(nn.ReLU())
        raise KeyError
    assert model[0].weight is weight and model.names is names and names == {"x"}
    assert list(model.order) == ["b", "a"] and len(model) == 1
