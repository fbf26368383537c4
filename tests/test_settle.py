"""Computed weights become plain ones; the caller's model keeps its machinery and its numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from front import Lambda, assert_exact, bn, image, normal_form, operations, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import rmfx
from rmfx import bounds_from_data, convert, report
from rmfx.errors import UnsupportedModelError
from rmfx.front.trace import trace


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


class Symmetric(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.transpose(2, 3)) * self.gain


def _parametrized() -> nn.Conv2d:
    layer = conv()
    parametrize.register_parametrization(layer, "weight", Symmetric())
    parametrize.register_parametrization(layer, "weight", Symmetric())
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return layer


def _pruned() -> nn.Conv2d:
    layer = conv()
    prune.l1_unstructured(layer, "weight", amount=0.4)
    prune.random_unstructured(layer, "weight", amount=0.3)  # a container of two masks
    prune.random_unstructured(layer, "bias", amount=0.5)
    return layer


SETTLED: dict[str, Callable[[], nn.Module]] = {
    "parametrization": _parametrized,
    "weight norm": lambda: parametrizations.weight_norm(conv()),
    "spectral norm": lambda: parametrizations.spectral_norm(conv()),
    "orthogonal": lambda: parametrizations.orthogonal(conv()),
    "old weight norm": lambda: weight_norm(conv()),
    "old spectral norm": lambda: spectral_norm(conv()),
    "pruning": _pruned,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", SETTLED)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_computed_weights_become_plain(name: str, used: bool) -> None:
    model = nn.Sequential(SETTLED[name](), bn(4), nn.ReLU()).double().eval()
    if used:
        model(image())
    classes = [type(module) for module in model.modules()]
    gm = assert_exact(model, image())
    assert operations(gm) == ["Conv2d", "BatchNorm2d", "ReLU"]
    layer = gm.get_submodule("0")
    assert type(layer) is nn.Conv2d and not layer._forward_pre_hooks and not parametrize.is_parametrized(layer)
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    assert layer.weight.requires_grad
    # The caller's layer still computes its weight on every call.
    assert [type(module) for module in model.modules()] == classes
    before = run(model, image())[0][0]
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.add_(torch.rand_like(parameter))
    assert not torch.equal(run(model, image())[0][0], before)
    assert not torch.equal(run(gm, image())[0][0], run(model, image())[0][0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", SETTLED)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_connections_around_computed_weights_are_removed(name: str, used: bool) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        return x + m.second(m.first(x).relu())

    model = Lambda(forward, first=SETTLED[name](), second=SETTLED[name]()).double().eval()
    if used:
        model(image())
    result = convert(model, image())
    assert report(result).count("removed") == 1
    expected = run(model, image())[0][0]
    assert (run(result, image())[0][0] - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_models_that_torch_refuses_to_copy_are_pruned_and_measured(used: bool) -> None:
    model = nn.Sequential(weight_norm(conv()), nn.ReLU(), weight_norm(conv())).eval()
    if used:
        model(image().float())
    pruned = rmfx.prune(model, image().float(), amount=0.25, importance="l1")
    assert [width.after for width in pruned.widths] == [3]
    low, high = bounds_from_data(model, [image().float()], margin=0)["_1"]
    assert low == 0 < high


def test_a_copy_of_the_model_still_works_after_settling() -> None:
    """Classes are shared by deep copies: taking a parametrization off the class would break the others."""
    model = nn.Sequential(_parametrized()).double().eval()
    twin = copy.deepcopy(model)
    expected = run(model, image())[0][0]
    normal_form(model)
    assert torch.equal(run(twin, image())[0][0], expected)
    assert torch.equal(run(model, image())[0][0], expected)


def test_a_weight_tied_to_a_parametrized_one_is_left_alone() -> None:
    first, second = conv(), conv()
    second.weight = first.weight
    parametrize.register_parametrization(first, "weight", Symmetric())
    gm = assert_exact(nn.Sequential(first, second), image())
    assert not torch.equal(gm.get_parameter("0.weight"), gm.get_parameter("1.weight"))


def test_a_frozen_parametrized_weight_stays_frozen() -> None:
    layer = conv().requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    assert not trace(nn.Sequential(layer).eval()).get_parameter("0.weight").requires_grad


def test_a_parametrized_buffer_stays_a_buffer() -> None:
    model = Lambda(lambda m, x: x * m.scale, scale=torch.rand(5))
    parametrize.register_parametrization(model, "scale", nn.Tanh())
    gm = assert_exact(model, image())
    assert operations(gm) == ["ChannelAffine"]


# -- hooks ------------------------------------------------------------------------------------------------------------


def double_the_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 2


def shift_the_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] - 1.0,)


def test_a_hook_on_a_layer_is_refused() -> None:
    model = nn.Sequential(conv(), nn.Sequential(bn(4))).eval()
    model[1][0].register_forward_hook(double_the_output)
    with pytest.raises(
        UnsupportedModelError, match=r"layer 1.0 \(BatchNorm2d\) has a forward hook, .*double_the_output"
    ):
        trace(model)


def test_a_pre_hook_on_a_layer_is_refused() -> None:
    model = nn.Sequential(conv()).eval()
    model[0].register_forward_pre_hook(shift_the_input)
    with pytest.raises(UnsupportedModelError, match="shift_the_input, whose effect cannot be put into the graph"):
        trace(model)


def test_a_hook_inside_a_layer_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2)).eval()
    model[0].out_proj.register_forward_hook(double_the_output)
    with pytest.raises(UnsupportedModelError, match=r"layer 0.out_proj \(NonDynamicallyQuantizableLinear\)"):
        trace(model)


def test_a_hook_on_the_model_itself_is_refused() -> None:
    model = nn.Sequential(conv()).eval()
    model.register_forward_hook(double_the_output)
    with pytest.raises(UnsupportedModelError, match="the model itself has a forward hook, .*double_the_output: remove"):
        trace(model)


def test_hooks_on_blocks_are_in_the_graph() -> None:
    model = nn.Sequential(nn.Sequential(conv(), nn.ReLU()), conv())
    model[0].register_forward_hook(double_the_output)
    model[0].register_forward_pre_hook(shift_the_input)
    gm = assert_exact(model, image())
    assert operations(gm) == ["sub", "Conv2d", "ReLU", "ChannelAffine", "Conv2d"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("holder", [nn.ModuleList, lambda blocks: nn.ModuleDict({"only": blocks[0]})])
@pytest.mark.parametrize("name", SETTLED)
def test_what_lists_of_modules_hold_is_settled(holder: Callable[[list[nn.Module]], nn.Module], name: str) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        for block in m.blocks.values() if isinstance(m.blocks, nn.ModuleDict) else m.blocks:
            x = block(x)
        return x

    block = nn.Sequential(SETTLED[name](), nn.ReLU())
    block.register_forward_hook(double_the_output)
    gm = assert_exact(Lambda(forward, blocks=holder([block])), image())
    assert operations(gm) == ["Conv2d", "ReLU", "ChannelAffine"]


def test_a_hook_on_a_layer_in_a_list_is_refused() -> None:
    model = Lambda(lambda m, x: m.blocks[0](x), blocks=nn.ModuleList([conv()])).eval()
    model.blocks[0].register_forward_hook(double_the_output)
    with pytest.raises(UnsupportedModelError, match=r"layer blocks.0 \(Conv2d\) has a forward hook"):
        trace(model)


def test_backward_hooks_do_not_matter() -> None:
    seen: list[Any] = []
    model = nn.Sequential(conv(), nn.Sequential(conv()))
    for module in (model[0], model[1]):
        module.register_full_backward_hook(lambda *args: seen.append(args))
    gm = assert_exact(model, image())
    assert operations(gm) == ["Conv2d", "Conv2d"]
    assert not any(module._backward_hooks for module in gm.modules())
    assert model[0]._backward_hooks  # the caller's are still there
