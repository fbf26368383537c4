"""Files in int8: near the float32 file or refused; and channels scaled for int8 without changing one bit."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, fx, nn
from typer.testing import CliRunner

import rmfx
from rmfx.cli.app import app
from rmfx.deploy import runtime
from rmfx.deploy.balance import balance, best_factors
from rmfx.deploy.quantise import _Reader
from rmfx.errors import ExportError, OnnxImportError, RmfxError, RuntimeUnavailableError, VerificationError
from rmfx.hostile import randomise
from rmfx.measure.runners import runner
from rmfx.measure.target import Target
from rmfx.models import cifar_resnet

X = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def plain(carrier: str = "auto") -> fx.GraphModule:
    return rmfx.convert(randomise(cifar_resnet(8), X, 0).eval(), X[:1], carrier=carrier)  # type: ignore[arg-type]


def merging() -> fx.GraphModule:
    """Filters that merge hold a 1 beside much smaller weights, as in trained networks."""
    network = randomise(cifar_resnet(8), X, 0).eval()
    for name, layer in network.named_modules():
        if name.endswith("branch.4"):
            layer.weight.data *= 0.1  # type: ignore[operator, union-attr]
    return rmfx.convert(network, X[:1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for all tests that need one."""
    return rmfx.export(plain(), tmp_path_factory.mktemp("float32") / "net.onnx", X[:1])


def run(path: Path) -> Tensor:
    [y] = onnxruntime.InferenceSession(str(path)).run(None, {onnx.load(str(path)).graph.input[0].name: X.numpy()})
    return torch.from_numpy(y)


def test_the_file_is_in_int8_and_as_far_off_as_is_told(source: Path, tmp_path: Path) -> None:
    done = rmfx.quantise(source, tmp_path / "int8.onnx", X.split(16))
    graph = onnx.load(str(done.path)).graph
    filters = [t for t in graph.initializer if len(t.dims) == 4]
    assert len(filters) == 7 and all(t.data_type == TensorProto.INT8 for t in filters)
    scales = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    lengths = {t.name: list(t.dims) for t in graph.initializer}
    assert all(lengths[scales[t.name]] == [t.dims[0]] for t in filters)  # one per filter
    before, after = run(source), run(done.path)
    assert done.error == pytest.approx(float((after - before).double().norm() / before.double().norm()), rel=1e-6)
    assert 1e-3 < done.error < 0.2
    assert done.agreement == float((before.argmax(1) == after.argmax(1)).double().mean()) > 0.8
    assert done.samples == 64 and done.bytes_after < 0.5 * done.bytes_before == 0.5 * source.stat().st_size
    assert json.loads(json.dumps(done.to_dict()))["path"] == str(done.path)


def test_a_target_in_int8_runs_in_int8() -> None:
    network = plain()
    calls = [runner(network, (X,), Target(runtime)) for runtime in ("onnxruntime", "onnxruntime-int8")]
    [(expected,), (moved,)] = [call() for call in calls]  # type: ignore[misc, attr-defined]
    assert 1e-3 < float((moved - expected).norm() / expected.norm()) < 0.1


