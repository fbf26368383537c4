"""What a branch reads that does not depend on its fork: conditions, masks, terms for every position, constants."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from front import hostile, operations
from nets import cbn, cbr, conv
from oracle import assert_equivalent
from regions import Net
from torch import Tensor, fx, nn

import rmfx
from rmfx.graph.within import forks
from rmfx.hostile import randomise


class Two(nn.Module):
    """A network of ``forward(m, x, given)``: ``given`` is what comes from outside."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor, given: Tensor) -> Any:
        return self.compute(self, x, given)


@dataclass(frozen=True)
class Case:
    """A network and its second input; the joins that stay, the residual sums that go, and those that lowering makes."""

    build: Callable[[], nn.Module]
    given: Callable[[int], Tensor]
    left: tuple[str, ...]
    shape: tuple[int, ...] = (2, 6, 7, 9)
    removed: int = 1
    lowered: int = 1


def _spread(v: Tensor) -> Tensor:
    return v[:, :, None, None]


def _film(m: Any, x: Tensor, given: Tensor) -> Tensor:
    return (x + m.b((m.a(x) * _spread(m.scale(given)) + _spread(m.shift(given))).relu())).relu()


def _times(m: Any, x: Tensor, given: Tensor) -> Tensor:
    """A diffusion network's blocks: each adds an embedding of the time."""
    t = m.embed(given).relu()
    for a, b, time in zip(m.a, m.b, m.time, strict=True):
        x = x + b((a(x) + _spread(time(t))).relu())
    return x


def _masked(m: Any, x: Tensor, given: Tensor) -> Tensor:
    """A TCN over sequences of unequal length."""
    mask = given[:, :1] > 0
    for a, b in zip(m.a, m.b, strict=True):
        x = (x + b(a(x * mask).relu() * mask)) * mask
    return x


def _filled(m: Any, x: Tensor, given: Tensor) -> Tensor:
    """The same by choices, in all their spellings."""
    mask, none = given[:, :1] > 0, torch.zeros_like(x)
    y = m.a(x.masked_fill(~mask, 0)).relu()
    y = m.b(torch.where(mask, m.b(torch.where(~mask, 0.0, y)), none).relu())
    return x + y.where(mask, 0.0)


def _gated_from_before(m: Any, x: Tensor, given: Tensor) -> Tensor:
    y = m.stem(x)
    z = m.first(y).relu() + y
    return z + m.b(m.a(z) * m.gate(y.mean((2, 3), keepdim=True)).sigmoid()) + 0 * given.mean()


def _se_with_a_condition(m: Any, x: Tensor, given: Tensor) -> Tensor:
    y = m.a(x)
    return x + m.b(y * (m.squeeze(y.mean((2, 3), keepdim=True)) + _spread(m.condition(given))).sigmoid())


