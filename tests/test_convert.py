"""rmfx.convert from end to end: every network of tests/nets.py, every option, the same function."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from front import Lambda, hostile, operations
from nets import DYADIC, NETS, build, build_dyadic, conv
from oracle import assert_equal_exactly, assert_equivalent, assert_equivalent_on
from torch import Tensor, fx, nn

import rmfx
from rmfx.front.normal import check_normal
from rmfx.hostile import randomise

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "split": {"carrier": "split"},
    "masked": {"carrier": "masked"},
    "direct": {"carrier": "direct"},
    "conv": {"downsample": "conv"},
    "input": {"downsample": "input"},
    "always": {"fuse": "always"},
    "never": {"fuse": "never"},
    "keep_bn": {"keep_bn": True},
}
# Networks of which nothing can be removed, by option; the reason is the same for all of them.
SIGNED = ("basic_signed", "inverted_relu6", "inverted_relu", "inverted_hardswish", "pre_activation")
LINEAR = ("repvgg", "repvgg_strided", "acnet", "diracnet", "dbb", "mobileone")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "split": (("inverted_relu6",), "carrier 'split' needs phi(t) - phi(-t) = k*t, which "),
    "direct": (SIGNED, "carrier 'direct' needs"),
    "keep_bn": (LINEAR, "parallel linear branches stay apart for training"),
}
UNKNOWN_RANK = "whether BatchNorm1d normalises features or positions depends on the input's rank: pass example_inputs"


def sums_left(converted: fx.GraphModule) -> int:
    """Sums and differences of two tensors."""
    return sum(node.target in (operator.add, operator.sub, torch.add) for node in converted.graph.nodes)


def check(name: str, option: str, example: Tensor | None) -> None:
    model, x = build(name)
    converted = rmfx.convert(model, None if example is None else x, verify=False, **OPTIONS[option])
    assert_equivalent_on(model, converted, NETS[name].shape)
    converted.graph.lint()
    check_normal(converted)
    report = rmfx.report(converted)
    refused, reason = REFUSED.get(option, ((), ""))
    if example is None and name == "mlp":
        refused, reason = ("mlp",), UNKNOWN_RANK
    expected = 0 if name in refused else NETS[name].sums
    assert (report.count("removed"), sums_left(converted)) == (expected, NETS[name].sums - expected)
    assert len(report.entries) == NETS[name].sums
    if name in refused:
        assert reason in (report.entries[0].reason or "")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NETS)
def test_every_network_with_every_option(name: str, option: str) -> None:
    check(name, option, torch.empty(0))


@pytest.mark.parametrize("option", ["default", "split", "keep_bn"])
@pytest.mark.parametrize("name", NETS)
def test_every_network_without_example_inputs(name: str, option: str) -> None:
    check(name, option, None)


@pytest.mark.parametrize("option", ["default", "split", "always"])
@pytest.mark.parametrize("name", DYADIC)
def test_no_bit_differs_where_arithmetic_is_exact(name: str, option: str) -> None:
    model, x = build_dyadic(name)
    converted = rmfx.convert(model, x, verify=False, **OPTIONS[option])
    assert sums_left(converted) == (name in REFUSED.get(option, ((), ""))[0])
    assert_equal_exactly(model, converted, x)
    larger = torch.randint(-16, 17, (3, x.shape[1], *(size + 1 for size in x.shape[2:]))).double()
    assert_equal_exactly(model, converted, larger)


def test_a_plain_network_keeps_all_its_layers() -> None:
    model = randomise(nn.Sequential(conv(4, 6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 4)), torch.randn(2, 4, 8, 8))
    converted = rmfx.convert(model, torch.randn(2, 4, 8, 8))
    assert [node.target for node in converted.graph.nodes] == ["input", "0", "1", "2", "3", "output"]
    assert rmfx.report(converted).entries == ()


# -- what blocks are made of in the wild ------------------------------------------------------------------------------


def shared_weights() -> nn.Module:
    model = Lambda(lambda m, x: x + m.b(m.a(x).relu()), a=conv(4, 4, bias=True), b=conv(4, 4))
    model.b.weight = model.a.weight
    return model


def same_module_twice() -> nn.Module:
    body = conv(4, 4, bias=True)
    return Lambda(lambda m, x: x + m.b(m.a(x).relu()), a=body, b=body)


def in_place_on_the_fork(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    F.relu_(y)
    return y + m.b(y)


def in_place_layer_on_the_fork(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    z = m.b(m.act(y))
    return m.c(z) + y


def partial_sum(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :2].add_(x[:, :2])
    return m.b(y)


def functional(m: Lambda, x: Tensor) -> Tensor:
    y = F.conv2d(x, m.a.weight, m.a.bias, padding=1)
    y = F.batch_norm(y, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias)
    return torch.add(x, F.conv2d(F.relu6(F.dropout(y, 0.5, m.training)), m.b.weight, padding=1), alpha=0.3)


def augmented(m: Lambda, x: Tensor) -> Tensor:
    y = m.b(m.a(x).relu_())
    y += x
    y -= m.c(x)
    return y.clamp_(min=0)


def methods(m: Lambda, x: Tensor) -> Tensor:
    return m.b(m.a(x).relu()).mul(0.5).add(x).sub(m.c(x))


def no_ops(m: Lambda, x: Tensor) -> Tensor:
    return m.identity(x) + m.drop(m.b(m.drop(m.a(x).relu())))


def one_conv_twice(m: Lambda, x: Tensor) -> Tensor:
    return x + m.a(m.a(x).relu())


def one_norm_twice(m: Lambda, x: Tensor) -> Tensor:
    return x + m.norm(m.b(m.norm(m.a(x)).relu()))


def two_norms(m: Lambda, x: Tensor) -> Tensor:
    return x + m.b(m.norm(m.other(m.a(x))).relu())


def with_layers(forward: Any) -> Any:
    """A model of ``forward``, which takes from it the layers it wants."""
    layers = {
        "a": lambda: conv(4, 4, bias=True),
        "b": lambda: conv(4, 4),
        "c": lambda: conv(4, 4, 1),
        "norm": lambda: nn.BatchNorm2d(4),
        "other": lambda: nn.BatchNorm2d(4),
        "act": lambda: nn.ReLU(inplace=True),
        "drop": lambda: nn.Dropout2d(),
        "identity": lambda: nn.Identity(),
    }
    used = [name for name in layers if name in forward.__code__.co_names]
    return lambda: Lambda(forward, **{name: layers[name]() for name in used})


WILD: dict[str, tuple[Any, int]] = {  # model, sums
    "one conv called twice": (with_layers(one_conv_twice), 1),
    "one module under two names": (same_module_twice, 1),
    "two layers share a weight": (shared_weights, 1),
    "one norm called twice": (with_layers(one_norm_twice), 1),
    "two norms on one conv": (with_layers(two_norms), 1),
    "in place on the fork": (with_layers(in_place_on_the_fork), 1),
    "an in-place layer on the fork": (with_layers(in_place_layer_on_the_fork), 1),
    "functions": (with_layers(functional), 1),
    "augmented assignments": (with_layers(augmented), 2),
    "dropout and identity": (with_layers(no_ops), 1),
    "methods": (with_layers(methods), 2),
}


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("name", WILD)
def test_in_the_wild(name: str, sized: bool) -> None:
    make, sums = WILD[name]
    x = hostile(2, 4, 7, 8)
    model = randomise(make().double(), x / 8)
    converted = rmfx.convert(model, x if sized else None, verify=False)
    assert (rmfx.report(converted).count("removed"), sums_left(converted)) == (sums, 0)
    for seed in (1, 2):
        assert_equivalent(model, converted, hostile(3, 4, 7 + seed, 8, seed=seed))


def test_a_write_through_a_view_that_is_read_later_is_refused() -> None:
    with pytest.raises(rmfx.NormalFormError, match="writes into memory that a may share, which b .* reads later"):
        rmfx.convert(with_layers(partial_sum)().eval())


def test_sums_of_sizes_are_no_residual_sums() -> None:
    model = Lambda(
        lambda m, x: m.conv(x).reshape(x.size(0) + 0, x.size(1), x.size(2) + x.size(3) - 1, -1), conv=conv(4, 4)
    )
    converted = rmfx.convert(randomise(model.double(), hostile(2, 4, 8, 1)))
    assert rmfx.report(converted).entries == ()
    assert_equivalent(model, converted, hostile(2, 4, 8, 1))


def test_a_lone_layer() -> None:
    converted = rmfx.convert(nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 5, 5))
    assert operations(converted) == ["Conv2d"]


def test_the_branch_tells_the_channels_of_a_scaled_shortcut() -> None:
    model = Lambda(lambda m, x: 0.3 * x + m.b(m.a(x).relu()), a=conv(4, 6), b=conv(6, 4)).double().eval()
    converted = rmfx.convert(model)
    assert rmfx.report(converted).count("removed") == 1
    assert_equivalent(model, converted, hostile(2, 4, 7, 8))
