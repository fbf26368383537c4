"""``rmfx bench``: any two networks in any two runtimes, in pairs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import rmfx
from rmfx.cli.app import app
from rmfx.errors import ModelNameError, RmfxError
from rmfx.measure.runners import runner
from rmfx.measure.target import Target

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def bench(*arguments: object) -> str:
    command = ["bench", *map(str, arguments), "--pairs", "3", "--threads", "1"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def file(tmp_path: Path, name: str, width: int) -> Path:
    network = nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.ReLU()).eval()
    return rmfx.export(network, tmp_path / name, X, dynamic_batch=False)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["eager", "inductor", "onnxruntime"])
@pytest.mark.parametrize("second", ["eager", "inductor", "onnxruntime", "onnxruntime-int8"])
def test_every_pair_of_runtimes(first: str, second: str) -> None:
    told = json.loads(
        bench("rmfx:resnet20", "rmfx:resnet20", "--runtime", first, "--runtime-b", second, "--size", 16, "--json")
    )
    assert [told[key]["runtime"] for key in "ab"] == [f"{first}:cpu", f"{second}:cpu"]
    assert told["a"]["input"] == told["b"]["input"] == [1, 3, 16, 16]
    assert told["pairs"] == 3 and told["threads"] == 1
    medians = [sorted(samples)[1] for samples in told["samples_ms"]]
    assert medians == [told["first_ms"], told["second_ms"]] and min(medians) > 0
    low, high = told["interval"]
    assert low <= told["ratio"] <= high


def test_inductor_freezes_what_it_is_timed_with() -> None:
    x = torch.randn(2, 3, 16, 16)
    for dtype, frozen in ((torch.float32, True), (torch.float64, False)):
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval().to(dtype)
        call = runner(network, (x.to(dtype),), Target("inductor"))
        before = call()
        assert torch.allclose(before, network(x.to(dtype)), atol=1e-5)  # type: ignore[arg-type]
        network[0].weight.data.add_(1)
        assert torch.equal(call(), before) is frozen  # type: ignore[arg-type]


def test_the_network_stays_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmfx.measure.target._DEVICE", re.compile("cpu|meta"))  # the other device that is always there
    network = nn.Conv2d(3, 8, 3).eval()
    made = runner(network, (X,), Target("eager", "meta"))()
    assert isinstance(made, Tensor) and made.is_meta
    assert network.weight.device.type == "cpu"


def test_macs_are_those_of_one_call(tmp_path: Path) -> None:
    narrow, wide = file(tmp_path, "narrow.onnx", 8), file(tmp_path, "wide.onnx", 64)
    told = json.loads(bench(narrow, wide, "--runtime", "onnxruntime", "--json"))
    assert [told[key]["macs"] for key in "ab"] == [14 * 14 * 27 * width for width in (8, 64)]
    assert [told[key]["parameters"] for key in "ab"] == [27 * 8, 27 * 64]
    twice = json.loads(bench("rmfx:resnet20", "rmfx:resnet20", "--size", 16, "--batch", 2, "--json"))
    once = json.loads(bench("rmfx:resnet20", "rmfx:resnet20", "--size", 16, "--json"))
    assert twice["a"]["macs"] == 2 * once["a"]["macs"] and twice["a"]["parameters"] == once["a"]["parameters"]


def test_the_slower_one_is_told(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 64, 64)
    files = [
        rmfx.export(nn.Conv2d(3, width, 7).eval(), tmp_path / f"{width}.onnx", x, dynamic_batch=False)
        for width in (1, 512)
    ]
    told = bench(*files, "--runtime", "onnxruntime")
    assert f"A: {files[0]} in onnxruntime:cpu: " in told and "MACs, 148 parameters" in told
    assert "B is slower" in told and "B is faster" in bench(*files[::-1], "--runtime", "onnxruntime")


def test_a_saved_network_and_an_onnx_file_in_torch(tmp_path: Path) -> None:
    network = rmfx.convert(rmfx.models.resnet20().eval(), X)
    rmfx.save(network, tmp_path / "net.rmfx")
    rmfx.export(network, tmp_path / "net.onnx", X)
    command = (tmp_path / "net.rmfx", tmp_path / "net.onnx", "--input-shape", "3,16,16", "--json")
    told = json.loads(bench(*command))
    assert told["a"]["macs"] == told["b"]["macs"] > 0


def test_a_file_that_cannot_be_imported_runs_all_the_same(tmp_path: Path) -> None:
    source = file(tmp_path, "net.onnx", 8)
    done = rmfx.quantise(source, tmp_path / "int8.onnx", [X])
    command = ["bench", str(source), str(done.path), "--runtime", "onnxruntime", "--pairs", "3"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0 and "unknown MACs, unknown parameters" in result.stdout
    assert "MACs of" in result.stderr and "are not counted: int8.onnx" in result.stderr
    with pytest.raises(RmfxError, match="DequantizeLinear"):
        bench(source, done.path, "--runtime", "onnxruntime", "--runtime-b", "eager")


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        (("rmfx:resnet20", "rmfx:nothing"), ModelNameError, "nothing"),
        (("rmfx:resnet20", "rmfx:resnet20", "--runtime", "tensorflow"), RmfxError, "unknown runtime 'tensorflow'"),
        (("rmfx:resnet20", "rmfx:resnet20", "--runtime-b", "eager:tpu"), RmfxError, "unknown device 'tpu'"),
        (("a.onnx", "rmfx:resnet20", "--runtime", "onnxruntime"), RmfxError, "cannot read a.onnx as ONNX"),
    ],
)
def test_bad_requests(arguments: tuple[str, ...], error: type[RmfxError], told: str) -> None:
    with pytest.raises(error, match=told):
        bench(*arguments)
