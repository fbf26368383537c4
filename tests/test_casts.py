"""Code that casts on its way: networks are compared by what they compute in real numbers, and mistakes are seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from front import Lambda, hostile, operations
from nets import cbn, conv
from torch import Tensor, nn

import rmfx
from rmfx import VerificationError
from rmfx.algebra.exact import UnroundedCasts
from rmfx.front.trace import trace
from rmfx.hostile import randomise
from rmfx.passes.normalise import normalise


class Casting(nn.Module):
    """A block that is followed by a sum in float32, as attention in timm computes its logits."""

    def __init__(self, by_size: bool) -> None:
        super().__init__()
        self.a, self.b, self.by_size = cbn(6, 5), conv(5, 6), by_size

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.b(self.a(x).relu())
        if self.by_size and x.shape[2] < 0:  # symbolic tracing cannot follow: torch.export bakes the dtype in
            return x
        return (y.float() * 3).to(x.dtype)


def built(by_size: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = hostile(2, 6, 9, 8).float()
    return randomise(Casting(by_size), x / 8), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_size", [False, True])
def test_casts_do_not_fail_the_verification(by_size: bool, dtype: torch.dtype) -> None:
    model, x = built(by_size)
    converted = rmfx.convert(model.to(dtype), x.to(dtype))
    assert rmfx.report(converted).count("removed") == 1
    assert rmfx.verify(model, converted, x.to(dtype)).difference < 1e-6


@pytest.mark.parametrize("by_size", [False, True])
def test_a_mistake_is_seen_in_spite_of_casts(by_size: bool) -> None:
    model, x = built(by_size)
    converted = rmfx.convert(model.double(), x.double(), verify=False)
    with torch.no_grad():
        next(converted.parameters()).mul_(1 + 1e-9)
    with pytest.raises(VerificationError):
        rmfx.verify(model, converted, x.double())


def test_only_what_rounds_is_left_out() -> None:
    x, single = torch.tensor([0.1, 2.0], dtype=torch.float64), torch.ones(2, dtype=torch.float32)
    with UnroundedCasts():
        assert torch.equal(x.half().double(), x) and x.to(torch.bfloat16).dtype == torch.float64
        assert x.long().dtype == torch.int64 and x.float().long().tolist() == [0, 2]
        assert x.to(torch.float32, copy=True).data_ptr() != x.data_ptr()
        assert single.half().dtype == torch.float16 and torch.ones(2, dtype=torch.float32).dtype == torch.float64
        assert x.long().float().dtype == torch.float64
    assert x.float().dtype == torch.float32


def test_code_that_insists_on_a_dtype_is_a_difference_as_before() -> None:
    class Table(Casting):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x).float()
            return y @ torch.ones(8, 8, dtype=torch.float32)

    x = hostile(2, 6, 9, 8)
    model = randomise(Table(True).double(), x / 8)
    converted = rmfx.convert(model, x, verify=False)
    assert rmfx.verify(model, converted, x).difference < 1e-6
    with torch.no_grad():
        next(converted.parameters()).mul_(1 + 1e-3)
    with pytest.raises(VerificationError):
        rmfx.verify(model, converted, x)


IDLE: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, y: x.to(y.dtype) + y,
    lambda x, y: x.type_as(y) + y,
    lambda x, y: x + y.to(dtype=x.dtype),
    lambda x, y: (x.double() + y.to(torch.float64)).to(x.dtype),
    lambda x, y: x.expand_as(y) + y,
    lambda x, y: x + y.expand(-1, -1, -1, -1),
]
KEPT: list[tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = [
    (lambda x, y: x + y.float(), ["float", "add"]),
    (lambda x, y: x + y.to("cpu"), ["to", "add"]),
    (lambda x, y: x + y.to(torch.float64, copy=True), ["to", "add"]),
    (lambda x, y: x + y[:, :1].expand_as(x), ["ChannelSlice", "add"]),
    (lambda x, y: x[:, :1].expand_as(y), ["ChannelSlice", "expand_as"]),
]


def block(form: Callable[[Tensor, Tensor], Tensor]) -> Lambda:
    return Lambda(lambda m, x: torch.relu(form(x, m.conv(x))), conv=conv(6, 6)).double().eval()


@pytest.mark.parametrize("index", range(len(IDLE)))
def test_what_neither_casts_nor_expands_hides_no_sum(index: int) -> None:
    model, x = block(IDLE[index]), hostile(2, 6, 9, 8)
    gm = normalise(trace(model), inputs=(x,))
    assert operations(gm) == ["Conv2d", "add", "ReLU"] and torch.equal(gm(x), model(x))
    assert rmfx.report(rmfx.convert(model, x)).count("removed") == 1


@pytest.mark.parametrize("index", range(len(KEPT)))
def test_what_may_do_something_stays(index: int) -> None:
    form, expected = KEPT[index]
    model, x = block(form), hostile(2, 6, 9, 8)
    gm = normalise(trace(model), inputs=(x,))
    assert operations(gm) == ["Conv2d", *expected, "ReLU"] and torch.equal(gm(x), model(x))
    assert "to" in operations(normalise(trace(block(IDLE[0]))))  # nothing is known without inputs
