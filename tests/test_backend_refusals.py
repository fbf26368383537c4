"""``torch.compile(model, backend="rmfx")``: what is left to the inner back end, and options."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import EAGER, assert_same, compiled, in_place
from nets import build
from torch import Tensor, nn

import rmfx
from rmfx.backend.bound import Bound
from rmfx.errors import VerificationError

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("fresh_dynamo")]


def test_gradients_are_those_of_the_model(folds: list[Bound]) -> None:
    model, x = build("basic_chain")
    ours = copy.deepcopy(model)
    run = compiled(ours)
    for net, call in ((model, model), (ours, run)):
        call(x).square().sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
    for want, got in zip(model.parameters(), ours.parameters(), strict=True):
        assert torch.equal(want.grad, got.grad)
    assert not folds
    assert_same(model, run, x)
    assert folds


@pytest.mark.parametrize("grad", [True, False])
def test_training_mode(grad: bool, folds: list[Bound]) -> None:
    model, x = build("basic_identity")
    model.train()
    ours = copy.deepcopy(model)
    run = compiled(ours)
    with torch.set_grad_enabled(grad):
        assert torch.equal(model(x), run(x))
    for want, got in zip(model.buffers(), ours.buffers(), strict=True):
        assert torch.equal(want, got)
    assert not folds
    model.eval(), ours.eval()
    assert_same(model, run, x)
    assert folds


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Grad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return x * self.weight


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.weight.flatten()


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (Writing(), "writes into its input"),
        (Grad(), "has an effect other than its result"),
        (Counting(), "writes into its input l_self_modules_tail_buffers_calls_"),
        (Weights(), "its result flatten is made of weights alone"),
    ],
)
def test_what_bound_weights_would_get_wrong(
    tail: nn.Module, reason: str, folds: list[Bound], caplog: pytest.LogCaptureFixture
) -> None:
    body, x = build("basic_identity")
    model = Tailed(body, tail)
    ours = copy.deepcopy(model)
    run = compiled(ours)
    mine, theirs = x.clone(), x.clone()
    with torch.no_grad():
        for _ in range(2):
            for want, got in zip(model(mine), run(theirs), strict=True):
                assert torch.equal(want, got) and want.requires_grad == got.requires_grad
    assert torch.equal(mine, theirs) and not folds
    assert caplog.text.count(reason) == 1
    for want, got in zip(model.buffers(), ours.buffers(), strict=True):
        assert torch.equal(want, got)


class Tailed(nn.Module):
    """A block, and something else on its input."""

    def __init__(self, body: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.body, self.tail = body, tail

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.body(x)
        more = self.tail(x)
        return (y, *more) if isinstance(more, tuple) else (y, more)


def test_autocast_is_left_alone(folds: list[Bound], caplog: pytest.LogCaptureFixture) -> None:
    model, x = build("basic_identity")
    model, x = model.float(), x.float()
    run = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, got = model(x), run(x)
    assert want.dtype == got.dtype == torch.bfloat16 and torch.equal(want, got)
    assert not folds and "autocast" in caplog.text


def test_what_rmfx_refuses_runs_as_it_is_and_says_so_once(folds: list[Bound], caplog: pytest.LogCaptureFixture) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex128) @ self.weight).real

    model = Complex()
    run = compiled(model)
    for size in (2, 3, 4, 5):
        assert_same(model, run, torch.randn(size, 3, dtype=torch.float64))
    assert not folds and caplog.text.count("is complex (torch.complex128)") == 1


def test_a_difference_that_verification_finds_is_no_result(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def differs(self: Bound, args: tuple[Any, ...]) -> None:
        raise VerificationError("the result differs")

    monkeypatch.setattr(Bound, "_converted", differs)
    model, x = build("basic_identity")
    run = compiled(model)
    for _ in range(3):
        assert_same(model, run, x)
        in_place(model[0][0])
    assert caplog.text.count("the result differs") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"carier": "split"}, "no option 'carier'; it has 'carrier', 'check', .*'verify'"),
        ({"keep_bn": True}, "no option 'keep_bn'"),
        ({"carrier": "spilt"}, "carrier must be one of 'auto', 'direct'"),
        ({"policy": "some"}, "policy must be one of 'all'"),
        ({"check": "date"}, "check must be one of 'version', 'hash', got 'date'"),
        ({"verify": "yes"}, "verify must be True, False or None"),
        ({"inner": "indctor"}, "inner must be one of .*'inductor'.*, or a callable, got 'indctor'"),
        ({"inner": "rmfx"}, "inner must be one of"),
        ({"inner_options": 3}, "inner_options must be a mapping"),
        ({"inner": "inductor", "inner_options": {"freezzing": True}}, "known options are"),
    ],
)
def test_bad_options_are_errors_that_list_the_good_ones(options: dict[str, Any], message: str) -> None:
    model, x = build("basic_identity")
    with torch.no_grad(), pytest.raises(Exception, match=f"(?s){message}"):
        torch.compile(model, backend="rmfx", options={**EAGER, **options})(x)


def test_a_mode_is_inductors() -> None:
    model, x = build("basic_identity")
    with torch.no_grad(), pytest.raises(Exception, match="should be one of"):
        torch.compile(model, backend="rmfx", mode="fastest")(x)


def test_options_reach_the_conversion(caplog: pytest.LogCaptureFixture) -> None:
    model, x = build("basic_chain")
    with caplog.at_level(logging.INFO, "rmfx"):
        assert_same(model, compiled(model, policy=[], verify=False), x)
    assert "0 residual sums removed, 3 kept" in caplog.text


def test_by_default_the_planner_chooses(caplog: pytest.LogCaptureFixture) -> None:
    model, x = build("basic_chain")
    with caplog.at_level(logging.INFO, "rmfx"):
        assert_same(model, torch.compile(model, backend="rmfx", options={"inner": "eager"}), x)
    planned = rmfx.report(rmfx.convert(model, x, policy="auto", measure=False)).summary()
    assert planned in caplog.text


def test_inner_options_reach_the_inner_back_end() -> None:
    seen: list[dict[str, Any]] = []

    def inner(gm: Any, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        seen.append({"layers": sum(node.op == "call_function" for node in gm.graph.nodes), **kwargs})
        return gm.forward

    model, x = build("basic_identity")
    assert_same(model, compiled(model, inner=inner, inner_options={"level": 3}), x)
    assert [call["options"] for call in seen] == [{"level": 3}]
