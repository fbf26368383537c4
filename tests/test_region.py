"""Regions: what stands between a fork and a join, and why something may not stand there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import SqueezeExcite
from nets import cbn, cbr, conv
from regions import Net
from torch import nn

from rmfx.graph import region as regions
from rmfx.graph.region import Region, is_concat, is_residual

C = {"a": lambda: cbn(6, 6), "b": lambda: conv(6, 6)}


def names(region: Region) -> list[str]:
    return [node.name for node in region.nodes]


def test_the_nodes_of_a_region_and_its_ends() -> None:
    region = Net(lambda m, x: m.b(m.a(x).relu()) + m.c(x), c=lambda: conv(6, 6, 1), **C).region
    assert (region.fork.name, region.join.name) == ("x", "add")
    assert names(region) == ["a_0", "a_1", "relu", "b", "c"] and region.dims == 2 and region.gates == ()


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (lambda m, x: m.a(x) + m.b(x), C),
    "identity": (lambda m, x: m.a(x).relu() + x, C),
    "projection": (lambda m, x: m.a(x).relu() + m.b(x), C),
    "nonlinear": (lambda m, x: m.a(x).relu() + m.b(x).sigmoid(), C),
    "concat": (lambda m, x: torch.cat((m.a(x).relu(), m.b(x)), 1), C),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    forward, layers = KINDS[kind]
    region = Net(forward, **layers).region
    assert region.kind == kind and region.linear == (kind == "linear")


def test_a_linear_branch_through_a_sum_is_a_projection() -> None:
    region = Net(lambda m, x: m.a(x).relu() + (m.b(x) + m.b(m.a(x))), **C).region
    assert region.kind == "projection"


def test_sums_of_a_region() -> None:
    net = Net(lambda m, x: x + m.b(m.a(x) + x).relu(), **C)
    assert [node.name for node in net.region.sums] == ["add", "add_1"]
    joined = Net(lambda m, x: torch.cat((x + m.a(x).relu(), m.b(x)), 1), **C)
    assert [node.name for node in joined.region.sums] == ["add"], "a concat is no sum"


def test_readers_inside_stay_inside() -> None:
    net = Net(lambda m, x: (lambda y: torch.cat((y, m.b(y) + y, x), 1))(m.a(x).relu()), **C)
    assert names(net.region) == ["a_0", "a_1", "relu", "b", "add"]


def test_a_fork_is_as_late_as_can_be() -> None:
    net = Net(lambda m, x: (lambda y: m.b(y) + y)(m.a(x).relu()), **C)
    assert net.region.fork.name == "relu" and names(net.region) == ["b"]
    both = Net(lambda m, x: (lambda y: y + y)(m.a(x).relu()), **C)
    assert both.region.fork.name == "relu" and names(both.region) == []


def test_a_gate_is_beside_the_region() -> None:
    region = Net(lambda m, x: x + m.se(m.a(x)), se=lambda: SqueezeExcite(6), **C).region
    assert names(region) == ["a_0", "a_1", "mul"]
    (gate,) = region.gates
    assert gate.node.name == "mul" and [node.name for node in gate.reads] == ["a_1"]


@pytest.mark.parametrize(
    "forward", [lambda m, x: m.a(x + m.grid) + x, lambda m, x: m.a(m.grid * x) + x], ids=["added", "multiplied"]
)
def test_what_enters_from_outside_is_a_gate(forward: Any) -> None:
    region = Net(forward, grid=lambda: nn.Parameter(torch.randn(1, 6, 7, 9)), **C).region
    (gate,) = region.gates
    assert (gate.data.name, gate.factor.name, gate.outside) == ("x", "grid", True) and region.fork.name == "x"
    assert region.sums == (region.join,) and not region.linear
    assert gate.neutral == (0.0 if gate.node.name == "add" else 1.0)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "read outside": (
        lambda m, x: (lambda y: (m.b(y) + x, y, y.sigmoid()))(m.a(x).relu()),
        C,
        "'relu' inside the branch is also read outside, by output, sigmoid",
    ),
    "a sum inside broadcasts": (
        lambda m, x: m.b(m.a(x).relu() + m.pool(x)) + x,
        C | {"pool": lambda: nn.AdaptiveAvgPool2d(1)},
        "'add' broadcasts (2, 6, 7, 9) with (2, 6, 1, 1)",
    ),
    "an outer product": (
        lambda m, x: m.rows(m.a(x)) * m.columns(x).sigmoid() + x,
        C | {"rows": lambda: nn.AdaptiveAvgPool2d((None, 1)), "columns": lambda: nn.AdaptiveAvgPool2d((1, None))},
        "multiplies (2, 6, 7, 9) by ",
    ),
    "an unknown layer": (lambda m, x: m.n(m.a(x)) + x, C | {"n": lambda: nn.GroupNorm(2, 6)}, "'n', a GroupNorm on"),
    "an unknown function": (lambda m, x: m.a(x).sort(1)[0] + x, C, "'getitem', a getitem on the branch"),
}


class Attention(nn.Module):
    """One head over the positions, as reshapes and two products of matrices."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flatten(2)
        return (y @ (y.transpose(1, 2) @ y).softmax(-1)).reshape(x.shape)


