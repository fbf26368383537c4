"""What tracing records, of which models, and that it leaves them alone."""

from __future__ import annotations

import copy
import operator
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from front import Lambda, assert_exact, bn, hostile, image, normal_form, operations, run
from torch import Tensor, fx, nn
from torch.nn import functional as F

import rmfx
from rmfx.front.trace import structural_copy, trace
from rmfx.front.tracer import is_user_file, location
from rmfx.modules import ChannelAffine


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def test_in_place_operators_are_recorded() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        y = x * 1
        y += x
        y -= x
        y *= x
        y /= x
        y.T.mul_(2)
        return y

    targets = [node.target for node in trace(Lambda(forward).eval()).graph.nodes if node.op == "call_function"]
    assert targets == [operator.mul, operator.iadd, operator.isub, operator.imul, operator.itruediv, getattr]


def test_an_attribute_is_written_in_place_too() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        flipped = x.mT
        flipped += 1
        return x

    targets = [node.target for node in trace(Lambda(forward).eval()).graph.nodes if node.op == "call_function"]
    assert targets == [getattr, operator.iadd]


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(), nn.ReLU())
        self.inner = Lambda(lambda m, x: F.relu(m.conv(x)) + m.scale, conv=conv(), scale=torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(self.stem(x)))


def test_places_and_lines() -> None:
    gm = trace(Places().eval())
    places = {node.name: node.meta["place"] for node in gm.graph.nodes}
    assert places == {
        "x": "",
        "stem_0": "stem",
        "stem_1": "stem",
        "inner_conv": "inner",
        "relu": "inner",
        "inner_scale": "inner",
        "add": "inner",
        "tanh": "",
        "output": "",
    }
    nodes = {node.name: node for node in gm.graph.nodes}
    line = Places.forward.__code__.co_firstlineno + 1
    assert location(nodes["tanh"]) == f"{__file__}:{line}"
    assert location(nodes["stem_0"]) == f"{__file__}:{line}, in stem"
    assert location(nodes["relu"]).endswith(f":{Places.__init__.__code__.co_firstlineno + 3}, in inner")


def test_a_graph_without_user_code_has_no_lines() -> None:
    gm = trace(nn.Sequential(conv(), nn.ReLU()).eval())
    assert [node.meta["line"] for node in gm.graph.nodes] == [None] * 4
    assert location(next(iter(gm.graph.nodes))) == "no line of source known"


def test_the_code_of_rmfx_is_no_code_of_a_model() -> None:
    package = Path(rmfx.__file__).parent
    assert not any(
        is_user_file(str(package / name)) for name in ("convert.py", "front/tracer.py", "passes/normalise.py")
    )
    assert not is_user_file(torch.nn.functional.__file__) and not is_user_file("<string>")
    assert is_user_file(str(package / "models" / "resnet.py")) and is_user_file(__file__)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor, scale: float = 0.5, *, other: Tensor | None = None) -> dict[str, Any]:
        y = self.conv(input=x) * scale
        return {"sum": y + other, "all": (y, [x, other])}


def test_keyword_inputs_defaults_and_nested_outputs() -> None:
    assert_exact(Keywords(), image(), other=image(1))
    assert_exact(Keywords(), image(), 2.0, other=image(1))


def test_builtin_sum_starts_from_nothing() -> None:
    model = Lambda(lambda m, x: sum([m.a(x), m.b(x), x]), a=conv(), b=conv())
    assert operations(assert_exact(model, image())) == ["Conv2d", "Conv2d", "add", "add"]


def test_constants_decide_python_branches() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        if m.flag and len(m.scale) == 4 and m.scale.dim() == 1 and m.scale.size(0) == m.scale.shape[0]:
            return x * float(m.gain) + int(m.gain) + m.gain.item()
        return x

    gm = assert_exact(Lambda(forward, flag=torch.tensor(True), scale=torch.rand(4), gain=torch.tensor(2.5)), image())
    assert operations(gm) == ["mul", "ChannelAffine", "ChannelAffine"]


