"""``torch.compile(model, backend="rmfx")`` on weights that change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiling import EAGER, assert_same, compiled, in_place, loaded, replaced
from nets import build
from oracle import relative_difference
from torch import Tensor, nn
from torch.nn import functional as F

from rmfx.backend.bound import Bound
from rmfx.backend.stamp import Stamp

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("fresh_dynamo")]


def in_inference_mode(layer: nn.Conv2d) -> None:
    with torch.inference_mode():
        layer.weight.mul_(2)


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


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_steps_of_fused_optimisers(optimiser: type[torch.optim.Optimizer], folds: list[Bound]) -> None:
    model, x = build("biased")
    run = compiled(model)
    assert_same(model, run, x)
    before = model(x).detach()
    model(x).square().mean().backward()
    versions = [weight._version for weight in model.parameters()]
    optimiser(model.parameters(), lr=0.1, fused=True).step()  # type: ignore[call-arg]
    assert versions == [weight._version for weight in model.parameters()], "no counter tells of it"
    assert relative_difference(before, model(x).detach()) > 1e-3
    for _ in range(2):
        assert_same(model, run, x)
    assert len(folds) == 2


@pytest.mark.parametrize("gradients", [False, True])
def test_statistics_that_norms_update(gradients: bool, folds: list[Bound]) -> None:
    model, x = build("biased")
    run = compiled(model)
    assert_same(model, run, x)
    before = model(x).detach()
    with torch.set_grad_enabled(gradients):
        model.train()(3 * x + 1)
    model.eval()
    assert relative_difference(before, model(x).detach()) > 1e-3
    for _ in range(2):
        assert_same(model, run, x)
    assert len(folds) == 2


def test_an_uncounted_write_into_the_middle_is_seen_by_hash_only(folds: list[Bound]) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return (x := self.first(x)) + self.second(x.relu())

    model, x = Wide().eval().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    by_version, by_hash = compiled(model), torch.compile(model, backend="rmfx", options={**EAGER, "check": "hash"})
    with torch.no_grad():
        stale = by_version(x)
        by_hash(x)
        model.second.weight.data[7] = 0
        assert torch.equal(by_version(x), stale)  # the documented limit
        assert_same(model, by_hash, x)
        model.second.weight.data[0] = 0  # its first elements
    for run in (by_version, by_hash):
        assert_same(model, run, x)


@pytest.mark.gpu
def test_a_cuda_graph_can_be_recorded(folds: list[Bound]) -> None:
    model, x = build("biased")
    model, x = model.cuda(), x.cuda()
    run = compiled(model)
    assert_same(model, run, x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            recorded = run(x)
        graph.replay()
        assert relative_difference(model(x).cpu(), recorded.cpu()) < 1e-12
    assert len(folds) == 1


def test_weights_with_gaps_are_always_hashed() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    weight = whole[:, :2]
    stamp = Stamp.of([weight])
    assert stamp.hashed == [weight] and stamp.holds([weight])
    whole.numpy()[0, 3] = 50  # in a gap
    assert stamp.holds([weight])
    whole.numpy()[1, 1] = 50
    assert not stamp.holds([weight])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128, torch.bool, torch.int64, torch.float8_e4m3fn])
def test_contents_of_all_types_are_compared_bit_by_bit(dtype: torch.dtype) -> None:
    base = torch.ones(3, 2, dtype=torch.float64).to(dtype)
    weights = [base.t(), torch.full((3,), torch.nan), torch.ones(0)]
    stamp = Stamp.of(weights)
    assert stamp.holds(weights), "NaN is NaN"
    base.view(torch.uint8).numpy()[-1, -1] ^= 1
    assert not stamp.holds(weights)


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
