"""The oracle can fail: every kind of mistake a conversion makes is seen, and a right conversion passes."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import DYADIC, NETS, build, build_dyadic
from oracle import (
    assert_equal_exactly,
    assert_equivalent,
    assert_equivalent_on,
    hostile_inputs,
    outputs,
    relative_difference,
)
from torch import Tensor, nn

SHAPE = (2, 3, 8, 8)


def plain_twin(model: nn.Module) -> nn.Sequential:
    """NETS["biased"] without its shortcut, by hand: reserve ``c`` channels with Dirac taps, merge them at the end."""
    stem, block = model
    first, _, last = block.branch
    c = first.in_channels
    reserve = nn.Conv2d(c, first.out_channels + c, 3, padding=1).double()
    merge = nn.Conv2d(first.out_channels + c, c, 3, padding=1).double()
    taps = torch.zeros(c, c, 3, 3, dtype=torch.float64)
    taps[range(c), range(c), 1, 1] = 1
    with torch.no_grad():
        reserve.weight.copy_(torch.cat([first.weight, taps]))
        reserve.bias.copy_(torch.cat([first.bias, torch.zeros(c)]))
        merge.weight.copy_(torch.cat([last.weight, taps], dim=1))
        merge.bias.copy_(last.bias)
    return nn.Sequential(*copy.deepcopy(stem), reserve, nn.ReLU(), merge, nn.ReLU()).eval()


RESERVE, MERGE = 3, 5  # positions of the two widened convs in the twin


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Sequential]:
    model, _ = build("biased")
    return model, plain_twin(model)


def test_a_right_conversion_passes(pair: tuple[nn.Module, nn.Sequential]) -> None:
    original, twin = pair
    assert_equivalent_on(original, twin, SHAPE)


def test_a_right_conversion_is_exactly_equal_on_dyadic_weights() -> None:
    model, x = build_dyadic("biased")
    assert_equal_exactly(model, plain_twin(model), x)


@pytest.mark.parametrize("layer", [0, RESERVE, MERGE])
def test_one_weight_perturbed(pair: tuple[nn.Module, nn.Sequential], layer: int) -> None:
    original, twin = pair
    with torch.no_grad():
        weight = twin[layer].weight.view(-1)
        weight[weight.abs().argmax()] *= 1 + 1e-9
    with pytest.raises(AssertionError, match="differs by"):
        assert_equivalent_on(original, twin, SHAPE)


@pytest.mark.parametrize("layer", [RESERVE, MERGE])
def test_a_bias_dropped(pair: tuple[nn.Module, nn.Sequential], layer: int) -> None:
    original, twin = pair
    twin[layer].bias = None
    with pytest.raises(AssertionError, match="differs by"):
        assert_equivalent_on(original, twin, SHAPE)


def test_a_clamp_dropped() -> None:
    original, _ = build("inverted_relu6")
    wrong = copy.deepcopy(original)
    wrong[1].branch[1][2] = nn.ReLU()
    assert isinstance(original[1].branch[1][2], nn.ReLU6)
    with pytest.raises(AssertionError, match="differs by"):
        assert_equivalent_on(original, wrong, SHAPE)


def test_two_channels_swapped(pair: tuple[nn.Module, nn.Sequential]) -> None:
    original, twin = pair
    order = [1, 0, *range(2, twin[MERGE].out_channels)]
    with torch.no_grad():
        twin[MERGE].weight.copy_(twin[MERGE].weight[order])
        twin[MERGE].bias.copy_(twin[MERGE].bias[order])
    with pytest.raises(AssertionError, match="differs by"):
        assert_equivalent_on(original, twin, SHAPE)


@pytest.mark.parametrize("channel", range(6))
def test_one_carried_tap_scaled(pair: tuple[nn.Module, nn.Sequential], channel: int) -> None:
    original, twin = pair
    with torch.no_grad():
        twin[RESERVE].weight[-6 + channel, channel, 1, 1] *= 1 + 1e-6
    with pytest.raises(AssertionError, match="differs by"):
        assert_equivalent_on(original, twin, SHAPE)


def test_the_exact_comparison_sees_the_last_bit() -> None:
    model, x = build_dyadic("biased")
    twin = plain_twin(model)
    with torch.no_grad():
        twin[MERGE].bias[0] += 2.0**-30
    with pytest.raises(AssertionError, match="elements differ"):
        assert_equal_exactly(model, twin, x)


class Changed(nn.Module):
    """``change(model(x))``."""

    def __init__(self, model: nn.Module, change: object) -> None:
        super().__init__()
        self.model = model
        self.change = change

    def forward(self, x: Tensor) -> object:
        return self.change(self.model(x))  # type: ignore[operator]


def with_one_nan(y: Tensor) -> Tensor:
    return y.index_fill(3, torch.tensor([0]), torch.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_one_nan, "converted model is not finite"),
        (lambda y: y * torch.inf, "converted model is not finite"),
        (torch.zeros_like, "converted model is constant"),
        (lambda y: y[:, :, 1:], "has shape"),
        (lambda y: (y, y), "output structure changed"),
        (lambda y: y.float(), "is torch.float32"),
    ],
)
def test_broken_outputs(pair: tuple[nn.Module, nn.Sequential], change: object, message: str) -> None:
    original, twin = pair
    with pytest.raises(AssertionError, match=message):
        assert_equivalent_on(original, Changed(twin, change).eval(), SHAPE)


def test_every_output_is_compared(pair: tuple[nn.Module, nn.Sequential]) -> None:
    original, twin = pair
    right = Changed(original, lambda y: {"a": y, "b": (y, 2 * y)}).eval()
    wrong = Changed(twin, lambda y: {"a": y, "b": (y, 2 * y + 1e-6)}).eval()
    with pytest.raises(AssertionError, match="output 2 differs"):
        assert_equivalent_on(right, wrong, SHAPE)


def test_a_constant_original_is_no_evidence(pair: tuple[nn.Module, nn.Sequential]) -> None:
    original, _ = pair
    dead = Changed(original, torch.zeros_like).eval()
    with pytest.raises(AssertionError, match="original model is constant"):
        assert_equivalent_on(dead, dead, SHAPE)


def test_tame_inputs_and_training_mode_are_refused(pair: tuple[nn.Module, nn.Sequential]) -> None:
    original, twin = pair
    with pytest.raises(AssertionError, match="too tame"):
        assert_equivalent(original, twin, torch.rand(2, 3, 8, 8) * 100)
    with pytest.raises(AssertionError, match="batch 1"):
        assert_equivalent(original, twin, torch.randn(1, 3, 8, 8) * 8)
    with pytest.raises(AssertionError, match="eval mode"):
        assert_equivalent(original, twin.train(), torch.randn(2, 3, 8, 8) * 8)


def test_a_nan_makes_the_difference_infinite() -> None:
    assert relative_difference(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])) == float("inf")


def test_hostile_inputs_are_signed_and_odd_and_even() -> None:
    batches = hostile_inputs((2, 3, 8, 9))
    assert [tuple(x.shape) for x in batches] == [(2, 3, 8, 9), (2, 3, 9, 10), (2, 3, 8, 9)]
    assert all(x.min() < -6 and x.max() > 6 for x in batches)
    assert batches[2][:, :, 1:-1, 1:-1].abs().max() == 0 and batches[2][:, :, 0].abs().min() >= 20
    assert all(torch.equal(a, b) for a, b in zip(batches, hostile_inputs((2, 3, 8, 9)), strict=True))


@pytest.mark.parametrize("name", NETS)
def test_no_branch_of_the_shared_networks_is_dead(name: str) -> None:
    """Every conv, linear and norm output varies in every channel, and silencing it changes the network's output."""
    model, x = build(name)
    (before,) = outputs(model, x)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    for layer in layers:
        kept = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.zero_()
            (silent,) = outputs(model, x)
            layer.weight.copy_(kept)
        assert relative_difference(before, silent) > 1e-2, f"{layer} hardly matters"


@pytest.mark.parametrize("name", DYADIC)
def test_dyadic_networks_never_round(name: str) -> None:
    """All values are multiples of 2**-20 below 2**32: 53 bits hold them and every product on the way."""
    model, x = build_dyadic(name)
    values: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _m, _a, y: values.append(y)) for m in model.modules()]
    (y,) = outputs(model, x)
    for handle in handles:
        handle.remove()
    assert y.max() > y.min()
    for value in values:
        assert torch.equal(value * 2**20, (value * 2**20).round()) and value.abs().max() < 2**32