# -- the caller's model is left alone ---------------------------------------------------------------------------------


def test_parameters_are_shared_and_modules_are_not() -> None:
    model = nn.Sequential(conv(), bn(4), nn.ReLU(inplace=True)).eval()
    copied = structural_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), copied.buffers(), strict=True))
    assert not {id(module) for module in model.modules()} & {id(module) for module in copied.modules()}


def test_plain_tensor_attributes_are_copied() -> None:
    model = Lambda(lambda m, x: x + m.table).eval()
    model.table = torch.ones(5)
    gm = normal_form(model)
    gm.get_buffer("add.bias").zero_()
    assert torch.equal(model.table, torch.ones(5))


def test_a_model_used_before_can_be_copied() -> None:
    model = torch.nn.utils.weight_norm(nn.Linear(3, 3)).eval()
    model(torch.rand(2, 3))  # leaves a tensor with a history in the module, which deepcopy refuses
    assert torch.equal(trace(model)(torch.ones(2, 3)), model(torch.ones(2, 3)))


# -- roots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [conv(), bn(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Softmax2d()])
def test_a_lone_layer_is_kept_whole(layer: nn.Module) -> None:
    gm = assert_exact(layer, image())
    assert operations(gm) == [type(layer).__name__]


def test_an_empty_network_passes() -> None:
    gm = assert_exact(nn.Sequential(), image())
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "output"]


def test_our_own_layers_are_kept_whole() -> None:
    gm = assert_exact(nn.Sequential(conv(), ChannelAffine(torch.rand(4), torch.rand(4))), image())
    assert operations(gm) == ["Conv2d", "ChannelAffine"]


class CheckedNorm(nn.BatchNorm2d):
    """Inherits forward, which checks the rank of its input: stepping into it would fail."""


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


def test_subclasses_of_layers() -> None:
    norm = CheckedNorm(4)
    norm.load_state_dict(bn(4).state_dict())
    gm = assert_exact(nn.Sequential(Scaled(4, 4, 3), norm), image())
    assert operations(gm) == ["Conv2d", "ChannelAffine", "BatchNorm2d"]


def test_a_layer_with_a_patched_forward_is_traced_into() -> None:
    layer = nn.ReLU()
    layer.forward = lambda x: torch.tanh(x) + 1  # type: ignore[method-assign]
    gm = assert_exact(nn.Sequential(conv(), layer), image())
    assert operations(gm) == ["Conv2d", "Tanh", "ChannelAffine"]


# -- graph modules ----------------------------------------------------------------------------------------------------


def test_a_graph_module_of_torch_is_taken() -> None:
    gm = fx.symbolic_trace(Places().double().eval())
    again = assert_exact(gm, image())
    assert operations(again) == ["Conv2d", "ReLU", "Conv2d", "ReLU", "ChannelAffine", "Tanh"]
    assert {node.name: node.meta["place"] for node in again.graph.nodes}["relu"] == "inner"


def test_a_normal_form_is_a_fixed_point() -> None:
    first = normal_form(Places().double().eval())
    second = normal_form(first)
    assert str(second.graph) == str(first.graph)
    assert second.state_dict().keys() == first.state_dict().keys()
    for a, b in zip(first.graph.nodes, second.graph.nodes, strict=True):
        assert (a.meta["place"], a.meta["line"]) == (b.meta["place"], b.meta["line"])


def test_an_in_place_graph_module() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(operator.iadd, (graph.call_function(torch.tanh, (x,)), x))
    graph.call_function(torch.relu_, (y,))
    graph.output(y)
    gm = assert_exact(fx.GraphModule(nn.Module(), graph), image())
    assert operations(gm) == ["Tanh", "add", "ReLU"]


def test_results_can_be_copied_and_pickled() -> None:
    model = Places().double().eval()
    gm = normal_form(model)
    for again in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(run(again, image())[0][0], run(model, image())[0][0])


def test_inputs_of_tests_leave_the_unit_box() -> None:
    assert hostile(2, 3).abs().max() > 6
