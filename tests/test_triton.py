"""A model repository for Triton says what the file in it is, and is whole or untouched."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from front import Lambda
from google.protobuf import text_format
from nets import build
from test_cli import Runner, nets, rmfx_command
from torch import Tensor, nn
from triton_schema import name_of, parse

import rmfx
from rmfx.deploy import runtime
from rmfx.deploy.triton import Serving, export_triton
from rmfx.errors import ExportError, UnsupportedModelError

__all__ = ["nets", "rmfx_command"]  # fixtures

triton_module = importlib.import_module("rmfx.deploy.triton")
NUMPY = {"TYPE_FP32": np.float32, "TYPE_FP64": np.float64, "TYPE_INT64": np.int64, "TYPE_FP16": np.float16}


def plain_net() -> tuple[nn.Module, Tensor]:
    model, x = build("basic_chain")
    model, x = model.float(), x.float()
    return rmfx.convert(model, x), x


def config_of(file: Path) -> Any:
    return parse((file.parent.parent / "config.pbtxt").read_text(encoding="utf-8"))


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def request(config: Any, batch: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """What Triton hands to onnxruntime, of the names, types and sizes in the configuration, and nothing else."""
    random = np.random.default_rng(seed)
    feed = {}
    for entry in config.input:
        dims = list(entry.reshape.shape) if entry.HasField("reshape") else list(entry.dims)
        shape = [batch, *dims] if config.max_batch_size else dims
        feed[entry.name] = random.normal(size=[3 if size == -1 else size for size in shape]).astype(
            NUMPY[name_of(entry, "data_type")]
        )
    return feed


def serve(file: Path, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs of one request, after checking the answer against the configuration."""
    config = config_of(file)
    assert config.name == file.parent.parent.name and config.backend == "onnxruntime"
    feed = request(config, batch)
    names = [entry.name for entry in config.output]
    answer = dict(zip(names, runtime.session(file).run(names, feed), strict=True))
    for entry in config.output:
        dims = list(entry.reshape.shape) if entry.HasField("reshape") else list(entry.dims)
        shape = [batch, *dims] if config.max_batch_size else dims
        actual = answer[entry.name]
        assert actual.dtype == NUMPY[name_of(entry, "data_type")] and actual.ndim == len(shape)
        assert all(want in (-1, got) for want, got in zip(shape, actual.shape, strict=True))
    return feed, answer


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
def test_the_configuration_is_that_of_the_file(batch: int, tmp_path: Path) -> None:
    plain, x = plain_net()
    file = export_triton(plain, tmp_path, x, name="net", serving=Serving("cpu", 2, 8, (4, 8), 250))
    assert file == tmp_path / "net" / "1" / "model.onnx" and set(tree(tmp_path)) == {
        *("net", "net/1", "net/1/model.onnx", "net/config.pbtxt")
    }
    config = config_of(file)
    assert config.max_batch_size == 8 and list(config.input[0].dims) == list(x.shape[1:])
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    (group,) = config.instance_group
    assert (name_of(group, "kind"), group.count) == ("KIND_CPU", 2) and not config.HasField("optimization")
    assert config.version_policy.latest.num_versions == 1
    feed, answer = serve(file, batch)
    (given,), (returned,) = feed.values(), answer.values()
    expected = plain(torch.from_numpy(given)).detach().numpy()
    assert np.abs(returned - expected).max() < 1e-4 * np.abs(expected).max()


