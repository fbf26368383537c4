"""ONNX in: every operator against onnxruntime, whole networks in and out, and messages that name the node."""

from __future__ import annotations

import collections
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_cases import CASES, GRAPHS, IMAGE, Case, draw, f32, ints, write, write_case
from torch import Tensor, nn

import rmfx
from rmfx import cli
from rmfx.check.counting import count_onnx_joins
from rmfx.deploy import onnx_check, runtime
from rmfx.deploy.signature import read_signature
from rmfx.errors import ExportError, OnnxImportError, VerificationError
from rmfx.hostile import randomise
from rmfx.onnx_in.importer import RULES
from rmfx.quiet import quiet
from rmfx.vision import import_torchvision

FROM_TORCH = [(True, True), (True, False), (False, False)]  # dynamo or TorchScript, optimised or as traced


class Block(nn.Module):
    def __init__(self, c: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)
        down = nn.Sequential(nn.Conv2d(c, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        self.down = nn.Identity() if c == c_out else down

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.down(x))


def network() -> nn.Module:
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), Block(4, 4), Block(4, 6, 2), *head)
    return randomise(model, torch.randn(8, 3, 13, 12))


def written(path: Path, model: nn.Module, x: Tensor, dynamo: bool = True, optimise: bool = False) -> Path:
    """``model`` as torch writes it; without ``optimise`` its norms and constants are not folded."""
    common: dict[str, Any] = {"input_names": ["image.1"], "output_names": ["logits"]}
    with quiet():
        if dynamo:
            shapes = ({0: "n"},)
            torch.onnx.export(
                model, (x,), path, dynamo=True, verbose=False, optimize=optimise, dynamic_shapes=shapes, **common
            )
        else:
            common["training"] = torch.onnx.TrainingMode.PRESERVE  # else it folds norms
            axes = {"image.1": {0: "n"}}
            torch.onnx.export(
                model, (x,), path, dynamo=False, dynamic_axes=axes, do_constant_folding=optimise, **common
            )
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, bool], Path]:
    """The same network as the two exporters of torch write it."""
    torch.manual_seed(0)
    model, x, folder = network(), torch.randn(2, 3, 13, 12), tmp_path_factory.mktemp("files")
    return {how: written(folder / f"{int(how[0])}{int(how[1])}.onnx", model, x, *how) for how in FROM_TORCH}


def sums(path: Path) -> int:
    return sum(join.kind == "sum" for join in count_onnx_joins(path))


def onnxruntime(path: Path, *inputs: Tensor) -> list[Tensor]:
    return [torch.from_numpy(value) for value in runtime.run(runtime.session(path, optimise=False), inputs)]


