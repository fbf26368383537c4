"""rmfx with Inductor: as its front, ``backend="rmfx"``, and as a pass of it."""

from __future__ import annotations

import copy
import gc
import logging
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import build
from oracle import relative_difference
from torch import Tensor, fx, nn
from torch._inductor import config, freezing
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes import mkldnn_fusion

from rmfx.backend import inductor_pass, inner
from rmfx.errors import RmfxError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler"),
]


ALL = {"policy": "all"}
FROZEN = {**ALL, "inner_options": {"freezing": True}}


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that Inductor compiles with weights as constants."""
    seen: list[fx.GraphModule] = []
    freeze = freezing._freeze

    def noted(dynamo: fx.GraphModule, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        result = freeze(dynamo, gm, inputs)
        seen.append(result[0])
        return result

    monkeypatch.setattr(freezing, "_freeze", noted)
    return seen


def sums(gm: fx.GraphModule) -> int:
    """Additions, also those inside of a convolution."""
    return sum("add" in str(node.target) or "binary" in str(node.target) for node in gm.graph.nodes)


def single(name: str) -> tuple[nn.Module, Tensor]:
    model, x = build(name)
    return model.float(), x.float()


def difference(model: nn.Module, run: Any, x: Tensor) -> float:
    """In units of what float32 loses anyhow."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        return relative_difference(exact, run(x).double()) / max(relative_difference(exact, model(x).double()), 1e-7)


def test_weights_are_constants_to_inductor(frozen: list[fx.GraphModule]) -> None:
    model, x = single("basic_chain")
    run = torch.compile(model, backend="rmfx", options=FROZEN)
    assert difference(model, run, x) < 10
    (gm,) = frozen
    assert sums(gm) == 0
    model[0][0].weight.data = model[0][0].weight.data * 2
    assert difference(model, run, x) < 10
    assert len(frozen) == 2