def test_by_default_it_runs_on_a_gpu_in_ieee_arithmetic(tmp_path: Path) -> None:
    net, x = nn.Linear(4, 2).eval(), torch.zeros(2, 4)
    for tf32 in (False, True):
        config = config_of(export_triton(net, tmp_path, x, name="net", serving=Serving(tf32=tf32)))
        (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert accelerator.name == "cuda" and name_of(config.instance_group[0], "kind") == "KIND_GPU"
        assert {p.key: p.value for p in accelerator.parameters} == {"use_tf32": str(int(tf32))}
        assert config.HasField("dynamic_batching") and not config.dynamic_batching.preferred_batch_size
    assert config_of(export_triton(net, tmp_path, x, name="net")).max_batch_size == 32


def test_several_inputs_and_outputs_and_one_that_is_a_number_per_sample(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            z = x.flatten(1).sum(1, keepdim=True) + y
            return z, z.argmax(1), z.sum(1)

    file = export_triton(Two().eval(), tmp_path, (torch.randn(2, 3, 4), torch.randn(2, 5)), name="two")
    config = config_of(file)
    assert [list(entry.dims) for entry in (*config.input, *config.output)] == [[3, 4], [5], [5], [1], [1]]
    assert [entry.HasField("reshape") for entry in config.output] == [False, True, True]
    assert [name_of(entry, "data_type") for entry in config.output] == ["TYPE_FP32", "TYPE_INT64", "TYPE_FP32"]
    (x, y), answer = serve(file, 3)[0].values(), list(serve(file, 3)[1].values())
    assert np.allclose(answer[0], x.reshape(3, -1).sum(1, keepdims=True) + y, atol=1e-4)


def test_a_network_without_a_free_batch_is_not_batched(tmp_path: Path) -> None:
    plain, x = plain_net()
    file = export_triton(plain, tmp_path, x, name="net", dynamic_batch=False)
    config = config_of(file)
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == list(x.shape)
    serve(file, 1)
    file = export_triton(plain, tmp_path, x, name="net", serving=Serving(max_batch_size=0))
    assert config_of(file).max_batch_size == 0 and list(config_of(file).input[0].dims) == [-1, *x.shape[1:]]
    serve(file, 1)


def test_a_batch_that_not_all_share_is_not_batched(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * y

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean()

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, -x])

    file = export_triton(Shared().eval(), tmp_path, (torch.randn(2, 4), torch.randn(4)), name="shared")
    config = config_of(file)
    assert [list(entry.dims) for entry in config.input] == [[-1, 4], [4]] and config.max_batch_size == 0
    serve(file, 1)
    file = export_triton(Mean().eval(), tmp_path, torch.randn(2, 4), name="mean")
    config = config_of(file)
    assert config.max_batch_size == 0 and list(config.output[0].dims) == [1] and config.output[0].HasField("reshape")
    serve(file, 1)
    config = config_of(export_triton(Doubled().eval(), tmp_path, torch.randn(2, 4), name="doubled"))
    assert config.max_batch_size == 0 and list(config.output[0].dims) == [-1, 4]


def test_half_precision(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    for io, expected in (("same", "TYPE_FP32"), ("half", "TYPE_FP16")):
        file = export_triton(nn.Linear(6, 3).eval(), tmp_path, x, name=io, precision="fp16", io=io)
        assert name_of(config_of(file).input[0], "data_type") == expected
        serve(file, 3)


def test_names_are_escaped(tmp_path: Path) -> None:
    source = tmp_path / "strange.onnx"
    rmfx.export(nn.Linear(4, 2).eval(), source, torch.zeros(1, 4))
    model = onnx.load(source)
    names = ['in"put\\:0\n', "ausgang ü \t"]
    for node in model.graph.node:
        node.input[:] = [names[0] if name == model.graph.input[0].name else name for name in node.input]
        node.output[:] = [names[1] if name == model.graph.output[0].name else name for name in node.output]
    model.graph.input[0].name, model.graph.output[0].name = names
    onnx.save(model, source)
    net = rmfx.from_onnx(source)
    file = export_triton(net, tmp_path / "repo", torch.zeros(1, 4), name="né 1", like=source)
    config = config_of(file)
    assert [config.input[0].name, config.output[0].name, config.name] == [*names, "né 1"]
    serve(file, 2)


def test_the_parser_of_these_tests_is_strict() -> None:
    for slip in ('nme: "x"', "max_batch_size: x", 'input [ { dims: [ "1" ] } ]', "instance_group [ { kind: GPU } ]"):
        with pytest.raises(text_format.ParseError):
            parse(slip)


# -- versions, and what fails -----------------------------------------------------------------------------------------


def test_a_second_export_is_the_next_version(tmp_path: Path) -> None:
    first, x = nn.Linear(4, 2).eval(), torch.zeros(1, 4)
    one = export_triton(first, tmp_path, x, name="net")
    before = one.read_bytes()
    for name in ("7", "011", "notes"):  # of others; Triton takes the second and third for no versions
        (tmp_path / "net" / name).mkdir()
    two = export_triton(nn.Linear(4, 3).eval(), tmp_path, x, name="net")
    assert two == tmp_path / "net" / "8" / "model.onnx" and one.read_bytes() == before
    assert list(config_of(two).output[0].dims) == [3]
    assert sorted(os.listdir(tmp_path / "net")) == ["011", "1", "7", "8", "config.pbtxt", "notes"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (two.parent, tmp_path / "net")}
    assert len(modes) == 1, "Triton often runs as another user"


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("stage", ["export", "configuration", "publishing", "interrupt"])
def test_what_fails_leaves_the_repository_as_it_was(
    stage: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, repository = nn.Linear(4, 2).eval(), torch.zeros(1, 4), tmp_path / "deep" / "repository"
    if existing:
        export_triton(net, repository, x, name="net")
    before = tree(tmp_path)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt if stage == "interrupt" else OSError(28, "No space left on device")

    options: dict[str, Any] = {}
    if stage == "export":
        options["opset"] = 5
    elif stage == "configuration":
        monkeypatch.setattr(triton_module, "_free_batch", fail)
    else:
        monkeypatch.setattr("rmfx.files.atomic._publish", _publish_once(fail))
    with pytest.raises(KeyboardInterrupt if stage == "interrupt" else ExportError):
        export_triton(net, repository, x, name="net", **options)
    assert tree(tmp_path) == before


def _publish_once(fail: Any) -> Any:
    """Publish the ONNX file, and fail at the configuration."""
    from rmfx.files.atomic import _publish

    return lambda folder, target: fail() if target.name == "config.pbtxt" else _publish(folder, target)


def test_what_is_refused(tmp_path: Path) -> None:
    net, x = nn.Linear(4, 2).eval(), torch.zeros(1, 4)
    for name in ("", ".", "..", ".hidden", "a/b", "a\\b", "a\nb", "a\0b"):
        with pytest.raises(ExportError, match="cannot name a model"):
            export_triton(net, tmp_path, x, name=name)
    for wrong in ({"on": "tpu"}, {"instances": 0}, {"max_batch_size": -1}, {"max_queue_delay_us": -1}):
        with pytest.raises(ExportError, match="choose gpu or cpu|must be 1 or more"):
            Serving(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="preferred batch size 64 is not between 1 and max_batch_size=32"):
        Serving(preferred_batch_sizes=(8, 64))
    with pytest.raises(UnsupportedModelError, match="in training mode"):
        export_triton(nn.Linear(4, 2), tmp_path, x, name="net")
    brain = Lambda(lambda m, y: y.to(torch.bfloat16)).eval()
    with pytest.raises(ExportError, match="Triton's onnxruntime has no BFLOAT16 for the output"):
        export_triton(brain, tmp_path, x, name="net", check=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write to"):
        export_triton(net, tmp_path / "file", x, name="net")
    assert set(tree(tmp_path)) == {"file"}


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(rmfx_command: Runner, nets: Path) -> None:
    arguments = ("export", "mine.py:net", "--size", 9, "--triton", "models")
    done = rmfx_command(*arguments, "--serve-on", "cpu", "--max-batch", 4)
    assert done.code == 0 and "wrote models/net/1/model.onnx" in done.out, done.err
    config = config_of(Path("models/net/1/model.onnx"))
    assert config.max_batch_size == 4 and name_of(config.instance_group[0], "kind") == "KIND_CPU"
    data = json.loads(rmfx_command(*arguments, "--name", "other", "--json").out)
    assert data["output"] == "models/other/1/model.onnx" and config_of(Path(data["output"])).max_batch_size == 32
    serve(Path("models/net/1/model.onnx"), 3)
    shutil.rmtree("models")
    for wrong in ((*arguments, "-o", "x.onnx"), arguments[:4], (*arguments[:4], "-o", "x.onnx", "--name", "x")):
        done = rmfx_command(*wrong)
        assert done.code == 2 and "--triton" in done.err
    assert not Path("models").exists() and not Path("x.onnx").exists()