def test_options_reach_the_quantiser(source: Path, tmp_path: Path) -> None:
    name = next(node.name for node in onnx.load(str(source)).graph.node if node.op_type == "Conv")
    usual = rmfx.quantise(source, tmp_path / "usual.onnx", [X])
    options = {
        "layer": {"per_channel": False},
        "bits": {"reduce_range": True},
        "kept": {"keep": [name]},
        "method": {"method": "percentile"},
    }
    errors = {}
    for label, option in options.items():
        errors[label] = rmfx.quantise(source, tmp_path / f"{label}.onnx", [X], **option).error  # type: ignore[arg-type]
    assert errors["layer"] > usual.error and errors["bits"] > usual.error and errors["method"] != usual.error
    kinds = [t.data_type for t in onnx.load(str(tmp_path / "kept.onnx")).graph.initializer if len(t.dims) == 4]
    assert sorted(kinds) == [TensorProto.FLOAT] + [TensorProto.INT8] * 6


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_nothing_is_printed_and_logging_stays(
    source: Path, method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    rmfx.quantise(source, tmp_path / "int8.onnx", [X[:8]], method=method)  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")
    assert logging.root.handlers == [] and logging.root.manager.disable == 0


def test_others_may_log_while_it_works(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = compile("logging.warning('theirs')", "/site-packages/onnxruntime/quantization/quantize.py", "exec")

    class Reader(_Reader):
        def get_next(self) -> dict[str, Any] | None:
            logging.getLogger("mine").warning("mine")
            logging.warning("root")
            exec(theirs)
            logging.getLogger("onnxruntime.quantization.preprocess").warning("theirs, too")
            return super().get_next()

    monkeypatch.setattr("rmfx.deploy.quantise._Reader", Reader)
    rmfx.quantise(source, tmp_path / "int8.onnx", [X[:8]])
    assert caplog.messages == ["mine", "root"] * 2
    logging.getLogger("onnxruntime.quantization.preprocess").warning("again")
    assert caplog.messages[4:] == ["again"]


def test_several_inputs_and_outputs_that_are_no_classes(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(2, 4, 3)
            self.eval()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(self.first(x) + self.second(y)), self.first(x)

    inputs = X, X[:, :2] + 1
    source = rmfx.export(Two(), tmp_path / "net.onnx", inputs)
    done = rmfx.quantise(source, tmp_path / "int8.onnx", zip(*(value.split(16) for value in inputs), strict=True))
    assert done.agreement is None and 0 < done.error < 0.05 and done.samples == 64


@pytest.mark.parametrize(
    ("data", "options", "told"),
    [
        ([], {}, "there is no calibration data: give at least one batch of inputs"),
        ([X[:, :2]], {}, "dimension 1 must be 3"),
        ([(X, X)], {}, "takes 1 inputs"),
        ([1], {}, "got a int: give a torch tensor"),
        ([X], {"method": "median"}, "unknown method 'median': choose one of minmax, entropy, percentile"),
        ([X * torch.nan], {}, "the outputs of .* are not finite on the calibration data"),
    ],
)
def test_bad_requests_leave_nothing(
    source: Path, data: list[Tensor], options: dict[str, str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(RmfxError, match=told):
        rmfx.quantise(source, tmp_path / "int8.onnx", data, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_what_is_no_network_in_float32_is_told(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(RmfxError, match="onnxruntime cannot run this network"):
        rmfx.quantise(tmp_path / "text.onnx", tmp_path / "int8.onnx", [X])
    with pytest.raises(ExportError, match="there is no folder"):
        rmfx.quantise(source, tmp_path / "none" / "int8.onnx", [X])


def test_without_onnxruntime_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeUnavailableError, match="pip install"):
        rmfx.quantise(tmp_path / "net.onnx", tmp_path / "int8.onnx", [X])


@pytest.mark.parametrize("make", [merging, lambda: merging().double()])
def test_balancing_changes_weights_and_not_one_bit_of_the_result(make: object) -> None:
    network = make()  # type: ignore[operator]
    x = X.to(next(network.parameters()).dtype)
    before = copy.deepcopy(network.state_dict())
    balanced = rmfx.balance(network, x.split(16))
    with torch.no_grad():
        assert torch.equal(balanced(x), network(x))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    after = balanced.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert len(changed) >= 6
    for name in changed:  # by powers of two, and by nothing else
        ratios = (after[name] / before[name])[before[name] != 0].double().log2()
        assert torch.equal(ratios, ratios.round())


def test_balancing_brings_int8_nearer(tmp_path: Path) -> None:
    network, errors = merging(), []
    truth = network(X).detach()
    for net in (network, balance(network, X.split(16))):
        rmfx.export(net, tmp_path / "net.onnx", X[:1])
        path = rmfx.quantise(tmp_path / "net.onnx", tmp_path / "int8.onnx", X.split(16)).path
        # Unoptimised, rounded numbers are multiplied in float32: the same on every processor, VNNI or not.
        [y] = runtime.run(runtime.session(path, optimise=False), (X,))
        errors.append((torch.from_numpy(y) - truth).norm())
    assert errors[1] < 0.97 * errors[0]


MERGING = torch.tensor([1.0, 0.05, 0.05]).reshape(1, 3, 1, 1)


def test_balancing_leaves_what_it_must_not_touch() -> None:
    """A clamp, a layer that is called twice, a weight of two layers, an output with two readers, other channels."""

    class Untouched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(8))
            self.convs[3].weight = self.convs[2].weight
            self.end = nn.Linear(16, 2)
            for conv in self.convs:  # each pair of them alone would be scaled
                conv.weight.data[:] = MERGING  # type: ignore[index, union-attr]

        def forward(self, x: Tensor) -> Tensor:
            x = self.convs[1](nn.functional.hardtanh(self.convs[0](x), 0, 6))
            x = self.convs[3](torch.sin(self.convs[2](x)))
            x = self.convs[4](torch.sin(x))
            x = self.convs[4](torch.sin(x))
            x = torch.sin(self.convs[5](torch.sin(x)))
            x = self.convs[6](x)
            x = torch.sin(self.convs[7](x) + x)
            return self.end(x)

    network = fx.symbolic_trace(Untouched().eval())
    balanced = balance(network, [X])
    after = balanced.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in network.state_dict().items())
    for between in (nn.ReLU(), nn.ZeroPad2d((1, 0, 1, 0))):
        first, second = Untouched().convs[:2]
        pair = fx.symbolic_trace(nn.Sequential(first, between, second).eval())
        assert not torch.equal(balance(pair, [X]).get_parameter("2.weight"), pair.get_parameter("2.weight"))


def test_balancing_looks_at_the_axis_of_the_channels() -> None:
    """A linear layer behind a convolution reads columns of its images, which may be as many as its channels."""
    pair = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 4)).double().eval()
    with torch.no_grad():
        pair[2].weight[:, :4] *= 0.01  # scaling pays
    x = X[:4, :, :8, :8].double()
    network = rmfx.convert(pair, x)
    balanced = balance(network, [x], verify=False)
    assert torch.equal(balanced(x), network(x))


def test_balancing_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    network = merging()
    monkeypatch.setattr("rmfx.deploy.balance._multiply", lambda weight, factors: weight.data.mul_(2))
    with pytest.raises(VerificationError, match="differ"):
        balance(network, [X])


def test_balancing_needs_data_that_is_finite() -> None:
    with pytest.raises(RmfxError, match="there is no data to balance the network with"):
        balance(plain(), [])
    large = plain()
    for weight in large.parameters():
        weight.data *= 1e30
    with pytest.raises(RmfxError, match="is not finite on the data"):
        balance(large, [X * 1e10])


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        (3, "a batch of the data is .*: give tensors that are finite"),
        (X * torch.nan, "a batch of the data is .*: give tensors that are finite"),
        (X[:, :2], "the network does not run on a batch of the data, .*64, 2, "),
        ((X, X), "the network does not run on a batch of the data"),
    ],
)
def test_balancing_needs_data_that_fits(batch: Any, told: str) -> None:
    for network in (plain(), rmfx.convert(nn.Conv2d(3, 4, 3).eval(), X)):  # with pairs, and without
        with pytest.raises(RmfxError, match=told):
            balance(network, [batch])


