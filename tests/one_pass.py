"""The five-way template for passes: one pass alone, over the normal form of a tiny network.

Each pass has a table of networks on which it fires, one of networks it refuses with the reason, and one it does not
match. Five checks go over them: layers before and after, reason, equality, a second run, an untouched graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from front import hostile, normal_form, operations
from oracle import assert_equivalent
from torch import Tensor, fx, nn

from rmfx.front.normal import check_normal
from rmfx.graph.emit import emit, storage_table
from rmfx.graph.facts import annotate
from rmfx.graph.rewriter import sweep
from rmfx.graph.rule import PassResult, Rule
from rmfx.hostile import randomise

IMAGE = (2, 4, 8, 8)
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """A network for a pass to meet.

    Attributes:
        build: makes it; give layers directly, weights are randomised.
        before, after: what :func:`front.operations` lists around the pass, in words; for cases that fire.
        reason: part of the refusal, for cases that refuse.
        shape: of one input.
        sized: whether the pass sees the input's shape.
        rule: the pass, where it is not the one with default options.
    """

    build: Build
    before: str = ""
    after: str = ""
    reason: str = ""
    shape: tuple[int, ...] = IMAGE
    sized: bool = False
    rule: Rule[Any, Any] | None = None

    def model(self) -> tuple[nn.Module, Tensor]:
        """The network in float64 and eval mode with hostile statistics, and a hostile input."""
        torch.manual_seed(0)
        x = hostile(*self.shape)
        return randomise(self.build().double(), x / 8), x


class Prepared:
    """A network in normal form with its facts, as the driver hands it to a pass."""

    def __init__(self, case: Case) -> None:
        self.model, self.x = case.model()
        self.gm = normal_form(self.model)
        annotate(self.gm, (self.x,) if case.sized else None)
        self._tensors = storage_table(self.gm)
        self._rule = case.rule

    def run(self, rule: Rule[Any, Any]) -> PassResult:
        """One sweep (of the case's own rule, where it has one), which must leave the normal form."""
        result = sweep(self.gm, self._rule or rule)
        check_normal(self.gm)
        return result

    def emitted(self) -> fx.GraphModule:
        """The network with the weights of its new layers, in float64."""
        emit(self.gm, self._tensors, torch.float64)
        self.gm.recompile()
        return self.gm

    def snapshot(self) -> tuple[object, ...]:
        """Everything that changes where a graph is touched: text, code, modules and tensors by identity."""
        nodes = tuple((id(node), node.op, node.target, node.args) for node in self.gm.graph.nodes)
        modules = tuple((name, id(module)) for name, module in self.gm.named_modules(remove_duplicate=False))
        tensors = tuple((name, id(tensor)) for name, tensor in self.gm.state_dict(keep_vars=True).items())
        return self.gm.code, str(self.gm.graph), nodes, modules, tensors


def assert_fires(case: Case, rule: Rule[Any, Any]) -> None:
    """The layers before and after are those of the case, and nothing was refused."""
    prepared = Prepared(case)
    _assert_layers(prepared.gm, case.before)
    result = prepared.run(rule)
    assert result.name == rule.name and result.changed and result.applied
    _assert_layers(prepared.gm, case.after)


def _assert_layers(gm: fx.GraphModule, expected: str) -> None:
    layers = " ".join(operations(gm))
    assert layers == expected, f"the layers are {layers}, not {expected}"


def assert_parity(case: Case, rule: Rule[Any, Any]) -> None:
    """The network that the pass leaves computes what the model computes."""
    prepared = Prepared(case)
    assert prepared.run(rule).changed
    emitted = prepared.emitted()
    for x in (prepared.x, hostile(case.shape[0] + 1, *case.shape[1:], seed=1)):
        assert_equivalent(prepared.model, emitted, x)


def assert_settled(case: Case, rule: Rule[Any, Any]) -> None:
    """A second sweep applies nothing and changes nothing."""
    prepared = Prepared(case)
    assert prepared.run(rule).changed
    before = prepared.snapshot()
    assert not prepared.run(rule).changed
    assert prepared.snapshot() == before


def assert_refuses(case: Case, rule: Rule[Any, Any]) -> None:
    """The pass refuses for the case's reason, and leaves every byte as it was."""
    prepared = Prepared(case)
    before = prepared.snapshot()
    result = prepared.run(rule)
    assert not result.changed
    reasons = [refused.reason for refused in result.refused]
    assert any(case.reason in reason for reason in reasons), reasons
    assert all(refused.node and not refused.kept for refused in result.refused)
    assert prepared.snapshot() == before


def assert_untouched(case: Case, rule: Rule[Any, Any]) -> None:
    """The pass does not match: no refusal either, and every byte is as it was."""
    prepared = Prepared(case)
    before = prepared.snapshot()
    assert prepared.run(rule) == PassResult(rule.name)
    assert prepared.snapshot() == before
