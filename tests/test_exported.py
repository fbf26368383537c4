"""The second front door: exported programs, graphs of Dynamo, and networks that symbolic tracing cannot follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from front import hostile
from oracle import relative_difference
from programs import assert_equal, decomposed, exported
from torch import Tensor, fx, nn
from torch.nn import functional as F

import rmfx
from rmfx import TraceError, VerificationError
from rmfx.front.doors import enter
from rmfx.front.exported import program_graph
from rmfx.front.program import open_program
from rmfx.hostile import randomise

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


def test_a_wrong_result_is_no_reason_to_convert_in_parts() -> None:
    model, image = net(Branching)
    wrong, _ = net(Branching)
    with torch.no_grad():
        wrong.fc.bias += 1e-6
    converted = rmfx.convert(wrong, image)
    with pytest.raises(VerificationError, match="first at fc"):
        rmfx.verify(model, converted, image)


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