CASES: dict[str, Case] = {
    "film": Case(
        lambda: Two(_film, a=cbn(6, 5), b=cbn(5, 6), scale=nn.Linear(4, 5), shift=nn.Linear(4, 5)),
        lambda n: hostile(n, 4), ("mul", "add"),
    ),
    "an embedding of the time": Case(
        lambda: Two(_times, a=nn.ModuleList(cbn(6, 5) for _ in "ab"), b=nn.ModuleList(cbn(5, 6) for _ in "ab"),
                    time=nn.ModuleList(nn.Linear(4, 5) for _ in "ab"), embed=nn.Linear(3, 4)),
        lambda n: hostile(n, 3), ("add", "add"), removed=2, lowered=2,
    ),
    "a condition's gate": Case(
        lambda: Two(lambda m, x, g: x + m.b(m.a(x).relu() * _spread(m.gate(g).sigmoid())),
                    a=cbn(6, 5), b=cbn(5, 6), gate=nn.Linear(4, 5)),
        lambda n: hostile(n, 4), ("mul",),
    ),
    "a mask": Case(
        lambda: Two(_masked, a=nn.ModuleList(conv(6, 5, dim=1) for _ in "ab"),
                    b=nn.ModuleList(conv(5, 6, dim=1) for _ in "ab")),
        lambda n: hostile(n, 1, 9), ("mul",) * 6, (2, 6, 9), removed=2, lowered=2,
    ),
    "masks by choices": Case(
        lambda: Two(_filled, a=conv(6, 6, dim=1), b=conv(6, 6, dim=1)),
        lambda n: hostile(n, 1, 9), ("mul",) * 4, (2, 6, 9),
    ),
    "a term for every position": Case(
        lambda: Two(lambda m, x, g: (x + m.b((m.a(x) + g).relu())).relu(), a=cbn(6, 5), b=cbn(5, 6)),
        lambda n: hostile(n, 5, 7, 9), ("add",),
    ),
    "a factor for every position": Case(
        lambda: Two(lambda m, x, g: (x + m.b(g * m.a(x))).relu(), a=cbr(6, 5), b=cbn(5, 6)),
        lambda n: hostile(n, 5, 7, 9), ("mul",),
    ),
    "less a term": Case(
        lambda: Two(lambda m, x, g: x + m.b((g - m.a(x)).relu() - g), a=cbn(6, 5), b=cbn(5, 6)),
        lambda n: hostile(n, 5, 1, 1), ("add", "add"),
    ),
    "of a strided branch": Case(
        lambda: Two(lambda m, x, g: m.s(x) + m.b((m.a(x) + g).relu()), a=cbn(6, 5, 3, 2), b=cbn(5, 8),
                    s=cbn(6, 8, 1, 2)),
        lambda n: hostile(n, 5, 4, 5), ("add",),
    ),
    "two nonlinear branches": Case(
        lambda: Two(lambda m, x, g: m.b((m.a(x) + g).relu()) + m.d(m.c(x).relu() * g), a=cbn(6, 5), b=cbn(5, 6),
                    c=cbn(6, 5), d=cbn(5, 6)),
        lambda n: hostile(n, 5, 1, 1), ("add", "mul"), lowered=0,
    ),
    "features": Case(
        lambda: Two(lambda m, x, g: x + m.b((m.a(x) * m.scale(g) + m.shift(g)).relu()), a=nn.Linear(6, 8),
                    b=nn.Linear(8, 6), scale=nn.Linear(3, 8), shift=nn.Linear(3, 8)),
        lambda n: hostile(n, 3), ("mul",), (2, 6), removed=2,  # the sum of the scaled and the shift goes, too
    ),
    "tokens": Case(
        lambda: Two(lambda m, x, g: x + m.b((m.a(x) + m.shift(g)[:, None]).relu()), a=nn.Linear(6, 8),
                    b=nn.Linear(8, 6), shift=nn.Linear(3, 8)),
        lambda n: hostile(n, 3), ("add",), (2, 5, 6),
    ),
    "from before the fork": Case(
        lambda: Two(_gated_from_before, stem=cbr(6, 5), first=conv(5, 5), a=cbr(5, 6), b=cbn(6, 5), gate=conv(5, 6, 1)),
        lambda n: hostile(n, 2), ("mul", "add"), removed=2, lowered=2,
    ),
    "in a gate of the branch's own": Case(
        lambda: Two(_se_with_a_condition, a=cbr(6, 5), b=cbn(5, 6), squeeze=conv(5, 5, 1), condition=nn.Linear(3, 5)),
        lambda n: hostile(n, 3), ("add", "mul"),
    ),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "keep_bn": {"keep_bn": True},
    "conv": {"downsample": "conv", "fuse": "always"},
    "masked": {"carrier": "masked"},
}