def _normed_tokens(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.b(m.norm(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) + x


def _attention_behind_a_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.attend(m.group(x))
    return (m.b(y) + x) * y.mean()


DECISIVE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "attention": (
        lambda m, x: m.attend(m.a(x)) + x,
        C | {"attend": Attention},
        "a matmul on the branch, is attention or another product of matrices computed from the input",
    ),
    "a norm between reshapes": (
        _normed_tokens,
        C | {"norm": lambda: nn.LayerNorm(6)},
        "a LayerNorm on the branch, normalises by the mean and variance over all features of a position",
    ),
    "attention and a norm, and a reader outside": (
        _attention_behind_a_norm,
        C | {"attend": Attention, "group": lambda: nn.GroupNorm(2, 6)},
        "a matmul on the branch, is attention",
    ),
}


@pytest.mark.parametrize("name", DECISIVE)
def test_what_nothing_could_be_done_about_is_the_reason(name: str) -> None:
    forward, layers, reason = DECISIVE[name]
    assert reason in Net(forward, **layers).reason


def test_a_product_with_a_constant_matrix_is_no_attention() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(m.a(x), m.table).sort(1)[0] + x

    assert "a getitem on the branch" in Net(forward, table=lambda: nn.Parameter(torch.randn(9, 9)), **C).reason


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    forward, layers, reason = REFUSED[name]
    assert reason in Net(forward, **layers).reason


def test_products_need_shapes() -> None:
    net = Net(lambda m, x: x + m.se(m.a(x)), sized=False, se=lambda: SqueezeExcite(6), **C)
    assert net.reason == (
        "'mul' (in se) multiplies two tensors: pass example_inputs, their shapes tell which is the gate"
    )


def test_reads_of_sizes_are_no_readers() -> None:
    net = Net(lambda m, x: (lambda y: (m.b(y) + x) * y.shape[2])(m.a(x).relu()), **C)
    assert net.found() == net.region


def test_regions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()) + x, **C)
    monkeypatch.setattr(regions, "MOST_NODES", 4)
    assert net.reason == "more than 4 operations stand between the fork and the join"
    monkeypatch.setattr(regions, "MOST_NODES", 5)
    assert names(net.region) == ["a_0", "a_1", "relu", "b"]


def test_residual_sums() -> None:
    net = Net(lambda m, x: m.c(m.b(x) + m.a(x)) + m.grid, grid=lambda: nn.Parameter(torch.randn(1, 6, 1, 1)),
              c=lambda: nn.Softmax(1), **C)  # fmt: skip
    sums = {name: is_residual(node) for name, node in net.nodes.items() if name.startswith("add")}
    assert sums == {"add": True, "add_1": False}
    assert not any(is_residual(node) for name, node in net.nodes.items() if not name.startswith("add"))


def test_what_has_the_sizes_of_a_tensor_does_not_depend_on_it() -> None:
    net = Net(lambda m, x: m.a(x) + torch.arange(x.shape[3], device=x.device) * m.p, p=lambda: nn.Buffer(torch.ones(1)),
              **C)  # fmt: skip
    assert not is_residual(net.join)


def test_a_far_common_tensor_is_found() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.b(x)
        for _ in range(80):
            y = y.sigmoid()
        return y + m.c(m.a(x))

    assert is_residual(Net(forward, c=lambda: conv(6, 6, 1), **C).join)


def test_concats() -> None:
    net = Net(lambda m, x: torch.cat((m.a(x), m.b(x)), 1), **C)
    assert is_concat(net.join) and not any(is_concat(node) for node in net.gm.graph.nodes if node is not net.join)


def test_dims_come_from_the_layers() -> None:
    for dim, shape in ((1, (2, 6, 9)), (2, (2, 6, 7, 9)), (3, (2, 6, 3, 4, 5))):
        assert Net(lambda m, x: m.a(x) + x, shape, a=lambda dim=dim: cbr(6, 6, dim=dim)).region.dims == dim
    assert Net(lambda m, x: m.a(x) + x, (8, 6), a=lambda: nn.Linear(6, 6)).region.dims == 0
    assert Net(lambda m, x: x.relu() + x).region.dims is None
