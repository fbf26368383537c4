"""The certificate of plainness, and the counts behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import rmfx
from rmfx.algebra.pointwise import POINTWISE
from rmfx.check.plain import count_joins, count_onnx_joins, to_sequential
from rmfx.errors import ExportError, FileFormatError, NotPlainError
from rmfx.front.tracer import Tracer
from rmfx.modules import ChannelAffine, ChannelClamp, Elementwise, MaskedActivation, SizeGuard

MASK = torch.tensor([True, False, True])


class Function(nn.Module):
    """Any function of tensors, with some layers to use."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.layers)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model.eval(), Tracer().trace(model))


def clamp() -> ChannelClamp:
    return ChannelClamp(torch.tensor([0.0, -1.0, -torch.inf]), torch.tensor([6.0, 1.0, torch.inf]))


def strict_layers() -> list[nn.Module]:
    return [
        *(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.PReLU(3), nn.ReLU6(), nn.Hardtanh(-2, 2), clamp()),
        *(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        nn.Linear(3, 4),
    ]


# -- to_sequential -----------------------------------------------------------------------------------------------------


def test_a_chain_becomes_a_sequential_of_the_same_modules() -> None:
    layers = strict_layers()
    network = traced(nn.Sequential(*layers))
    sequential = to_sequential(network, strict=True)
    assert list(sequential) == layers and not sequential.training
    x = torch.randn(2, 3, 13, 11) * 8
    assert torch.equal(sequential(x), network(x))


def test_the_mode_of_the_layers_is_left_alone() -> None:
    network = traced(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    network.train()
    network.get_submodule("0").eval()
    sequential = to_sequential(network)
    assert sequential.training and not sequential[0].training and sequential[1].training


@pytest.mark.parametrize(
    ("flatten", "shape"),
    [
        (lambda x, *_: torch.flatten(x, 1), (2, 12)),
        (lambda x, *_: torch.flatten(x, start_dim=1, end_dim=2), (2, 6, 2)),
        (lambda x, *_: torch.flatten(x), (24,)),
        (lambda x, *_: x.flatten(2), (2, 3, 4)),
    ],
)
def test_flatten_functions_become_layers(flatten: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    sequential = to_sequential(traced(Function(lambda x, layer: flatten(layer(x)), nn.ReLU())), strict=True)
    assert [type(layer) for layer in sequential] == [nn.ReLU, nn.Flatten]
    assert sequential(torch.ones(2, 3, 2, 2)).shape == shape


def test_a_converted_network_is_a_chain_and_its_original_is_not() -> None:
    model, x = nets.build("basic_chain")
    sequential = to_sequential(rmfx.convert(model, x), strict=True)
    assert {type(layer) for layer in sequential} <= {nn.Conv2d, nn.ReLU, nn.PReLU}
    assert (sequential(x) - model(x)).abs().max() < 1e-11 * model(x).abs().max()
    with pytest.raises(NotPlainError, match=r"tensor .* has 2 readers: .*branch.*, "):
        to_sequential(traced(model))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            nn.Sequential(nn.ReLU(), Function(lambda x, conv: conv(x) + x, nn.Conv2d(3, 3, 1))),
            r"tensor '0' has 2 readers: '1.layers.0', 'add' \(in 1\)",
        ),
        (Function(lambda x, *_: x + x), "tensor 'x' has 2 readers: 'add', 'add'"),
        (
            Function(lambda x, a: a(x).sigmoid(), nn.ReLU()),
            "node 'sigmoid' is no layer of one tensor: call_method sigm",
        ),
        (
            Function(lambda x, a: torch.cat([a(x)]), nn.ReLU()),
            "node 'cat' is no layer of one tensor: call_function cat",
        ),
        (Function(lambda x, a: (a(x),), nn.ReLU()), "the network returns tuple, not one tensor"),
        (Function(lambda x, a: {"y": a(x)}, nn.ReLU()), "the network returns dict, not one tensor"),
        (Function(lambda x, a: (a(x), x), nn.ReLU()), "tensor 'x' has 2 readers: 'layers.0', 'output'"),
        (Function(lambda x, a: torch.ones(2), nn.ReLU()), "tensor 'x' has no reader"),
        (TwoInputs(), "a chain has one input, this network has 2: x, y"),
        (Function(lambda x, a: a(x)[0], nn.MaxPool2d(2, return_indices=True)), "'layers.0' returns indices beside"),
    ],
)
def test_what_is_no_chain(model: nn.Module, told: str) -> None:
    with pytest.raises(NotPlainError, match=told):
        to_sequential(traced(model))


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (MaskedActivation(nn.SiLU(), MASK), r"'1' is the masked carrier of SiLU \(MaskedActivation\), which strict"),
        (nn.BatchNorm2d(3), "layer '1' is a BatchNorm2d, which strict does not admit"),
        (ChannelAffine(torch.ones(3)), "layer '1' is a ChannelAffine, which strict does not admit"),
        (SizeGuard((4, 4), "ceil_mode"), "layer '1' is a SizeGuard, which strict does not admit"),
        (nn.SiLU(), "layer '1' is a SiLU, which strict does not admit"),
    ],
)
def test_strict_names_what_stands_in_the_way(layer: nn.Module, told: str) -> None:
    network = traced(nn.Sequential(nn.ReLU(), layer))
    assert list(to_sequential(network))[1] is layer
    with pytest.raises(NotPlainError, match=told):
        to_sequential(network, strict=True)


