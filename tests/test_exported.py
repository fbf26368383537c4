"""The second front door: exported programs, graphs of Dynamo, and code that symbolic tracing cannot follow."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from front import hostile
from oracle import relative_difference
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn import functional as F

import rmfx
from rmfx import TraceError, VerificationError
from rmfx.front.aten import spell_aten
from rmfx.front.doors import enter
from rmfx.front.exported import program_graph
from rmfx.front.normal import check_normal
from rmfx.front.program import open_program
from rmfx.front.sizes import depends_on_sizes
from rmfx.hostile import randomise
from rmfx.passes.normalise import normalise

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Block(nn.Module):
    """A basic block, in place throughout."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y += x
        return self.act(y)


class Net(nn.Module):
    """A stem, two blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(F.relu(self.stem(x))).mean((2, 3)))


class Branching(Net):
    """The same, behind a decision by a size."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        return super().forward(x)


def net(cls: type[nn.Module] = Net) -> tuple[nn.Module, Tensor]:
    image = hostile(2, 3, 7, 9)
    return randomise(cls().double(), image / 8), image


def exported(model: nn.Module, *inputs: Tensor) -> torch.export.ExportedProgram:
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)


def decomposed(program: torch.export.ExportedProgram, how: str) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"not": lambda: program, "functional": lambda: program.run_decompositions({})}.get(
            how, program.run_decompositions
        )()


def assert_equal(model: nn.Module, converted: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        assert relative_difference(model(*inputs), converted(*inputs)) < 1e-13


@pytest.mark.parametrize("how", ["not", "functional", "core"])
def test_an_exported_program(how: str) -> None:
    model, image = net()
    program = decomposed(exported(model, image), how)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    converted = rmfx.convert(program)
    report = rmfx.report(converted)
    assert report.count("removed") == 2 and not report.size_conditions
    assert [entry.place for entry in report.entries] == ["layers.0", "layers.1"]
    assert report.parameter_map["layers.0.conv1.weight"] == ("layers.0.conv1.weight", "layers.0.conv1.bias")
    assert set(report.parameter_map) == {name for name in model.state_dict() if "num_batches" not in name} | {
        name for name in report.parameter_map if "num_batches" in name
    }
    assert_equal(model, converted, hostile(3, 3, 7, 9))
    assert_equal(model, converted, hostile(1, 3, 8, 6))
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state_dict.items())


def test_a_program_shares_weights_until_it_is_converted() -> None:
    model, image = net()
    gm = open_program(exported(model, image))
    ours = dict(gm.named_parameters())
    assert ours["layers.0.conv1.weight"] is model.layers[0].conv1.weight
    assert set(ours) == {name for name, _ in model.named_parameters()}


def test_the_same_report_through_both_doors() -> None:
    model, image = net()
    symbolic = rmfx.report(rmfx.convert(model, image))
    program = rmfx.report(rmfx.convert(exported(model, image)))
    for ours, theirs in zip(symbolic.entries, program.entries, strict=True):
        assert (ours.place, ours.status, ours.macs_after) == (theirs.place, theirs.status, theirs.macs_after)
    assert symbolic.totals.params_after == program.totals.params_after
    assert set(symbolic.parameter_map) >= set(program.parameter_map)


def test_layers_have_their_names_and_lines() -> None:
    model, image = net()
    gm = program_graph(exported(model, image))
    called = {str(node.target): node for node in gm.graph.nodes if node.op == "call_module"}
    assert {"stem", "layers.0.conv1", "layers.0.bn1", "layers.1.conv2", "fc"} <= set(called)
    assert called["layers.1.conv2"].meta["place"] == "layers.1"
    (total, _) = (node for node in gm.graph.nodes if node.target in ("add", torch.add))
    assert total.meta["line"][0] == __file__ and total.meta["place"] == "layers.0"


def test_a_module_made_of_a_program() -> None:
    model, image = net()
    converted = rmfx.convert(exported(model, image).module(), image, verify=False)
    assert rmfx.report(converted).count("removed") == 2
    assert_equal(model, converted, image)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_back_end_of_torch_compile() -> None:
    model, image = net()
    reports = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        converted = rmfx.convert(gm, tuple(inputs))
        reports.append(rmfx.report(converted))
        return converted

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        assert relative_difference(model(image), compiled(image)) < 1e-13
    (report,) = reports
    assert [entry.place for entry in report.entries] == ["layers.0", "layers.1"] and report.count("removed") == 2
    assert "layers.0.conv1.weight" in report.parameter_map


