"""Code that decides by what it is given: by absent inputs, by types, by sizes; and numbers of numpy in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from front import Lambda, hostile
from nets import conv
from torch import Tensor, nn

import rmfx
from rmfx.inputs import without_absent


class Block(nn.Module):
    """A residual block whose forward takes a mask and a scale, or does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(6, 6), conv(6, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        y = self.b(self.a(x).relu())
        y = y * 0.5 if mask is None else y * mask.sigmoid()
        return x + y if scale is None else x - y * scale


def block() -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return Block().double().eval(), hostile(2, 6, 9, 7)


@pytest.mark.parametrize("args", [(), (None,)])
@pytest.mark.parametrize("given", [True, False])
def test_optional_inputs_that_are_absent(args: tuple[None, ...], given: bool) -> None:
    model, x = block()
    plain = rmfx.convert(model, (x, *args)) if given else rmfx.convert(model)
    assert rmfx.report(plain).count("removed") == 1
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-11)
    assert rmfx.verify(model, plain, (x, *args)).difference < 1e-12
    with pytest.raises(TypeError):
        plain(x, x)  # it has no such input any more


def test_optional_inputs_that_are_given() -> None:
    model, x = block()
    mask, scale = hostile(2, 6, 9, 7, seed=1), torch.tensor(0.3, dtype=torch.float64)
    for args, kwargs in (
        ((x, mask), {}),
        ((x,), {"mask": mask}),
        ((x, None), {"scale": scale}),
        ((x,), {"mask": None}),
    ):
        plain = rmfx.convert(model, args, example_kwargs=kwargs)
        given, named = without_absent(model, args, kwargs)
        torch.testing.assert_close(plain(*(given or ()), **named), model(*args, **kwargs), rtol=0, atol=1e-11)


def test_an_optional_input_without_which_the_code_does_not_run_is_no_optional_one() -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return x.relu() + other.relu()  # type: ignore[union-attr]

    x, other = hostile(2, 6, 9, 7), hostile(2, 6, 9, 7, seed=1)
    assert torch.equal(rmfx.convert(Always().eval())(x, other), x.relu() + other.relu())


def _by_try(x: Tensor) -> Any:
    try:
        return len(x)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        return 7


DECISIONS: dict[str, Callable[[Tensor], Any]] = {
    "isinstance": lambda x: 2 if isinstance(x, Tensor) else 3,
    "is_tensor": lambda x: 2 if torch.is_tensor(x) else 3,
    "a size is a number": lambda x: 2 if isinstance(x.shape[2], int) else 3,
    "a table by size": lambda x: {9: 2}.get(x.shape[2], 3),
    "hasattr": lambda x: 3 if hasattr(x, "tensors") else 2,
    "getattr": lambda x: getattr(x, "scale_", 2),
    "try": _by_try,
}


@pytest.mark.parametrize("name", DECISIONS)
def test_decisions_that_a_stand_in_answers_wrongly(name: str) -> None:
    model = Lambda(lambda m, x: (x + m.b(m.a(x).relu())) * DECISIONS[name](x), a=conv(6, 6), b=conv(6, 6))
    model, x = model.double().eval(), hostile(2, 6, 9, 7)
    plain = rmfx.convert(model, x)
    assert rmfx.report(plain).count("removed") == 1
    torch.testing.assert_close(plain(x), 2 * (x + model.b(model.a(x).relu())), rtol=0, atol=1e-11)


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "right": lambda x: x / np.sqrt(2.0),
    "left": lambda x: np.sqrt(0.5) * x,
    "float32": lambda x: x * np.float32(0.25),
    "int": lambda x: x / np.int64(3),
    "argument": lambda x: nn.functional.leaky_relu(x, np.float64(0.2)),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy(name: str, given: bool) -> None:
    model = Lambda(lambda m, x: NUMBERS[name](x + m.b(m.a(x).relu())), a=conv(6, 6), b=conv(6, 6)).double().eval()
    x = hostile(2, 6, 9, 7)
    plain = rmfx.convert(model, *([x] if given else []))
    assert rmfx.report(plain).count("removed") == 1
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-11)
