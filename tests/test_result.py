"""What rmfx.convert gives back: a network of its own that behaves as any other, and a model left as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from front import hostile, operations
from nets import basic, build, conv
from oracle import assert_equivalent
from torch import Tensor, fx, nn

import rmfx
from rmfx.front.normal import check_normal
from rmfx.hostile import randomise

HALVES = (torch.float16, torch.bfloat16)
WITH_INPUTS = pytest.mark.parametrize("sized", [False, True], ids=["no example", "example"])


class Whole(nn.Module):
    """A stem that survives as it is, two blocks, a head, a tensor of its own and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(4, 6, bias=True)
        self.blocks = nn.Sequential(basic(6), basic(6, 8, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.head.weight
        self.mix = nn.Parameter(torch.randn(8, 5))
        self.register_buffer("offset", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.blocks(torch.relu(self.stem(x)))).flatten(1)
        y = torch.tanh(self.tied(torch.sigmoid(self.head(y)))) @ self.mix
        return torch.maximum(y, self.offset)


def whole(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    x = hostile(2, 4, 8, 8)
    return randomise(Whole().double(), x / 8).to(dtype), x.to(dtype)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict(keep_vars=True))


def snapshot(model: nn.Module) -> list[object]:
    """Everything that must not change, tensors by identity and by value."""
    state: list[object] = []
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [list(getattr(module, key)) for key in vars(module) if key.endswith("_hooks")]
        state.append((name, id(module), type(module), module.training, module.extra_repr(), hooks))
    for name, tensor in tensors(model).items():
        state.append((name, id(tensor), tensor._version, tensor.requires_grad, tensor.dtype, tensor.stride()))
        state.append(tensor.detach().clone().tolist())
    return state


@pytest.mark.parametrize("options", [{}, {"carrier": "split", "fuse": "always"}, {"keep_bn": True}], ids=str)
@WITH_INPUTS
def test_the_model_is_left_as_it_was(sized: bool, options: dict[str, Any]) -> None:
    model, x = whole()
    model.stem.weight.requires_grad_(False)
    model.train(options.get("keep_bn", False))
    model.blocks[1].register_full_backward_hook(lambda *_: None)
    model.blocks[1].custom = ["kept"]
    before, random = snapshot(model), torch.random.get_rng_state()
    rmfx.convert(model, x if sized else None, **options)
    rmfx.explain(model, x if sized else None, **options)
    assert snapshot(model) == before and model.blocks[1].custom == ["kept"]
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("options", [{}, {"keep_bn": True}, {"policy": []}], ids=str)
@WITH_INPUTS
def test_the_result_shares_no_memory_with_the_model(sized: bool, options: dict[str, Any]) -> None:
    model, x = whole()
    converted = rmfx.convert(model, x if sized else None, **options)
    mine = {tensor.untyped_storage().data_ptr() for tensor in tensors(model).values()}
    shared = [name for name, tensor in tensors(converted).items() if tensor.untyped_storage().data_ptr() in mine]
    assert not shared
    layers = {id(module) for module in model.modules()}
    assert not [name for name, module in converted.named_modules() if id(module) in layers]
    with torch.no_grad():
        before = model(x)
        for tensor in tensors(converted).values():
            tensor.zero_()
    assert torch.equal(model(x), before)


def test_no_tensor_of_the_result_is_a_view_of_a_larger_one() -> None:
    model, x = whole()
    for name, tensor in tensors(rmfx.convert(model, x)).items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


def test_what_survives_keeps_its_name() -> None:
    model, x = whole()
    converted = rmfx.convert(model, x)
    old, new = dict(model.named_modules()), dict(converted.named_modules())
    calls = [str(node.target) for node in converted.graph.nodes if node.op == "call_module"]
    for name in ("stem", "pool", "head", "tied", "blocks.0.act", "blocks.0.branch.0.0", "blocks.1.branch.1.0"):
        assert type(new[name]) is type(old[name]) and name in calls
    for name in ("stem.weight", "stem.bias", "head.weight", "head.bias", "tied.weight", "mix", "offset"):
        assert torch.equal(converted.state_dict()[name], model.state_dict()[name])
    assert isinstance(converted.mix, nn.Parameter) and "offset" in dict(converted.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@WITH_INPUTS
def test_dtype(sized: bool, dtype: torch.dtype) -> None:
    model, x = whole(dtype)
    converted = rmfx.convert(model, x if sized else None)
    assert {tensor.dtype for tensor in tensors(converted).values()} == {dtype}
    with torch.no_grad():
        got, want = converted(x), model(x)
    assert got.dtype == dtype
    bound = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    assert (got - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("name", ["basic_signed", "inverted_relu6", "inverted_hardswish"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_weights_are_computed_in_float64_and_rounded_once(dtype: torch.dtype, name: str) -> None:
    model, x = build(name)
    model = model.to(dtype)
    half, double = rmfx.convert(model), rmfx.convert(copy.deepcopy(model).double())
    for key, tensor in double.state_dict().items():
        assert torch.equal(half.state_dict()[key], tensor.to(half.state_dict()[key].dtype)), key
    assert torch.isfinite(half(x.to(dtype))).all()


def test_memory_format() -> None:
    model, x = whole(torch.float32)
    model = model.to(memory_format=torch.channels_last)
    converted = rmfx.convert(model, x)
    images = {name: tensor for name, tensor in tensors(converted).items() if tensor.dim() == 4}
    assert len(images) == 5 and all(t.is_contiguous(memory_format=torch.channels_last) for t in images.values())
    default = rmfx.convert(whole(torch.float32)[0], x)
    assert all(tensor.is_contiguous() for tensor in tensors(default).values())


def test_requires_grad() -> None:
    for wanted in (True, False):
        model, x = build("inverted_relu6")
        converted = rmfx.convert(model.requires_grad_(wanted), x)
        assert {parameter.requires_grad for parameter in converted.parameters()} == {wanted}
    model, x = whole()
    model.blocks[0].requires_grad_(False)
    kept = rmfx.convert(model, x)
    trains = {name: parameter.requires_grad for name, parameter in kept.named_parameters()}
    assert trains["blocks.1.branch.0.0.weight"] and trains["stem.weight"] and trains["mix"]
    assert not any(trains[f"blocks.0.branch.{i}.0.weight"] for i in (0, 1))


COPIED: list[tuple[str, dict[str, Any]]] = [
    ("basic_signed", {}),
    ("basic_signed", {"carrier": "split"}),
    ("basic_signed", {"keep_bn": True}),
    ("basic_signed", {"policy": []}),
    ("inverted_relu6", {}),
    ("inverted_hardswish", {}),
    ("repvgg", {}),
]


@pytest.mark.parametrize(("name", "options"), COPIED, ids=str)
def test_copies_keep_function_and_report(name: str, options: dict[str, Any]) -> None:
    model, x = build(name)
    converted = rmfx.convert(model, x, verify=False, **options)
    with torch.no_grad():
        expected = converted(x)
        for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), copy.copy(converted)):
            assert torch.equal(twin(x), expected) and rmfx.report(twin) == rmfx.report(converted)
            twin.graph.lint()
    assert operations(copy.deepcopy(converted)) == operations(converted)


@pytest.mark.parametrize("name", ["basic_signed", "inverted_relu6", "inverted_hardswish", "basic_1d_projection"])
def test_compiles_and_exports(name: str) -> None:
    model, x = build(name)
    converted = rmfx.convert(model, x, verify=False)
    with torch.no_grad():
        expected = converted(x)
        compiled = torch.compile(converted, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(converted, (x,), dynamic_shapes=({0: batch},))
        assert torch.equal(program.module()(x), expected)
        more = torch.cat([x, x, -x])
        assert torch.equal(program.module()(more), converted(more))
    torch.compiler.reset()


@pytest.mark.parametrize("options", [{}, {"carrier": "split"}, {"policy": []}], ids=str)
def test_converting_again_changes_nothing(options: dict[str, Any]) -> None:
    model, x = whole()
    once = rmfx.convert(model, x, **options)
    again = rmfx.convert(once, x, **options)
    assert str(again.graph) == str(once.graph) and again.code == once.code
    assert list(again.state_dict()) == list(once.state_dict())
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert rmfx.report(again).count("removed") == 0
    check_normal(again)


def test_a_graph_module_is_converted_like_its_model() -> None:
    model, x = whole()
    traced, direct = rmfx.convert(fx.symbolic_trace(model), x), rmfx.convert(model, x)
    assert operations(traced) == operations(direct)
    assert [e.place for e in rmfx.report(traced).entries] == [e.place for e in rmfx.report(direct).entries]
    assert_equivalent(model, traced, hostile(3, 4, 9, 8))