def test_only_graph_modules_are_certified() -> None:
    with pytest.raises(NotPlainError, match=r"takes a torch\.fx\.GraphModule, got ReLU"):
        to_sequential(nn.ReLU())  # type: ignore[arg-type]


# -- counting ----------------------------------------------------------------------------------------------------------


def partial(x: Tensor, layer: nn.Module) -> Tensor:
    y = layer(x).clone()
    y[:, :2] += x[:, :2]
    return y


def written(x: Tensor, layer: nn.Module) -> Tensor:
    y = layer(x).clone()
    y[:, :2] = x[:, 1:]
    return y


JOINS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "sum": (lambda x, a: x + a(x), ["sum"]),
    "scaled": (lambda x, a: torch.add(x, a(x), alpha=0.5), ["sum"]),
    "difference": (lambda x, a: x - a(x), ["sum"]),
    "reversed": (lambda x, a: torch.rsub(x, a(x)), ["sum"]),
    "in place": (lambda x, a: a(x).add_(x), ["sum"]),
    "twice": (lambda x, a: x + x, ["sum"]),
    "three": (lambda x, a: x + a(x) + x.sin(), ["sum", "sum"]),
    "concat": (lambda x, a: torch.cat([x, a(x)], 1), ["concat"]),
    "stack": (lambda x, a: torch.stack([x, a(x)]).mean(0), ["stack"]),
    "where": (lambda x, a: torch.where(torch.arange(3)[:, None, None] > 1, x, a(x)), ["where"]),
    "maximum": (lambda x, a: torch.maximum(x, a(x)), ["maximum"]),
    "minimum": (lambda x, a: torch.min(x, a(x)), ["maximum"]),
    "overwritten": (written, ["slice"]),
    "gate": (lambda x, a: x * a(x).mean((2, 3), keepdim=True).sigmoid(), ["gate"]),
    "quotient": (lambda x, a: x / a(x).exp(), ["gate"]),
    "product": (lambda x, a: x @ a(x).transpose(2, 3), ["gate"]),
    "dynamic filter": (lambda x, a: functional.conv2d(x, a(x)[:1]), ["gate"]),
    "other": (lambda x, a: torch.atan2(x, a(x)), ["other"]),
    "constant": (lambda x, a: a(x) * torch.arange(3.0)[:, None, None] + torch.ones(3, 1, 1), []),
    "number": (lambda x, a: 1 - 2 * a(x) / x.shape[2], []),
    "zeros": (lambda x, a: a(x) + torch.zeros_like(x), []),
    "threshold": (lambda x, a: torch.where(x > 0, x, 0.0), []),
    "reshape": (lambda x, a: a(x).reshape(x.shape[0], -1, x.shape[2] * 2)[:, :, 1:].flip(1), []),
    "two parts": (lambda x, a: (lambda y: (y[:, :1], y[:, 1:]))(a(x)), []),
}
NOT_IN_ONE_FILE = {"other", "in place", "three"}  # atan2 has no ONNX operator; equal sums are written once


@pytest.mark.parametrize("case", JOINS)
def test_joins_are_counted(case: str) -> None:
    function, kinds = JOINS[case]
    found = count_joins(Function(function, nn.Conv2d(3, 3, 1)).eval(), torch.randn(2, 3, 4, 4))
    assert [join.kind for join in found] == kinds