def test_factors_are_chosen_where_they_pay() -> None:
    zeros, ones = torch.zeros(4), torch.ones(4)
    carried = torch.tensor([[1.0, 0.05, 0.05, 0.04]])
    factors = best_factors(carried, carried.square(), [(zeros, ones)], 0.3 * ones)
    assert factors[0] == 1.0 and bool((factors[1:] < 1).all()) and torch.equal(factors.log2(), factors.log2().round())
    assert torch.equal(best_factors(carried, carried.square(), [(zeros, 1e3 * ones)], 1e-6 * ones), ones)
    even = torch.ones(2, 4)
    assert torch.equal(best_factors(even, even, [(zeros, ones)], 0.3 * ones), ones)
    unread = torch.tensor([[1.0, 0.05, 0.05, 0.0]])
    assert best_factors(unread, unread.square(), [(zeros, ones)], 0.3 * ones)[3] == 1.0


def cli(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["quantise", *arguments])
    return result.exit_code, result.stdout, str(result.exception or "")


def test_the_command_with_arrays(source: Path, tmp_path: Path) -> None:
    name = onnx.load(str(source)).graph.input[0].name
    np.save(tmp_path / "x.npy", X.numpy())
    np.savez(tmp_path / "x.npz", other=np.zeros((64, 1)), **{name: X.numpy()})
    options = ("--samples", "40", "--batch", "16", "--json")
    results = []
    for data in ("x.npy", "x.npz"):
        code, told, _ = cli(str(source), str(tmp_path / "int8.onnx"), "--data", str(tmp_path / data), *options)
        assert code == 0
        results.append(json.loads(told))
    assert results[0] == results[1] and results[0]["samples"] == 32 and 0 < results[0]["error"] < 0.2
    code, told, _ = cli(str(source), str(tmp_path / "int8.onnx"), "--data", str(tmp_path / "x.npy"))
    assert code == 0 and "outputs moved by" in told and "64 samples" in told and "of the answers are the same" in told


