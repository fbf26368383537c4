"""``torch.compile(model, backend="rmfx")``: what is converted, what is not, and weights that change."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nets import NETS, build
from oracle import relative_difference
from torch import Tensor, nn
from torch.nn import functional as F

import rmfx
from rmfx.backend.bound import Bound
from rmfx.backend.compiler import _warn_once
from rmfx.errors import VerificationError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
EAGER = {"inner": "eager", "policy": "all"}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    _warn_once.cache_clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[Bound]:
    """The graph of each conversion, as they happen."""
    seen: list[Bound] = []
    convert = Bound._converted

    def noted(self: Bound, args: tuple[Any, ...]) -> Callable[..., Any]:
        seen.append(self)
        return convert(self, args)

    monkeypatch.setattr(Bound, "_converted", noted)
    return seen


def compiled(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="rmfx", options={**EAGER, **options})


def assert_same(model: Callable[..., Any], run: Callable[..., Any], *inputs: Any) -> None:
    with torch.no_grad():
        assert relative_difference(model(*inputs), run(*inputs)) < 1e-12


def test_it_is_registered() -> None:
    assert "rmfx" in torch._dynamo.list_backends()


@pytest.mark.parametrize("name", sorted(NETS))
def test_every_block_is_converted_and_equal(name: str, folds: list[Bound]) -> None:
    model, x = build(name)
    assert_same(model, compiled(model), x)
    assert len(folds) == 1


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "shufflenet_v2_x0_5", "efficientnet_b0"])
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


# -- weights that change ----------------------------------------------------------------------------------------------


def in_place(layer: nn.Conv2d) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def in_inference_mode(layer: nn.Conv2d) -> None:
    with torch.inference_mode():
        layer.weight.mul_(2)


def replaced(layer: nn.Conv2d) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def loaded(layer: nn.Conv2d) -> None:
    layer.load_state_dict({name: tensor * 2 for name, tensor in layer.state_dict().items()})


def loaded_by_assignment(layer: nn.Conv2d) -> None:
    layer.load_state_dict({name: tensor * 2 for name, tensor in layer.state_dict().items()}, assign=True)


def other_storage(layer: nn.Conv2d) -> None:
    layer.weight.data = layer.weight.data * 2


def other_storage_twice(layer: nn.Conv2d) -> None:
    layer.weight.data = layer.weight.data * 2
    layer.weight.data = layer.weight.data * 2  # into the memory that the first weights left, were it free


def trained(layer: nn.Conv2d) -> None:
    layer(torch.ones(1, layer.in_channels, 5, 5, dtype=torch.float64)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()


CHANGES = [in_place, in_inference_mode, replaced, loaded, loaded_by_assignment, other_storage, other_storage_twice]


@pytest.mark.parametrize("change", [*CHANGES, trained])
def test_weights_are_folded_again_when_they_change(change: Callable[[nn.Module], None], folds: list[Bound]) -> None:
    model, x = build("biased")
    run = compiled(model)
    assert_same(model, run, x)
    before = model(x).detach()
    change(model[0][0])
    assert relative_difference(before, model(x).detach()) > 1e-3
    for _ in range(2):
        assert_same(model, run, x)
    assert len(folds) == 2


def test_a_buffer_that_changes(folds: list[Bound]) -> None:
    model, x = build("biased")
    run = compiled(model)
    assert_same(model, run, x)
    model[0][1].running_var.mul_(3)
    assert_same(model, run, x)
    assert len(folds) == 2


def test_a_write_through_data_is_seen_by_hash_only(folds: list[Bound]) -> None:
    model, x = build("biased")
    by_version, by_hash = compiled(model), torch.compile(model, backend="rmfx", options={**EAGER, "check": "hash"})
    with torch.no_grad():
        stale = by_version(x)
        by_hash(x)
        model[0][0].weight.data.mul_(2)
        assert torch.equal(by_version(x), stale)  # the documented limit
    for _ in range(2):
        assert_same(model, by_hash, x)


def test_inference_tensors_are_always_hashed(folds: list[Bound]) -> None:
    with torch.inference_mode():
        model, x = build("biased")
        run = compiled(model)
        assert relative_difference(model(x), run(x)) < 1e-12
        model[0][0].weight.mul_(2)
        for _ in range(2):
            assert relative_difference(model(x), run(x)) < 1e-12
    assert len(folds) == 2


def test_weights_that_change_before_every_call_are_no_more_bound(
    folds: list[Bound], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = build("biased")
    run = compiled(model)
    for _ in range(8):
        assert_same(model, run, x)
        in_place(model[0][0])
    assert len(folds) == 4 and caplog.text.count("weights changed before each of 4 calls") == 1


def test_the_caller_draws_the_same_random_numbers() -> None:
    model, x = build("basic_identity")
    run = compiled(lambda x: F.dropout(model(x), 0.5, True))
    with torch.no_grad():
        torch.manual_seed(1)
        want = F.dropout(model(x), 0.5, True)
        after = torch.get_rng_state()
        torch.manual_seed(1)
        assert relative_difference(want, run(x)) < 1e-12
        assert torch.equal(torch.get_rng_state(), after)


# -- graphs and sizes -------------------------------------------------------------------------------------------------


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


# -- what is left as it is --------------------------------------------------------------------------------------------


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


# -- options ----------------------------------------------------------------------------------------------------------


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
