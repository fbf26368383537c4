"""The front door: which models are taken, which are refused and why, what tracing records."""

from __future__ import annotations

import collections
import copy
import operator
import pickle
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from front import Lambda, assert_exact, bn, hostile, image, normal_form, operations, run
from torch import Tensor, fx, nn
from torch.nn import functional as F

import rmfx
from rmfx.errors import TraceError, UnsupportedModelError
from rmfx.front.trace import structural_copy, trace
from rmfx.front.tracer import is_user_file, location
from rmfx.modules import ChannelAffine


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


# -- refusals ---------------------------------------------------------------------------------------------------------


def _training_inside() -> nn.Module:
    model = nn.Sequential(conv(), nn.Sequential(nn.BatchNorm2d(4))).eval()
    model[1][0].train()
    return model


def _quantised() -> nn.Module:
    return nn.Sequential(torch.ao.nn.quantized.Quantize(0.1, 0, torch.quint8)).eval()


def _scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Sequential(nn.ReLU()).eval())).eval()


def _two_devices() -> nn.Module:
    return nn.Sequential(conv(), nn.Conv2d(4, 4, 1, device="meta")).eval()


def _complex() -> nn.Module:
    return nn.Sequential(collections.OrderedDict(first=nn.Linear(2, 2, dtype=torch.complex64))).eval()


def _integer() -> nn.Module:
    return Lambda(lambda m, x: x, table=nn.Parameter(torch.arange(3), requires_grad=False)).eval()


def _patched() -> nn.Module:
    model = Lambda(lambda m, x: x).eval()
    model.forward = types.MethodType(lambda self, x: x + 1, model)  # type: ignore[method-assign]
    return model


def _inferring() -> nn.Module:
    with torch.inference_mode():
        return nn.Sequential(conv()).eval()


def _uncopyable() -> nn.Module:
    model = Lambda(lambda m, x: x).eval()
    model.lock = threading.Lock()
    return model