def test_a_partial_sum_is_both_a_sum_and_a_slice() -> None:
    found = count_joins(Function(partial, nn.Conv2d(3, 3, 1)).eval(), torch.randn(2, 3, 4, 4))
    assert {join.kind for join in found} == {"sum", "slice"}


def test_joins_are_named() -> None:
    model = nn.Sequential(nn.ReLU(), Function(lambda x, conv: conv(x) + x.sin(), nn.Conv2d(3, 3, 1)))
    [join] = count_joins(model.eval(), torch.randn(2, 3, 4, 4))
    assert (join.kind, join.name, join.place, join.operands) == ("sum", "add", "1", ("1.layers.0", "1"))


def test_all_inputs_are_data() -> None:
    [join] = count_joins(TwoInputs().eval(), (torch.ones(2), torch.ones(2)))
    assert join.operands == ("x", "y")


def one_step_layers() -> list[nn.Module]:
    own: dict[type[nn.Module], nn.Module] = {
        nn.PReLU: nn.PReLU(3),
        nn.Threshold: nn.Threshold(0.5, -1.0),
        ChannelClamp: clamp(),
        MaskedActivation: MaskedActivation(nn.Mish(), MASK),
        Elementwise: Elementwise("sin"),
    }
    more = [nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.Softmax(1), nn.Upsample(scale_factor=2), nn.AvgPool2d(2)]
    exported = [layer for layer in POINTWISE if layer is not nn.RReLU]  # which torch.onnx does not know
    return [*(own[layer] if layer in own else layer() for layer in exported), *more, ChannelAffine(torch.ones(3))]


def test_one_layer_is_one_step(tmp_path: Path) -> None:
    network, x = nn.Sequential(*one_step_layers()).eval(), torch.randn(2, 3, 8, 8)
    assert count_joins(network, x) == ()
    assert count_onnx_joins(rmfx.export(network, tmp_path / "net.onnx", x, check=False)) == ()


def test_the_same_is_counted_in_an_onnx_file(tmp_path: Path) -> None:
    cases = {case: joins for case, joins in JOINS.items() if case not in NOT_IN_ONE_FILE}
    functions = [function for function, _ in cases.values()]
    model = Function(lambda x, a: [function(x, a) for function in functions], nn.Conv2d(3, 3, 1)).eval()
    path = rmfx.export(model, tmp_path / "net.onnx", torch.randn(2, 3, 4, 4), dynamic_batch=False, check=False)
    found = sorted(join.kind for join in count_onnx_joins(path))
    assert found == sorted(kind for _, kinds in cases.values() for kind in kinds)


def test_what_only_takes_a_dtype_or_a_shape_from_the_data_is_no_join(tmp_path: Path) -> None:
    """Without an optimiser, the exporter makes the missing bias of a convolution from zeros cast like the input."""
    conv, path = nn.Conv2d(3, 4, 3, bias=False).eval(), tmp_path / "net.onnx"
    torch.onnx.export(conv, (torch.randn(1, 3, 8, 8),), path, dynamo=True, optimize=False, verbose=False)
    assert count_onnx_joins(path) == ()


def test_joins_in_an_onnx_file_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU(), Function(lambda x, conv: conv(x) + x.sin(), nn.Conv2d(3, 3, 1)))
    [join] = count_onnx_joins(rmfx.export(model.eval(), tmp_path / "net.onnx", torch.randn(2, 3, 4, 4), check=False))
    assert (join.kind, join.place, join.operands) == ("sum", "1", ("1.layers.0", "1"))


@pytest.mark.parametrize("name", ["basic_chain", "inverted_hardswish", "nested"])
def test_a_converted_network_has_no_joins(name: str, tmp_path: Path) -> None:
    model, x = nets.build(name)
    model, x = model.float(), x.float()
    converted = rmfx.convert(model, x)
    assert len(count_joins(model, x)) == nets.NETS[name].sums
    assert count_joins(converted, x) == ()
    assert count_onnx_joins(rmfx.export(converted, tmp_path / "net.onnx", x, check=False)) == ()


def test_what_cannot_be_counted(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"torch\.export cannot follow this network"):
        count_joins(nn.Linear(3, 4).eval(), torch.randn(2, 5))
    (tmp_path / "net.onnx").write_bytes(b"no network")
    for path in (tmp_path / "net.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(FileFormatError, match=r"cannot read .* as ONNX"):
            count_onnx_joins(path)
