"""``torch.compile(model, backend="rmfx")`` on weights that change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiling import EAGER, assert_same, compiled, in_place, loaded, replaced
from nets import build
from oracle import relative_difference
from torch import nn
from torch.nn import functional as F

from rmfx.backend.bound import Bound

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