REFUSED: list[tuple[Any, str]] = [
    (lambda: 3, "converts a torch.nn.Module, but was given a builtins.int"),
    (lambda: nn.ReLU, r"was given the class ReLU: build a model first, ReLU\(\.\.\.\)"),
    (lambda: nn.Sequential(conv()), r"^the model is in training mode, .* call model.eval\(\) first"),
    (_training_inside, r"^1.0 \(BatchNorm2d\) is in training mode"),
    (_quantised, r"^0 \(Quantize\) is quantised: convert the float model"),
    (_scripted, r"^0 \(RecursiveScriptModule\) is TorchScript"),
    (_two_devices, r"spread over several devices \(0.weight on cpu, 1.weight on meta\): move it to one"),
    (lambda: nn.Linear(2, 2, device="meta").eval(), "on the meta device, where weights have no values"),
    (_complex, r"^parameter first.weight is complex \(torch.complex64\)"),
    (_integer, r"^parameter table is integer \(torch.int64\)"),
    (_inferring, r"^0.weight was made under torch.inference_mode\(\).*convert copy.deepcopy\(model\)"),
    (lambda: nn.Sequential(nn.LazyLinear(3)).eval(), r"^0.weight is lazy .* run the model on one batch first"),
    (lambda: nn.ModuleList([conv()]).eval(), "ModuleList has no forward method, so it computes nothing"),
    (lambda: nn.DataParallel(conv()).eval(), "wrapped in DataParallel: give the model inside, model.module"),
    (_patched, "forward was replaced on the instance"),
    (_uncopyable, r"cannot be copied \(.*lock.*\): copy.deepcopy\(model\) must work"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_models_that_are_refused(build: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trace(build())


def test_a_copy_of_a_model_made_under_inference_mode_is_taken() -> None:
    assert len(trace(copy.deepcopy(_inferring())).graph.nodes) == 3


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="give the model inside, model._orig_mod"):
        trace(torch.compile(nn.Sequential(conv()).eval(), backend="eager"))


def test_hooks_on_all_modules_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.raises(UnsupportedModelError, match="hooks on all modules are registered"):
            trace(nn.Sequential(conv()).eval())
    finally:
        handle.remove()


def test_training_mode_is_traced_as_eval_when_allowed() -> None:
    model = nn.Sequential(conv(), bn(4), nn.Dropout(0.5)).double()
    gm = trace(model, allow_training=True)
    assert model.training and model[1].training and not any(module.training for module in gm.modules())
    assert torch.equal(run(gm, image())[0][0], run(copy.deepcopy(model).eval(), image())[0][0])


def test_integer_and_bool_buffers_are_taken() -> None:
    model = Lambda(lambda m, x: torch.where(m.mask, x, -x), mask=torch.tensor([True, False, True, False, True]))
    assert_exact(model, image())


# -- code that cannot be followed -------------------------------------------------------------------------------------


def _branch(m: Lambda, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x
    return -x


def _loop(m: Lambda, x: Tensor) -> Tensor:
    total = 0
    for row in x:
        total = total + row
    return total


def _length(m: Lambda, x: Tensor) -> Tensor:
    return x * len(x)


def _item_write(m: Lambda, x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 0.0
    return y


def _item_add(m: Lambda, x: Tensor) -> Tensor:
    y = x * 2
    y[:, :2] += x[:, :2]
    return y


def _attribute_write(m: Lambda, x: Tensor) -> Tensor:
    y = x * 2
    y.data = x
    return y


def _deletion(m: Lambda, x: Tensor) -> Tensor:
    del x[0]
    return x


def _raises(m: Lambda, x: Tensor) -> Tensor:
    raise KeyError("no such stage")


@pytest.mark.parametrize(
    ("forward", "line", "message"),
    [
        (_branch, 1, "symbolically traced variables cannot be used as inputs to control flow"),
        (_loop, 2, "Proxy object cannot be iterated"),
        (_length, 1, "'len' is not supported"),
        (_item_write, 2, r"a write into a part of a tensor, x\[...\] = value"),
        (_item_add, 2, r"a write into a part of a tensor, x\[...\] = value"),
        (_attribute_write, 2, "setting the attribute .data"),
        (_deletion, 1, r"del x\[...\]"),
        (_raises, 1, "no such stage"),
    ],
)
def test_trace_errors_name_file_and_line(forward: Any, line: int, message: str) -> None:
    model = nn.Sequential(conv(), Lambda(forward)).eval()
    with pytest.raises(TraceError, match=message) as caught:
        trace(model)
    assert f"{__file__}:{forward.__code__.co_firstlineno + line} cannot be followed" in str(caught.value)
    assert "decide with Python values" in str(caught.value)
    assert caught.value.__cause__ is not None


def _add_one(m: Lambda) -> None:
    m.count = m.count + 1


def _iadd_one(m: Lambda) -> None:
    m.count += 1


def _add_in_place(m: Lambda) -> None:
    m.count.add_(1)


@pytest.mark.parametrize("update", [_add_one, _iadd_one])
def test_a_buffer_that_changes_on_every_call_is_refused(update: Any) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        update(m)
        return x * m.count

    model = nn.Sequential(Lambda(forward, count=torch.ones(5))).eval()
    with pytest.raises(
        TraceError, match=r"forward of Sequential changes 0.count, so the model computes something else"
    ):
        trace(model)
    assert torch.equal(model[0].count, torch.ones(5))


@pytest.mark.parametrize("update", [_add_one, _iadd_one, _add_in_place])
def test_an_attribute_that_changes_on_every_call_is_refused(update: Any) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        update(m)
        return x * m.count

    model = Lambda(forward).eval()
    model.count = torch.ones(5)
    with pytest.raises(TraceError, match="forward of Lambda changes count"):
        trace(model)
    assert torch.equal(model.count, torch.ones(5))


def test_a_state_fed_back_is_refused() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        m.state = x + m.state
        return m.state

    model = Lambda(forward).eval()
    model.state = torch.ones(5)
    with pytest.raises(TraceError, match="forward of Lambda changes state"):
        trace(model)


def test_a_remembered_activation_does_no_harm() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        m.features = x * 2
        return m.features + 1

    model = Lambda(forward).double().eval()
    model(image())
    assert_exact(model, image())


# -- what is recorded -------------------------------------------------------------------------------------------------


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