def test_code_that_decides_by_sizes_holds_for_these_sizes_only() -> None:
    model, image = net(Branching)
    converted = rmfx.convert(model, image)
    report = rmfx.report(converted)
    assert report.count("removed") == 2 and "computes with sizes" in report.size_conditions[0]
    assert "for the sizes of the example inputs only" in str(report)
    assert rmfx.Report.from_dict(report.to_dict()) == report
    assert_equal(model, converted, hostile(3, 3, 7, 9))
    with pytest.raises(ValueError, match=r"converted for spatial size \(3, 7, 9\), got \(3, 7, 8\)"):
        converted(hostile(2, 3, 7, 8))
    assert rmfx.explain(model, image).size_conditions == report.size_conditions


def test_a_saved_network_keeps_its_sizes(tmp_path: Any) -> None:
    model, image = net(Branching)
    loaded = rmfx.load(rmfx.save(rmfx.convert(model, image), tmp_path / "net.rmfx"))
    assert_equal(model, loaded, image)
    assert rmfx.report(loaded).size_conditions
    with pytest.raises(ValueError, match="converted for spatial size"):
        loaded(hostile(2, 3, 9, 9))


class PartialSum(nn.Module):
    """A sum of some channels only, written into a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :4] += x[:, :4]
        return y.relu()


class Overwritten(PartialSum):
    """Reads a tensor before and after another view of it is written."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        before = y.sum(1)
        y[:, 1:3] = 0.5
        y.mul_(2)[:, 3].add_(before)
        return torch.cat([y, before[:, None]], 1)


@pytest.mark.parametrize("cls", [PartialSum, Overwritten])
def test_writes_into_views(cls: type[nn.Module]) -> None:
    image = hostile(2, 4, 7, 5)
    model = randomise(cls().double(), image / 8)
    kept = copy.deepcopy(model.state_dict())
    gm = normalise(enter(model, (image,), {}).gm)
    check_normal(gm)
    assert not any(isinstance(node.target, OpOverload) for node in gm.graph.nodes)
    for other in (image, hostile(3, 4, 7, 5)):
        assert_equal(model, gm, other)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_a_partial_sum_is_slices_and_a_concat() -> None:
    image = hostile(2, 4, 7, 5)
    gm = enter(randomise(PartialSum().double(), image / 8), (image,), {}).gm
    (concat,) = (node for node in gm.graph.nodes if node.target is torch.cat)
    assert concat.args[1] == 1 and len(concat.args[0]) == 2


class Sized(nn.Module):
    """``function`` of one tensor."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.bn = function, nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.bn(x))


def _gate(x: Tensor) -> Tensor:
    b, c, _, _ = x.size()
    return x * x.mean((2, 3)).view(b, c, 1, 1)


SIZES: list[tuple[Any, bool]] = [
    (_gate, False),
    (lambda x: F.interpolate(x, scale_factor=2), False),
    (lambda x: F.adaptive_avg_pool2d(x, 2), False),
    (lambda x: x if x.ndim == 4 else x[0], False),
    (lambda x: x[:, : x.shape[1] // 2], False),
    (lambda x: F.interpolate(x, size=x.shape[-2:]), True),
    (lambda x: x if x.shape[-1] == x.shape[-2] else -x, True),
    (lambda x: F.pad(x, (0, x.shape[-1] % 2)), True),
    (lambda x: sum(x[..., i] for i in range(x.shape[-1])), True),
    (lambda x: x * (1 / x[0, 0].numel()), True),
    (lambda x: x.view(-1, x.stride(1)), True),
    (lambda x: F.local_response_norm(x, 2), True),
]


@pytest.mark.parametrize(("function", "depends"), SIZES, ids=range(len(SIZES)))
def test_what_depends_on_sizes(function: Any, depends: bool) -> None:
    assert depends_on_sizes(Sized(function).eval(), (torch.zeros(2, 4, 8, 8),), {}) is depends


def test_a_wrong_result_is_no_reason_to_convert_in_parts() -> None:
    model, image = net(Branching)
    wrong, _ = net(Branching)
    with torch.no_grad():
        wrong.fc.bias += 1e-6
    converted = rmfx.convert(wrong, image)
    with pytest.raises(VerificationError, match="first at fc"):
        rmfx.verify(model, converted, image)


class OneApart(nn.Module):
    """Code that goes another way for a batch of 1."""

    def forward(self, x: Tensor) -> Tensor:
        return -x if x.shape[0] == 1 else x * 2


class Pairs(nn.Module):
    """Code that goes another way for even batches."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] % 2 else x * 2