def agree(path: Path, model: nn.Module, *inputs: Tensor) -> None:
    made = model(*inputs)
    made = made if isinstance(made, tuple) else (made,)
    for mine, theirs in zip(made, onnxruntime(path, *inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_every_operator_agrees_with_onnxruntime(case: Case, tmp_path: Path) -> None:
    path = write_case(tmp_path / "case.onnx", case)
    inputs = read_signature(path).examples(batch=2)
    agree(path, rmfx.from_onnx(path), *inputs)


@pytest.mark.parametrize("name", GRAPHS)
@torch.no_grad()
def test_graphs_agree_with_onnxruntime(name: str, tmp_path: Path) -> None:
    nodes, constants, outputs = GRAPHS[name]
    path = write(tmp_path / "graph.onnx", nodes, constants=constants, outputs=outputs)
    agree(path, rmfx.from_onnx(path), *read_signature(path).examples(batch=2))


def test_every_rule_has_a_case() -> None:
    in_graphs = {node.op_type for nodes, _, _ in GRAPHS.values() for node in nodes}
    assert set(RULES) - {case.op for case in CASES} - in_graphs == set()


@pytest.mark.parametrize("how", FROM_TORCH)
def test_a_network_from_torch_keeps_layers_and_places(
    how: tuple[bool, bool], files: dict[tuple[bool, bool], Path]
) -> None:
    back, x = rmfx.from_onnx(files[how]), torch.randn(2, 3, 13, 12)
    kinds = collections.Counter(type(layer).__name__ for layer in back.modules())
    assert (kinds["Conv2d"], kinds["Linear"], kinds["ReLU6"]) == (6, 1, 1)
    assert kinds["BatchNorm2d"] == (0 if how[1] else 6)
    assert {node.meta["place"] for node in back.graph.nodes if "add" in node.name.lower()} == {"3", "4"}
    assert [entry.place for entry in rmfx.explain(back, x).entries] == ["3", "4"]


@pytest.mark.parametrize("how", FROM_TORCH[1:])
def test_onnx_in_onnx_out(
    how: tuple[bool, bool],
    files: dict[tuple[bool, bool], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, target = files[how], tmp_path / "out.onnx"
    assert run(monkeypatch, "convert", source, target) == 0
    assert f"wrote {target} (opset {read_signature(target).opset})" in capsys.readouterr().out
    assert (sums(source), sums(target)) == (2, 0)
    before, after = read_signature(source), read_signature(target)
    assert [entry.name for entry in after.inputs] == ["image.1"]
    assert after.outputs == before.outputs == ("logits",)
    assert after.batched == (True,)
    x = torch.randn(5, 3, 13, 12)
    torch.testing.assert_close(onnxruntime(target, x), onnxruntime(source, x), rtol=1e-4, atol=1e-4)
    if how == FROM_TORCH[-1]:
        assert run(monkeypatch, "verify", source, target) == 0
        assert run(monkeypatch, "verify", source, changed(source, tmp_path)) == 1


def changed(path: Path, folder: Path) -> Path:
    """The file with one weight changed by a thousandth."""
    model = onnx.load(str(path))
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] += 1e-3
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, str(folder / "changed.onnx"))
    return folder / "changed.onnx"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["rmfx", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    return int(leaving.value.code or 0)


def test_explain_reads_onnx_and_refuses_options_that_contradict_the_file(
    files: dict[tuple[bool, bool], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = files[False, False]
    assert run(monkeypatch, "explain", source) == 0
    assert "2 residual sums removed" in capsys.readouterr().out
    assert run(monkeypatch, "explain", source, "--dtype", "float64") == 2
    assert run(monkeypatch, "explain", source, "--size", "14") == 2
    assert run(monkeypatch, "convert", source) == 2
    assert run(monkeypatch, "convert", source, "a.onnx", "-o", "b.onnx") == 2


def test_a_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    constants = {"w": draw(4, 4, 1, 1), "v": draw(4, 4, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["c"]),
        helper.make_node("Add", ["c", "x"], ["y"]),
    ]
    source = write(tmp_path / "in.onnx", nodes, constants=constants, inputs={"x": (2, 4, 5, 5)})
    model, example = rmfx.from_onnx(source), read_signature(source).examples()
    assert [tuple(value.shape) for value in example] == [(2, 4, 5, 5)]
    rmfx.export(rmfx.convert(model, example), tmp_path / "out.onnx", example, like=source)
    assert read_signature(tmp_path / "out.onnx").inputs == read_signature(source).inputs
    assert sums(tmp_path / "out.onnx") == 0


def test_free_sizes_come_from_the_caller(tmp_path: Path) -> None:
    weights = {"w": draw(4, 3, 3, 3)}
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    path = write(tmp_path / "in.onnx", [node], constants=weights, inputs={"x": ("n", 3, "high", "wide")})
    with pytest.raises(OnnxImportError, match="leaves high, wide free: give --input-shape"):
        rmfx.from_onnx(path)
    assert len(list(rmfx.from_onnx(path, torch.randn(1, 3, 6, 7)).children())) == 1
    signature = read_signature(path)
    assert signature.free == ("x[2] (high)", "x[3] (wide)")
    assert [tuple(x.shape) for x in signature.examples((9,), batch=2)] == [(2, 3, 9, 9)]
    with pytest.raises(OnnxImportError, match="is of shape nx3xhighxwide, not"):
        signature.examples((4, 9, 9))


def test_a_negative_size_is_a_free_one(tmp_path: Path) -> None:
    nodes = [helper.make_node("Shape", ["x"], ["s"], end=1), helper.make_node("Concat", ["s", "k"], ["t"], axis=0)]
    nodes += [helper.make_node("Reshape", ["x", "t"], ["y"])]
    path = write(tmp_path / "in.onnx", nodes, constants={"k": ints(2, 6)}, inputs={"x": (-1, 3, 4)})
    assert read_signature(path).batched == (True,)
    assert rmfx.from_onnx(path)(torch.randn(5, 3, 4)).shape == (5, 2, 6)


TAKEN = [
    ("self", ("left/x", "right/x")),
    ("graph", ("self", "graph")),
    ("meta", ("torch", "meta")),
    ("/graph/conv/Conv", ("code", "x")),
]


@pytest.mark.parametrize(("name", "names"), TAKEN)
@torch.no_grad()
def test_no_name_is_taken(name: str, names: tuple[str, str], tmp_path: Path) -> None:
    """Neither by another input, nor by what torch calls its own, nor by Python."""
    nodes = [
        helper.make_node("Conv", [names[0], "training"], ["c"], name),
        helper.make_node("Add", ["c", names[1]], ["s"], "delete_submodule"),
        helper.make_node("Mul", ["s", "forward"], ["y"], "torch"),
    ]
    constants = {"training": draw(4, 4, 1, 1), "forward": draw(4, 1, 1)}
    path = write(tmp_path / "in.onnx", nodes, constants=constants, inputs=dict.fromkeys(names, IMAGE))
    model, inputs = rmfx.from_onnx(path), read_signature(path).examples(batch=2)
    agree(path, model, *inputs)
    plain = rmfx.convert(model, inputs)
    rmfx.export(plain, tmp_path / "out.onnx", inputs, like=path, check=False)
    assert [entry.name for entry in read_signature(tmp_path / "out.onnx").inputs] == [*names]


def test_sums_of_small_integers_keep_their_type(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT32)]
    nodes += [helper.make_node("ReduceSum", ["i", "axes"], ["y"])]
    path = write(tmp_path / "in.onnx", nodes, constants={"axes": ints(1)})
    x = torch.randn(2, 4, 7, 8) * 9
    assert torch.equal(rmfx.from_onnx(path)(x), x.int().sum(1, True, dtype=torch.int32))


def test_indices_count_from_the_end_of_a_table(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        constants={"table": draw(5, 3)},
        inputs={"x": ("batch", 2)},
        element=TensorProto.INT64,
    )
    x = torch.tensor([[-1, 0], [4, -5]])
    model = rmfx.from_onnx(path, x)
    agree(path, model.requires_grad_(False), x)
    assert torch.equal(rmfx.convert(model, x)(x), model(x))


REFUSED = [
    ("Split", "cuts 5 into 4 parts of 2", [helper.make_node("Split", ["x"], [*"yzuv"], "n", num_outputs=4, axis=1)]),
    ("Conv", "its weight is computed from the network's input", [helper.make_node("Conv", ["x", "x"], ["y"], "n")]),
    (
        "BatchNormalization",
        "statistics of each batch",
        [helper.make_node("BatchNormalization", ["x", "s", "s", "s", "s"], ["y", "m", "v"], "n", training_mode=1)],
    ),
    ("TopK", "rmfx has no rule", [helper.make_node("TopK", ["x", "k"], ["y", "i"], "n")]),
    (
        "Resize",
        "torch takes another pixel",
        [helper.make_node("Resize", ["x", "", "scales"], ["y"], "n", nearest_mode="ceil")],
    ),
    ("Slice", "negative steps", [helper.make_node("Slice", ["x", "k", "zero", "k", "minus"], ["y"], "n")]),
    ("Slice", "negative steps", [helper.make_node("Slice", ["x", "seven", "minus", "k", "one"], ["y"], "n")]),
    (
        "LayerNormalization",
        r"a tensor of shape \(4,\) cannot be spread over \(8,\)",
        [helper.make_node("LayerNormalization", ["x", "s"], ["y"], "n")],
    ),
    (
        "LayerNormalization",
        "the last 4 sizes of its input, over which it normalises, are not known",
        [helper.make_node("LayerNormalization", ["x", "s"], ["y"], "n", axis=0)],
    ),
    ("Softmax", "before opset 13", [helper.make_node("Softmax", ["x"], ["y"], "n")]),
]


@pytest.mark.parametrize(("op", "reason", "nodes"), REFUSED)
def test_what_cannot_be_imported_is_named(op: str, reason: str, nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    constants = {
        "s": draw(4),
        "k": ints(3),
        "zero": ints(0),
        "minus": ints(-2),
        "seven": ints(7),
        "one": ints(-1),
        "scales": f32([1, 1, 2, 2]),
    }
    opset = 11 if op == "Softmax" else 18
    shape = {"Conv": (4, 4, 7, 8), "Split": (1, 5, 2, 2)}.get(op, IMAGE)
    path = write(tmp_path / "in.onnx", nodes, constants=constants, inputs={"x": shape}, outputs=["y"], opset=opset)
    with pytest.raises(OnnxImportError, match=rf"in.onnx: node 'n' \({op}, opset {opset}\) .*{reason}"):
        rmfx.from_onnx(path)


def test_operators_of_other_domains_are_refused_by_their_full_name(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"], "odd", domain="com.example")
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(tmp_path / "in.onnx"))
    with pytest.raises(OnnxImportError, match=r"node 'odd' \(com.example.Relu, opset 20\) cannot be imported"):
        rmfx.from_onnx(tmp_path / "in.onnx")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(OnnxImportError, match="there is no file"):
        rmfx.from_onnx(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("no protobuf")
    with pytest.raises(OnnxImportError, match="is no valid ONNX file"):
        rmfx.from_onnx(tmp_path / "text.onnx")
    large = write(tmp_path / "large.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], constants={"w": draw(8)})
    onnx.save(onnx.load(large), str(large), save_as_external_data=True, location="w.data", size_threshold=0)
    (tmp_path / "w.data").write_bytes(b"\0" * 31)
    with pytest.raises(OnnxImportError, match="large.onnx: the data of 'w' cannot be read"):
        rmfx.from_onnx(large)
    old = write(tmp_path / "old.onnx", [helper.make_node("Relu", ["x"], ["y"])], opset=6)
    with pytest.raises(OnnxImportError, match="opset 6, rmfx reads 7 and later"):
        rmfx.from_onnx(old)


def test_a_wrong_rule_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_case(tmp_path / "in.onnx", Case("LeakyRelu"))
    monkeypatch.setitem(RULES, "LeakyRelu", lambda call: call.layer(nn.LeakyReLU(0.0101)))
    with pytest.raises(VerificationError, match="does not compute what the file does"):
        rmfx.from_onnx(path)
    assert len(list(rmfx.from_onnx(path, check=False).children())) == 1


def test_an_output_that_differs_from_the_original_is_not_published(
    files: dict[tuple[bool, bool], Path], tmp_path: Path
) -> None:
    x, source = torch.randn(2, 3, 13, 12), files[False, False]
    wrong = rmfx.from_onnx(changed(source, tmp_path))
    with pytest.raises(ExportError, match="against 00.onnx"):
        rmfx.export(wrong, tmp_path / "out.onnx", x, like=source)
    assert not (tmp_path / "out.onnx").exists()
    with pytest.raises(ExportError, match="00.onnx has 1 inputs, and 2 example inputs were given"):
        rmfx.export(wrong, tmp_path / "out.onnx", (x, x), like=source)


def test_names_inside_give_way_to_those_of_the_original(tmp_path: Path) -> None:
    """The original calls its ends as the new file would call values inside."""
    nodes = [helper.make_node("Conv", ["relu", "w"], ["a"], "conv"), helper.make_node("Relu", ["a"], ["b"], "relu")]
    nodes += [helper.make_node("Conv", ["b", "w"], ["conv2d"], "conv2d")]
    path = write(tmp_path / "in.onnx", nodes, constants={"w": draw(4, 4, 1, 1)}, inputs={"relu": IMAGE})
    x = torch.randn(1, 4, 7, 8)
    rmfx.export(rmfx.from_onnx(path), tmp_path / "out.onnx", x, like=path)
    after = read_signature(tmp_path / "out.onnx")
    assert ([entry.name for entry in after.inputs], after.outputs) == (["relu"], ("conv2d",))


def test_several_inputs_and_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["a", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "b"], ["y"]),
    ]
    path = write(tmp_path / "in.onnx", nodes, constants={"w": draw(4, 4, 3, 3)}, inputs={"a": IMAGE, "b": IMAGE})
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location="in.data", size_threshold=0)
    model = rmfx.from_onnx(path)
    assert [node.name for node in model.graph.nodes if node.op == "placeholder"] == ["a", "b"]
    agree(path, model.requires_grad_(False), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8))


def test_half_precision_stays(tmp_path: Path) -> None:
    constants = {"w": draw(4, 4, 3, 3).astype("float16")}
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    path = write(tmp_path / "in.onnx", [node], constants=constants, element=TensorProto.FLOAT16)
    assert {parameter.dtype for parameter in rmfx.from_onnx(path).parameters()} == {torch.float16}


def test_chaos_is_measured_and_a_wrong_graph_is_none(tmp_path: Path) -> None:
    """A network that amplifies rounding at large inputs only is compared at small ones; a wrong file still fails."""

    class Chaos(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(14):
                x = x + 0.1 * torch.sin(x * x) * x
            return x

    x = torch.randn(2, 5)
    sources = onnx_check._Sources(lambda inputs: onnx_check.outputs_of(Chaos(), inputs), Chaos())
    ladder = onnx_check._Ladder(sources, (x,), (False,), None, onnx_check.AMPLITUDES)
    assert ladder.trial(0) is not None
    assert ladder._is_chaotic(12.0)
    assert not ladder._is_chaotic(1.0)
    calm = onnx_check._Sources(lambda inputs: onnx_check.outputs_of(nn.Tanh(), inputs), nn.Tanh())
    assert not onnx_check._Ladder(calm, (x,), (False,), None, onnx_check.AMPLITUDES)._is_chaotic(12.0)
    nodes = []
    for i in range(14):
        parts = [("Mul", "x", "x"), ("Sin", "p0"), ("Mul", "p1", "x"), ("Mul", "p2", "tenth"), ("Add", "x", "p3")]
        for j, (op, *names) in enumerate(parts):
            inputs = [{"x": f"x{i}" if i else "x", "tenth": "tenth"}.get(name, f"{name}_{i}") for name in names]
            nodes.append(helper.make_node(op, inputs, [f"x{i + 1}" if j == 4 else f"p{j}_{i}"]))
    path = write(tmp_path / "chaos.onnx", nodes, constants={"tenth": f32(0.1)}, inputs={"x": ("n", 5)})
    onnx_check.check_file(path, Chaos(), (x,), (True,), "cpu")
    with pytest.raises(ExportError, match="the file computes"):
        onnx_check.check_file(path, nn.Sequential(Chaos(), nn.Hardtanh(-1, 1)), (x,), (True,), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dynamo", "optimise"),
    [
        ("resnet18", True, True),
        ("mobilenet_v2", True, False),
        ("efficientnet_b0", False, False),
        ("regnet_y_400mf", True, False),
    ],
)
def test_networks_of_torchvision(name: str, dynamo: bool, optimise: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    model = randomise(import_torchvision().models.get_model(name, weights=None), torch.randn(8, 3, 64, 64))
    source = written(tmp_path / "in.onnx", model, x, dynamo, optimise)
    plain = rmfx.convert(rmfx.from_onnx(source), x)
    rmfx.export(plain, tmp_path / "out.onnx", x, like=source)
    assert sums(source) == len(rmfx.report(plain).entries)
    assert sums(tmp_path / "out.onnx") == rmfx.report(plain).count("refused")
    if name in ("resnet18", "mobilenet_v2"):
        assert sums(tmp_path / "out.onnx") == 0
