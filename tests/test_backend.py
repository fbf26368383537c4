"""``torch.compile(model, backend="rmfx")``: what is converted, in graphs and sizes of any kind."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from compiling import assert_same, compiled, in_place, loaded, replaced
from nets import NETS, build
from oracle import relative_difference
from torch import Tensor, nn
from torch.nn import functional as F

from rmfx.backend.bound import Bound

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("fresh_dynamo")]


def test_it_is_registered() -> None:
    assert "rmfx" in torch._dynamo.list_backends()


@pytest.mark.parametrize("name", sorted(NETS))
def test_every_block_is_converted_and_equal(name: str, folds: list[Bound]) -> None:
    model, x = build(name)
    assert_same(model, compiled(model), x)
    assert len(folds) == 1


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("mobilenet_v2", "shufflenet_v2_x0_5", "efficientnet_b0")),
    ],
)
def test_networks_of_torchvision(name: str, folds: list[Bound]) -> None:
    torchvision = pytest.importorskip("torchvision")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = getattr(torchvision.models, name)(weights=None).double().eval()
    run = compiled(model)
    assert_same(model, run, x)
    loaded(next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d)))
    assert_same(model, run, x)
    assert len(folds) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_both_ways_to_ask_for_inference(mode: Any, folds: list[Bound]) -> None:
    model, x = build("basic_chain")
    run = compiled(model)
    with mode():
        for _ in range(2):
            assert relative_difference(model(x), run(x)) < 1e-12
    assert len(folds) == 1


def test_what_is_converted_under_inference_mode_runs_under_no_grad(folds: list[Bound]) -> None:
    model, x = build("basic_identity")
    run = compiled(model)
    with torch.inference_mode():
        run(x)
    assert_same(model, run, x)
    assert folds


def test_the_report_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, x = build("basic_chain")
    with caplog.at_level(logging.INFO, "rmfx"):
        assert_same(model, compiled(model), x)
    assert "3 residual sums removed, 0 kept, 0 refused" in caplog.text


class Flat(nn.Module):
    """Reads the batch's size as a number, which Dynamo passes as an input."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).view(x.shape[0], -1)


@pytest.mark.parametrize("flat", [False, True])
def test_a_dynamic_batch(flat: bool, folds: list[Bound]) -> None:
    model, _ = build("basic_chain")
    model = Flat(model) if flat else model
    run = compiled(model)
    for size in (2, 3, 5, 7, 2):
        assert_same(model, run, torch.randn(size, 3, 8, 8, dtype=torch.float64))
    assert len(folds) == 2


def test_a_conversion_for_some_sizes_is_not_used_where_sizes_are_free(caplog: pytest.LogCaptureFixture) -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 2), nn.ReLU(), nn.Conv2d(3, 3, 2, padding=1))

    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.short = nn.Conv2d(3, 3, 2, 2), nn.Conv2d(3, 3, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.branch(x)) + self.short(x)

    model = nn.Sequential(block, Strided()).double().eval()
    run = compiled(model)
    for size in (8, 10, 12, 14):
        assert_same(model, run, torch.randn(2, 3, size, size, dtype=torch.float64))
    assert "sizes of l_" in caplog.text and "are free" in caplog.text


class Broken(nn.Module):
    """A model that Dynamo cuts into two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, _ = build("basic_identity")
        self.second, _ = build("inverted_relu6")

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y[:, :3])


def test_graph_breaks(folds: list[Bound]) -> None:
    model = Broken()
    run = compiled(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert_same(model, run, x)
    assert len({id(bound) for bound in folds}) == 2
    in_place(model.second[0][0])
    assert_same(model, run, x)
    assert len(folds) == 3  # the first graph's weights are what they were


def test_two_models_of_the_same_names_in_one_graph(folds: list[Bound]) -> None:
    (first, x), (second, _) = build("basic_identity", 0), build("basic_identity", 1)

    def both(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
        return first(x) - 2 * second(x)

    run = compiled(both)
    assert_same(both, run, first, second, x)
    replaced(second[0][0])
    assert_same(both, run, first, second, x)
    assert len(folds) == 2


def test_two_models_compiled_side_by_side() -> None:
    (first, x), (second, _) = build("basic_identity", 0), build("basic_identity", 1)
    runs = compiled(first), compiled(second)
    for _ in range(2):
        assert_same(first, runs[0], x)
        assert_same(second, runs[1], x)


def test_code_that_counts_its_calls(folds: list[Bound]) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, _ = build("basic_identity")
            self.scale, self.steps = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64)), 0
            self.register_buffer("shift", torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1  # from here on, Dynamo reads its layers and tensors through `self.__dict__`
            return self.block(x) * self.scale + self.shift + self.steps

    model, x = Counting().eval(), build("basic_identity")[1]
    run = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            expected = model(x) + 1
            assert relative_difference(expected, run(x)) < 1e-12
        model.scale.mul_(2)
        expected = model(x) + 1
        assert relative_difference(expected, run(x)) < 1e-12
    read = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    assert folds and all(len(bound._weights) == len(read) for bound in folds)