@pytest.mark.parametrize("cls", [OneApart, Pairs])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_code_that_decides_by_the_batch_is_guarded(cls: type[nn.Module], batch: int) -> None:
    model, image = cls().eval(), hostile(batch, 3, 4, 4)
    converted = rmfx.convert(model, image)
    assert torch.equal(converted(image), model(image))
    with pytest.raises(ValueError, match=rf"got \({batch + 1}, 3, 4, 4\)"):
        converted(hostile(batch + 1, 3, 4, 4))


class OneBatch(nn.Module):
    """Code that takes the batch for a number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[i : i + 1] * (i + 1) for i in range(int(x.shape[0]))])


def test_a_batch_that_the_code_fixes_is_guarded() -> None:
    model, image = OneBatch().eval(), hostile(2, 3, 4, 4)
    entered = enter(model, (image,), {})
    assert entered.batch and entered.sizes
    converted = rmfx.convert(model, image)
    assert torch.equal(converted(image), model(image))
    with pytest.raises(ValueError, match=r"got \(3, 3, 4, 4\)"):
        converted(hostile(3, 3, 4, 4))


class Nested(nn.Module):
    """Nested inputs and outputs, and code that symbolic tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, pair: tuple[Tensor, Tensor], *, more: dict[str, Tensor]) -> dict[str, Any]:
        first, second = pair
        total = self.conv(first) + (second if len(first) else first)
        return {"sum": total, "list": [more["x"], (first,)]}


def test_nested_inputs_and_outputs() -> None:
    model = Nested().double().eval()
    a, b, c = (hostile(2, 3, 4, 4, seed=seed) for seed in range(3))
    gm = enter(model, ((a, b),), {"more": {"x": c}}, symbolic=False).gm
    assert [node.target for node in gm.graph.nodes if node.op == "placeholder"] == ["pair", "more"]
    for want, got in zip(
        torch.utils._pytree.tree_leaves(model((a, b), more={"x": c})),
        torch.utils._pytree.tree_leaves(gm((a, b), more={"x": c})),
        strict=True,
    ):
        assert torch.equal(want, got)