def built(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with hostile weights, and its inputs."""
    torch.manual_seed(0)
    x, given = hostile(*case.shape), case.given(case.shape[0])
    return randomise(case.build().double(), (x / 8, given / 8)), x, given


def joins(network: nn.Module) -> list[str]:
    """The sums and products of a network."""
    return [name for name in operations(network) if name in ("add", "mul")]


@pytest.mark.parametrize(("name", "option"), list(itertools.product(CASES, OPTIONS)))
def test_the_sum_goes_and_what_enters_stays(name: str, option: str) -> None:
    case = CASES[name]
    model, x, given = built(case)
    converted = rmfx.convert(model, (x, given), verify=False, **OPTIONS[option])
    report = rmfx.report(converted)
    refused = [entry.reason or "" for entry in report.entries if entry.status != "removed"]
    assert report.count("removed") == case.removed and all("broadcasts" in reason for reason in refused)
    assert sorted(joins(converted)) == sorted(case.left)
    assert_equivalent(model, converted, x, given)
    assert_equivalent(model, converted, hostile(3, *case.shape[1:], seed=1), case.given(3))


@pytest.mark.parametrize("name", CASES)
def test_lowering_finds_the_shortcut_again(name: str) -> None:
    case = CASES[name]
    model, x, given = built(case)
    plain = rmfx.convert(model, (x, given), verify=False)
    lowered = rmfx.lower(plain)
    assert_equivalent(model, lowered, x, given)
    assert joins(lowered).count("add") == joins(plain).count("add") + case.lowered


@pytest.mark.parametrize("name", ["film", "a mask", "masks by choices", "tokens"])
def test_pruned_and_exported(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, x, given = built(case)
    plain = rmfx.convert(model.float(), (x.float(), given.float()))
    rmfx.export(plain, tmp_path / "net.onnx", (x.float(), given.float()))  # which compares
    pruned = rmfx.prune(plain, (x.float(), given.float()), importance="l2", budget={"macs": 0.7})
    assert pruned.macs[1] <= 0.7 * pruned.macs[0] and pruned.network(x.float(), given.float()).shape == x.shape


@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 9), 6), ((2, 6, 7, 9), 1)])
def test_pruning_is_exact_where_a_mask_meets_channels_that_nothing_reads(shape: tuple[int, ...], groups: int) -> None:
    torch.manual_seed(0)
    dim = len(shape) - 2
    first, last = conv(6, 12, groups=groups, dim=dim), conv(12, 6, dim=dim)
    model = Two(lambda m, x, g: m.last(m.first(x).relu() * (g > 0)), first=first, last=last).double()
    x, given = hostile(*shape), hostile(shape[0], 1, *shape[2:])
    randomise(model, (x / 8, given / 8))
    with torch.no_grad():
        last.weight[:, 1::2] = 0.0  # in each group of the first one, its second output
    pruned = rmfx.prune(model, (x, given), threshold=1e-12, importance="l2")
    assert [width.after for width in pruned.widths] == [6]
    assert_equivalent(model, pruned.network, x, given)


@pytest.mark.parametrize("operation", [operator.add, operator.mul])
@pytest.mark.parametrize("kind", [nn.Parameter, nn.Buffer])
def test_constants_for_every_position(operation: Any, kind: Any) -> None:
    torch.manual_seed(0)
    net = Net(
        lambda m, x: x + m.b(operation(m.a(x), m.grid).relu()), a=lambda: cbn(6, 5), b=lambda: cbn(5, 6),
        grid=lambda: kind(torch.randn(1, 5, 7, 9)),
    )  # fmt: skip
    converted = rmfx.convert(net.model, net.x, verify=False)
    assert rmfx.report(converted).count("removed") == 1 and joins(converted) == [operation.__name__]
    assert_equivalent(net.model, converted, net.x)


def test_what_is_added_is_exactly_zero_beside_the_branch() -> None:
    model, x, given = built(CASES["an embedding of the time"])
    converted = rmfx.convert(model, (x, given), verify=False)
    spreads = [module for name, module in converted.named_modules() if name.rpartition(".")[2].startswith("spread")]
    assert len(spreads) == 2
    for spread in spreads:
        term = spread(hostile(2, 5, 1, 1))
        assert (term == 0).all(0).sum() == 6 and (term != 0).all(0).sum() == 5


def test_a_sum_that_is_no_residual_is_not_reported() -> None:
    model, x, given = built(CASES["a term for every position"])
    assert [entry.status for entry in rmfx.explain(model, (x, given)).entries] == ["removed"]


REFUSED: dict[str, tuple[Any, Tensor, str]] = {
    "another type": (
        lambda m, x, g: x + m.b(m.a(x) + g.float()),
        hostile(2, 6, 1, 1),
        "'add' adds tensors of torch.float64 and torch.float32",
    ),
    "fewer dimensions": (
        lambda m, x, g: x + m.b(m.a(x) + g[0, 0]),
        hostile(2, 6, 7, 9),
        "'add' adds (7, 9) to (2, 6, 7, 9), which is no gate on channels",
    ),
    "a concat": (
        lambda m, x, g: x + m.c(torch.cat((m.a(x), g), 1).relu()),
        hostile(2, 6, 7, 9),
        "'cat' reads given, which nothing at the fork computes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    forward, given, reason = REFUSED[name]
    x = hostile(2, 6, 7, 9)
    model = Two(forward, a=cbn(6, 6), b=cbn(6, 6), c=cbn(12, 6)).double().eval()
    converted = rmfx.convert(model, (x, given))
    reasons = [entry.reason or "" for entry in rmfx.report(converted).entries]
    assert len(reasons) == 1 and reason in reasons[0], reasons
    assert_equivalent(model, converted, x, given)


C: dict[str, Any] = {"a": lambda: cbn(6, 6), "b": lambda: conv(6, 6)}


def names(own: frozenset[fx.Node]) -> list[str]:
    return sorted(node.name for node in own)


def test_the_latest_common_tensor_and_what_it_is_computed_from() -> None:
    net = Net(lambda m, x: (lambda y: y + m.b(y).relu() * x)(m.a(x)), **C)
    first, second = forks(net.join, 600)
    assert names(first) == ["a_1", "b", "mul", "relu"]
    assert second == {*first, *(net.nodes[name] for name in ("a_0", "x"))}
    assert forks(net.join, 1) == []


def test_two_tensors_that_both_branches_read() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, z = m.a(x).relu(), m.a(x).tanh()
        return m.b(y * z) + m.b(y) * z

    own = forks(Net(forward, **C).join, 600)
    assert [names(each) for each in own] == [["b", "b_1", "mul", "mul_1", "relu"], ["b", "mul", "mul_1", "tanh"]]


def test_a_fork_is_as_early_as_removes_most_sums() -> None:
    """Of the two sums behind ``y`` the first is none of one branch and its input, unless the fork is ``x``."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu() * m.grid
        return (m.b(y) + x).tanh() + y

    net = Net(forward, grid=lambda: nn.Parameter(torch.randn(1, 6, 7, 9)), **C)
    assert net.region.fork.name == "x" and [node.name for node in net.region.sums] == ["add", "add_1"]


def test_operands_that_are_constants_have_no_common_tensor() -> None:
    net = Net(lambda m, x: torch.cat((x, m.grid), 1), grid=lambda: nn.Parameter(torch.randn(2, 6, 7, 9)))
    assert forks(net.join, 600) == []