def test_the_command_with_images_and_a_fixed_batch(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    source = rmfx.export(network, tmp_path / "net.onnx", torch.randn(5, 1, 8, 8), dynamic_batch=False)
    code, told, _ = cli(
        str(source), str(tmp_path / "int8.onnx"), "--data", "digits", "--samples", "99", "--json", "--per-layer"
    )
    assert code == 0 and json.loads(told)["samples"] == 95


@pytest.mark.parametrize(
    ("array", "told"),
    [
        ({"a": np.zeros((2, 3)), "b": np.zeros((2, 3))}, r"holds a \[2, 3\], b \[2, 3\]; the network needs one array"),
        ({"a": np.zeros(())}, "needs one array for each of"),
        (None, "cannot read .*x.npz as arrays of numpy"),
        (b"", "cannot read .*x.npz as arrays of numpy: No data left"),
        (b"PK\x03\x04 and no more", "cannot read .*x.npz as arrays of numpy: File is not a zip file"),
        ({"a": np.array([{}])}, "cannot read .*x.npz as arrays of numpy: Object arrays cannot be loaded"),
        ({"a": np.array(["text"])}, "cannot read .*x.npz as arrays of numpy: can't convert"),
    ],
)
def test_the_command_tells_what_is_wrong_with_arrays(
    source: Path, array: dict[str, np.ndarray] | bytes | None, told: str, tmp_path: Path
) -> None:
    if isinstance(array, bytes):
        (tmp_path / "x.npz").write_bytes(array)
    elif array is not None:
        np.savez(tmp_path / "x.npz", **array)  # type: ignore[arg-type]
    with pytest.raises(RmfxError, match=told):
        CliRunner().invoke(
            app,
            ["quantise", str(source), str(tmp_path / "y.onnx"), "--data", str(tmp_path / "x.npz")],
            catch_exceptions=False,
        )
    opened = {os.path.realpath(link) for link in Path("/proc/self/fd").glob("*")}  # none on other systems than Linux
    assert str(tmp_path / "x.npz") not in opened


def test_a_quantised_file_cannot_be_imported_and_says_so(source: Path, tmp_path: Path) -> None:
    done = rmfx.quantise(source, tmp_path / "int8.onnx", [X])
    with pytest.raises(OnnxImportError, match="DequantizeLinear"):
        rmfx.from_onnx(done.path)