class NoGrad(Net):
    """Part of the code runs without gradients, part with autocast switched off."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        with torch.autocast("cpu", enabled=False):
            x = self.layers(x)
        return self.fc(x.mean((2, 3)))


def test_blocks_without_gradients_are_opened() -> None:
    model, image = net(NoGrad)
    gm = enter(model, (image,), {}, symbolic=False).gm
    assert not any("wrap_with" in str(node.target) for node in gm.graph.nodes)
    assert_equal(model, gm, image)


def test_explain_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Branching().eval()
    for image in (torch.zeros(2, 3, 7, 9), torch.zeros(2, 3, 7, 9, device="meta")):
        assert rmfx.explain(model, image).count("removed") == 2


OPERATORS: list[Any] = [
    lambda m, x: F.hardtanh(x, -2, 3) + F.elu(x) + F.selu(x) + F.celu(x, 2.0),
    lambda m, x: F.elu_(x * 1) - F.leaky_relu(x, 0.3) + F.gelu(x, approximate="tanh") * F.mish(x),
    lambda m, x: F.max_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    lambda m, x: F.adaptive_max_pool2d(x, 2) + F.adaptive_avg_pool2d(x, (2, 2)),
    lambda m, x: F.adaptive_max_pool2d(x, 2, return_indices=True)[1],
    lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
    lambda m, x: F.interpolate(x, size=(5, 9), mode="nearest"),
    lambda m, x: F.pad(x, (1, 2, 0, 1), mode="reflect") + F.pad(x, (1, 2, 0, 1), "replicate") + F.pad(x, (1, 2, 0, 1)),
    lambda m, x: F.layer_norm(x, x.shape[-1:]) + F.group_norm(x, 2) + F.instance_norm(x),
    lambda m, x: F.linear(x.mean((2, 3)), m.weight, m.bias) + x.mean((2, 3)) @ m.weight.t(),
    lambda m, x: torch.addmm(m.bias, x.mean((2, 3)), m.weight.t()),
    lambda m, x: F.conv_transpose2d(x, m.kernel, stride=2, padding=1, output_padding=1),
    lambda m, x: F.conv2d(x, m.kernel, padding="same") + F.conv2d(x, m.kernel[:, :1], padding=1, groups=4),
    lambda m, x: torch.cat([part * i for i, part in enumerate(x.chunk(2, 1))] + list(x.split([1, 3], 1)), 1),
    lambda m, x: x[:, 1:3, ::2] + x[:, -2:, 1:8:2].flip(1) + x.select(1, 0)[:, None, ::2],
    lambda m, x: (
        F.scaled_dot_product_attention(x, x, x, scale=0.3) + torch.einsum("bcij,bckj->bcik", x, x).sum(3, True)
    ),
    lambda m, x: x.to(torch.float32).softmax(1).to(x.dtype) + F.log_softmax(x, 1),
    lambda m, x: (
        x + torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) + torch.ones_like(x) + m.bias[:, None, None]
    ),
    lambda m, x: F.embedding(x.abs().long() % 4, m.weight) + torch.where(x > 0, x, -x)[..., None],
    lambda m, x: torch.rsub(x, 2.0) + torch.sub(x, x.relu(), alpha=3) - x.clamp(-1, 2).masked_fill(x > 1, 0.5),
    lambda m, x: F.unfold(x, 3).sum(2) + F.pixel_shuffle(x, 2).flatten(1)[:, :36],
    lambda m, x: F.prelu(x, m.bias) + F.softplus(x, 2.0, 5.0) + F.hardswish(x) * F.hardsigmoid(x) + F.silu(x.tanh()),
]


class Operators(nn.Module):
    """All of them, with some weights to use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.rand(4))
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [function(self, x) for function in OPERATORS]


@pytest.mark.parametrize("how", ["not", "core"])
def test_operators_of_aten(how: str) -> None:
    model, image = Operators().double().eval(), hostile(2, 4, 8, 8)
    gm = program_graph(decomposed(exported(model, image), how))
    with torch.no_grad():
        wanted, spelled = model(image), gm(image)
        gm = normalise(gm)
        check_normal(gm)
        for line, (want, *given) in enumerate(zip(wanted, spelled, gm(image), strict=True)):
            assert all(relative_difference(want, got) < 1e-13 for got in given), f"line {line} of the list"


def test_an_unknown_operator_stays() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.linalg_vector_norm.default, (x,)))
    spelled = fx.GraphModule(nn.Module(), spell_aten(graph))
    assert torch.equal(spelled(torch.ones(4)), torch.tensor(2.0))
    assert any(isinstance(node.target, OpOverload) for node in spelled.graph.nodes)


class Counting(nn.Module):
    """Changes a buffer on every call."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


def test_a_program_that_changes_its_buffers_is_refused() -> None:
    program = decomposed(exported(Counting().eval(), torch.zeros(2, 3)), "functional")
    with pytest.raises(TraceError, match="changes count on every call"):
        rmfx.convert(program)


def test_both_refusals_are_told() -> None:
    class Values(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=rf"{__file__}:\d+ cannot be followed.*; torch.export: ") as refused:
        rmfx.convert(Values().eval(), torch.zeros(2, 3))
    assert "torch.export" in str(refused.value)
    with pytest.raises(TraceError, match="give tensors only"):
        enter(Net().eval(), (torch.zeros(1, 3, 8, 8), 3), {}, symbolic=False)


def test_code_that_asks_whether_it_is_exported_is_taken_as_it_runs() -> None:
    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] % 2:  # symbolic tracing cannot decide
                x = x + 1
            y = self.conv(x)
            return y.half().double() if torch.compiler.is_exporting() else y

    x = hostile(2, 3, 6, 6)
    model = Rounds().double().eval()
    converted = rmfx.convert(model, x)
    assert torch.equal(converted(x), model(x))
