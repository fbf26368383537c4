"""Files in half precision compute the network that they were rounded from, or are refused with the layer at fault."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from typer.testing import CliRunner

import rmfx
from rmfx.cli.app import app
from rmfx.deploy import onnx_check, runtime
from rmfx.deploy.precision import Rounded, demand_ranges, gap, in_float32
from rmfx.errors import ExportError, RmfxError
from rmfx.hostile import randomise
from rmfx.models import cifar_resnet

HALF = {"fp16": (torch.float16, TensorProto.FLOAT16), "bf16": (torch.bfloat16, TensorProto.BFLOAT16)}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    return randomise(cifar_resnet(8), X, 0).eval()


def plain() -> nn.Module:
    return rmfx.convert(small(), X)


def types(path: Path) -> tuple[set[int], set[int]]:
    """Types of the weights that are numbers, and of inputs and outputs."""
    graph = onnx.load(str(path)).graph
    weights = {tensor.data_type for tensor in graph.initializer if tensor.data_type != TensorProto.INT64}
    return weights, {entry.type.tensor_type.elem_type for entry in (*graph.input, *graph.output)}


BORDERS = [("fp16", "same", small), ("fp16", "half", plain), ("bf16", "same", plain), ("bf16", "half", small)]


@pytest.mark.parametrize(("precision", "io", "make"), BORDERS)
def test_weights_are_in_half_and_the_border_as_asked(precision: str, io: str, make: object, tmp_path: Path) -> None:
    network = make()  # type: ignore[operator]
    before = copy.deepcopy(network.state_dict())
    path = rmfx.export(network, tmp_path / "net.onnx", X, precision=precision, io=io)  # type: ignore[arg-type]
    onnx.checker.check_model(str(path), full_check=True)
    element = HALF[precision][1]
    assert types(path) == ({element}, {TensorProto.FLOAT if io == "same" else element})
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    graph = onnx.load(str(path)).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param
    names = onnx.load(str(rmfx.export(network, tmp_path / "own.onnx", X))).graph
    assert [entry.name for entry in graph.input] == [entry.name for entry in names.input]


def test_the_file_runs_and_is_as_far_off_as_is_told(tmp_path: Path) -> None:
    network = plain()
    path = rmfx.export(network, tmp_path / "net.onnx", X, precision="fp16")
    with torch.no_grad():
        truth = copy.deepcopy(network).double()(X.double())
    [result] = rmfx.Session(path, precision="fp16").run(X)
    off = float((result.double() - truth).abs().max() / truth.abs().max())
    assert off == gap(network, [X], "fp16", path)
    assert 1e-6 < off < 1e-2  # eleven bits in nine layers
    assert 1e-6 < gap(network, [X], "fp16") < gap(network, [X], "bf16") < 0.1
    assert gap(network, [X], "fp32") < 1e-5


def test_a_file_in_half_is_told_from_one_in_float32(tmp_path: Path) -> None:
    path = rmfx.export(small(), tmp_path / "half.onnx", X, precision="fp16")
    [half], [same] = rmfx.Session(path, precision="fp16").run(X), rmfx.Session(path).run(X)
    assert torch.equal(half, same) and half.dtype == torch.float32
    for other in ("fp32", "bf16"):
        with pytest.raises(RmfxError, match=rf"half.onnx is not in {other}: .*precision='{other}'\)"):
            rmfx.Session(path, precision=other)


def test_float64_is_rounded_to_float32_when_asked(tmp_path: Path) -> None:
    path = rmfx.export(small().double(), tmp_path / "net.onnx", X.double(), precision="fp32", io="half")
    assert types(path) == ({TensorProto.FLOAT}, {TensorProto.FLOAT})


def test_a_network_in_bfloat16_is_written_as_it_is(tmp_path: Path) -> None:
    path = rmfx.export(small().bfloat16(), tmp_path / "net.onnx", X.bfloat16())
    assert types(path) == ({TensorProto.BFLOAT16}, {TensorProto.BFLOAT16})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_file_that_came_from_onnx_keeps_its_names(precision: str, tmp_path: Path) -> None:
    rmfx.export(small(), tmp_path / "in.onnx", X)
    network = rmfx.from_onnx(tmp_path / "in.onnx")
    options = {"like": tmp_path / "in.onnx", "precision": precision}
    path = rmfx.export(network, tmp_path / "out.onnx", X, **options)  # type: ignore[arg-type]
    graphs = [onnx.load(str(file)).graph for file in (tmp_path / "in.onnx", path)]
    ends = [[[entry.name for entry in entries] for entries in (graph.input, graph.output)] for graph in graphs]
    assert ends[0] == ends[1]
    with torch.no_grad():
        next(p for p in network.parameters() if p.dim() == 4).mul_(1.5)  # now it is another network than in.onnx
    with pytest.raises(ExportError, match=r"against in.onnx.*the file computes"):
        rmfx.export(network, tmp_path / "out.onnx", X, **options)  # type: ignore[arg-type]


class Large(nn.Module):
    """Passes 65,504 in ``second``, or where a sum of two of its layers enters ``third``."""

    def __init__(self, factor: float, summed: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))
        for layer, scale in ((self.first, 1.0), (self.second, factor), (self.third, 1.0 / factor)):
            nn.init.dirac_(layer.weight)
            layer.weight.data *= scale
        self.summed = summed
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return self.third(y + y if self.summed else y)


@pytest.mark.parametrize(
    ("network", "precision", "told"),
    [
        (Large(5e4), "fp16", r"example inputs the output of 'second' \(Conv2d\) reaches .*float16 ends at 65504"),
        (Large(1e5), "fp16", "the weight 'second.weight' reaches 100000, and torch.float16 ends at 65504"),
        (Large(2e4, True), "fp16", r"the input of 'third' \(Conv2d\) reaches"),
        (Large(float("nan")), "fp16", r"the output of 'second' \(Conv2d\) reaches nan"),
        (Large(float("nan")), "bf16", r"the output of 'second' \(Conv2d\) reaches nan"),
    ],
)
def test_what_is_too_large_is_told_with_its_layer(
    network: nn.Module, precision: str, told: str, tmp_path: Path
) -> None:
    x = X.clamp(-3, 3)
    x[0, 0, 0, 0] = 3.0
    with pytest.raises(ExportError, match=told):
        rmfx.export(network, tmp_path / "net.onnx", x, precision=precision)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_bfloat16_reaches_further_and_infinite_bounds_are_no_overflow() -> None:
    x = X.clamp(-3, 3)
    demand_ranges(Large(5e4), [x], torch.bfloat16)
    clamp = rmfx.modules.ChannelClamp(torch.zeros(3), torch.full((3,), torch.inf))
    demand_ranges(nn.Sequential(Large(1.0), clamp).eval(), [x], torch.float16)
    with pytest.raises(ExportError, match="the input of 'first'"):
        demand_ranges(Large(1.0), [x * 1e5], torch.float16)


def test_the_graph_and_the_weights_of_a_bfloat16_file_are_compared(tmp_path: Path) -> None:
    """A wrong weight in the file must be seen though no runtime here has bfloat16."""
    network = plain()
    path = rmfx.export(network, tmp_path / "net.onnx", X, precision="bf16")
    with pytest.raises(RmfxError, match="onnxruntime cannot run this network on cpu"):
        runtime.session(path)
    model = onnx.load(str(path))
    bias = max((t for t in model.graph.initializer if len(t.dims) == 1), key=lambda t: t.dims[0])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.asarray(3, "bfloat16"), bias.name))
    onnx.save(model, str(path))
    in_float32(path, tmp_path / "wide.onnx")
    assert types(tmp_path / "wide.onnx") == ({TensorProto.FLOAT}, {TensorProto.FLOAT})
    onnxruntime.InferenceSession(str(tmp_path / "wide.onnx"))
    with pytest.raises(ExportError, match="the file computes"):
        onnx_check.check_file(
            tmp_path / "wide.onnx", Rounded(network, torch.bfloat16), [X], [True], "cpu", arithmetic=torch.bfloat16
        )


def test_wide_files_hold_the_same_numbers(tmp_path: Path) -> None:
    path = rmfx.export(plain(), tmp_path / "net.onnx", X, precision="bf16", check=False)
    in_float32(path, tmp_path / "wide.onnx")
    files = [onnx.load(str(file)).graph.initializer for file in (path, tmp_path / "wide.onnx")]
    pairs = list(zip(*files, strict=True))
    assert pairs and all(
        np.array_equal(numpy_helper.to_array(a).astype("float64"), numpy_helper.to_array(b).astype("float64"))
        for a, b in pairs
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": "fp8"}, "unknown precision 'fp8': choose one of fp32, fp16, bf16, or None"),
        ({"precision": "fp16", "io": "fp32"}, "io='fp32' with precision='fp16': choose 'same', or 'half'"),
        ({"io": "half"}, "io='half' with precision=None: choose 'same', or 'half' with a precision"),
    ],
)
def test_options_are_checked(options: dict[str, str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=told):
        rmfx.export(small(), tmp_path / "net.onnx", X, **options)  # type: ignore[arg-type]


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.eval()

    def forward(self, x: Tensor, where: Tensor) -> dict[str, Tensor]:
        return {"sum": x + self.table(where), "where": where, "x": x}


def test_integers_stay_integers(tmp_path: Path) -> None:
    inputs = (torch.randn(4, 3), torch.tensor([0, 1, 4, 2]))
    path = rmfx.export(Indexed(), tmp_path / "net.onnx", inputs, precision="fp16")
    first, second, third = rmfx.Session(path).run(*inputs)
    assert (first.dtype, second.dtype, third.dtype) == (torch.float32, torch.int64, torch.float32)
    assert torch.equal(second, inputs[1]) and torch.equal(third, inputs[0].half().float())


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "where"), [("fp16", "onnxruntime"), ("bf16", "torch")])
def test_the_command_tells_the_gap(precision: str, where: str, tmp_path: Path) -> None:
    command = ["export", "rmfx:resnet20", "--precision", precision, "-o", str(tmp_path / "net.onnx")]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["precision"], told["io"], told["gap_in"]) == (precision, "same", where) and 0 < told["gap"] < 0.1
    result = CliRunner().invoke(app, command)
    assert f"in {where}, {precision} is off by " in result.stdout
    assert ("no bfloat16 on cpu" in result.stdout) == (precision == "bf16")


@pytest.mark.gpu_runtime
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_on_the_gpu(precision: str, tmp_path: Path) -> None:
    network = plain()
    try:
        path = rmfx.export(network, tmp_path / "net.onnx", X, precision=precision, device="cuda")  # type: ignore[arg-type]
    except ExportError as problem:
        # Not every version of the CUDA provider has bfloat16 convolutions; then nothing may be left behind.
        assert precision == "bf16" and "cannot run this network on cuda" in str(problem)
        assert not list(tmp_path.iterdir())
        return
    assert 0 < gap(network, [X], precision, path, "cuda") < 0.1  # type: ignore[arg-type]