@pytest.mark.slow
def test_a_mode_of_inductor_and_the_planner(frozen: list[fx.GraphModule]) -> None:
    model, x = single("basic_chain")
    assert difference(model, torch.compile(model, backend="rmfx", mode="max-autotune-no-cudagraphs"), x) < 10
    assert len(frozen) == 1


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_of_frozen_and_live_code_runs(
    faster: bool, frozen: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[float] = []

    def judge(label: str, live: Any, constant: Any, pairs: int) -> Any:
        live(), constant()
        timed.append(len(frozen))
        return SimpleNamespace(verdict="faster" if faster else "as fast")

    monkeypatch.setattr(inner, "compare", judge)
    model, x = single("basic_chain")
    run = torch.compile(model, backend="rmfx", options=ALL)
    assert difference(model, run, x) < 10 and timed == [1]
    model[0][0].weight.data = model[0][0].weight.data * 2
    assert difference(model, run, x) < 10 and timed == [1], "decided once"
    assert len(frozen) == (2 if faster else 1)


def test_frozen_weights_are_let_go_of(frozen: list[fx.GraphModule]) -> None:
    model, x = single("basic_identity")
    run = torch.compile(model, backend="rmfx", options=FROZEN)
    before, counts = set(PyCodeCache.modules), []
    with torch.no_grad():
        for _ in range(4):
            model[0][0].weight.mul_(1.5)
            run(x), run(x)
            gc.collect()
            counts.append(len(set(PyCodeCache.modules) - before))
    assert len(frozen) == 4 and max(counts) <= 2


def test_freezing_can_be_switched_off(frozen: list[fx.GraphModule]) -> None:
    model, x = single("basic_identity")
    run = torch.compile(model, backend="rmfx", options={**ALL, "inner_options": {"freezing": False}})
    assert difference(model, run, x) < 10
    assert not frozen


def test_float64_and_a_dynamic_batch() -> None:
    model, _ = build("basic_identity")
    run = torch.compile(model, backend="rmfx", options=ALL)
    with torch.no_grad():
        for size in (2, 3, 5):
            x = torch.randn(size, 3, 8, 8, dtype=torch.float64) * 8
            assert relative_difference(model(x), run(x)) < 1e-12


def test_gradients_through_inductor() -> None:
    model, x = build("basic_identity")
    ours = copy.deepcopy(model)
    torch.compile(ours, backend="rmfx", options=ALL)(x).square().sum().backward()
    model(x).square().sum().backward()
    for want, got in zip(model.parameters(), ours.parameters(), strict=True):
        assert relative_difference(want.grad, got.grad) < 1e-12


# -- the pass ---------------------------------------------------------------------------------------------------------


unpacked = pytest.mark.usefixtures("_unpacked")


@pytest.fixture
def _unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are packed for oneDNN: torch 2.13 fails to make an exception of those in float64."""
    monkeypatch.setattr(mkldnn_fusion, "SUPPORTED_MKLDNN_DEVICES", ())


def passing(model: nn.Module, **options: Any) -> Any:
    """Inductor with the pass."""
    settings = {"freezing": True, "pre_grad_pass_timing": "early", "pre_grad_custom_pass": inductor_pass(model, **ALL)}
    return config.patch({**settings, **options})


def test_the_pass_on_packed_weights(frozen: list[fx.GraphModule]) -> None:
    model, x = single("basic_chain")
    with passing(model):
        assert difference(model, torch.compile(model), x) < 10
    assert [sums(gm) for gm in frozen] == [0]


@unpacked
@pytest.mark.parametrize("name", ["basic_chain", pytest.param("inverted_relu6", marks=pytest.mark.slow), "repvgg"])
def test_the_pass_removes_sums(name: str, frozen: list[fx.GraphModule]) -> None:
    model, x = build(name)
    with torch.no_grad(), passing(model):
        assert relative_difference(model(x), torch.compile(model)(x)) < 1e-12
        torch._dynamo.reset()
        with config.patch(pre_grad_custom_pass=None):
            assert relative_difference(model(x), torch.compile(model)(x)) < 1e-12
    with_pass, without = frozen
    assert sums(with_pass) == 0 < sums(without)


@unpacked
def test_the_pass_with_a_dynamic_batch_and_a_new_weight(frozen: list[fx.GraphModule]) -> None:
    model, _ = build("basic_identity")
    run = torch.compile(model)
    with torch.no_grad(), passing(model):
        for size in (2, 3, 5):
            x = torch.randn(size, 3, 8, 8, dtype=torch.float64) * 8
            assert relative_difference(model(x), run(x)) < 1e-12
        model[0][0].weight = nn.Parameter(model[0][0].weight * 2)
        assert relative_difference(model(x), run(x)) < 1e-12
    assert len(frozen) == 3


@unpacked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freezing": False}, "weights are inputs of the graph, not constants: set .*freezing = True"),
        (
            {"pre_grad_pass_timing": "default"},
            'the pass comes too late to bring weights: set .*pre_grad_pass_timing = "early"',
        ),
    ],
)
def test_the_pass_says_what_it_needs(options: dict[str, Any], message: str) -> None:
    model, x = build("basic_identity")
    with torch.no_grad(), passing(model, **options), pytest.raises(Exception, match=f"RmfxError: {message}"):
        torch.compile(model)(x)


def test_freezing_in_the_options_of_torch_compile_comes_too_late() -> None:
    model, x = build("basic_identity")
    settings = {"freezing": True, "pre_grad_pass_timing": "early", "pre_grad_custom_pass": inductor_pass(model, **ALL)}
    with torch.no_grad(), pytest.raises(Exception, match="RmfxError: weights are inputs of the graph"):
        torch.compile(model, options=settings)(x)


def test_the_pass_leaves_training_alone(caplog: pytest.LogCaptureFixture) -> None:
    model, x = build("basic_identity")
    ours = copy.deepcopy(model)
    with passing(ours), caplog.at_level(logging.INFO, "rmfx"):
        torch.compile(ours)(x).square().sum().backward()
    model(x).square().sum().backward()
    for want, got in zip(model.parameters(), ours.parameters(), strict=True):
        assert relative_difference(want.grad, got.grad) < 1e-12
    assert "gradients are enabled" in caplog.text


class Written(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@unpacked
def test_the_pass_leaves_what_it_refuses(caplog: pytest.LogCaptureFixture) -> None:
    body, x = build("basic_identity")
    model = nn.Sequential(Written(), body)
    mine, theirs = x.clone(), x.clone()
    with torch.no_grad(), passing(model):
        assert relative_difference(model(mine), torch.compile(model)(theirs)) < 1e-12
    assert torch.equal(mine, theirs) and "it writes into its input" in caplog.text


def test_the_uuid_covers_weights_and_options() -> None:
    model, _ = build("basic_identity")
    one = inductor_pass(model)
    before = one.uuid()
    assert before == inductor_pass(copy.deepcopy(model)).uuid() != inductor_pass(model, carrier="split").uuid()
    model[0][0].weight.data.mul_(2)
    assert one.uuid() != before


def test_bad_options_of_the_pass() -> None:
    with pytest.raises(RmfxError, match="inductor_pass has no option 'inner'; it has 'carrier', 'concat'"):
        inductor_pass(nn.Linear(2, 2), inner="eager")


@pytest.mark.gpu
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_on_a_gpu(inner: str) -> None:
    model, x = build("basic_chain")
    model, x = model.cuda(), x.cuda()
    run = torch.compile(model, backend="rmfx", options={**ALL, "inner": inner})
    with torch.no_grad():
        assert relative_difference(model(x), run(x)) < 1e-12
        model[0][0].weight.mul_(2)
        assert relative_difference(model(x), run(x)) < 1e-12
    torch.compile(model, backend="rmfx", options={**ALL, "inner": inner})(x).sum().backward()
    assert model[0][0].weight.grad is not None
