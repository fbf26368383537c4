"""A session runs a file on torch tensors where they lie, and says what is wrong with those it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import rmfx
from rmfx.errors import OnnxImportError, RmfxError, RuntimeUnavailableError

NET = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)).eval()
SHAPE = (2, 3, 9, 11)


def net_file(tmp_path: Path, **options: object) -> Path:
    return rmfx.export(NET, tmp_path / "net.onnx", torch.randn(SHAPE), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is only read."""
    return net_file(tmp_path_factory.mktemp("net"))


def written(
    tmp_path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, int, list[int | str]]],
    outputs: list[tuple[str, int, list[int | str]]],
) -> Path:
    ends = [[helper.make_tensor_value_info(*entry) for entry in entries] for entries in (inputs, outputs)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *ends), ir_version=10, opset_imports=[helper.make_opsetid("", 20)]
    )
    onnx.checker.check_model(model)
    path = tmp_path / "made.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def two_inputs(tmp_path: Path, element: int = TensorProto.FLOAT) -> Path:
    """``z = x - y``; both have the same free batch."""
    inputs: list[tuple[str, int, list[int | str]]] = [(name, element, ["n", 3]) for name in "xy"]
    return written(tmp_path, [helper.make_node("Sub", ["x", "y"], ["z"])], inputs, [("z", element, ["n", 3])])


def close(session: rmfx.Session, x: Tensor) -> bool:
    with torch.no_grad():
        truth = copy.deepcopy(NET).double()(x.double().cpu())
    [y] = session(x)
    return float((y.cpu() - truth).abs().max()) <= 4e-6 * float(truth.abs().max())


def test_it_computes_the_network_at_every_batch(tmp_path: Path) -> None:
    session = rmfx.Session(net_file(tmp_path), threads=1)
    assert [port.shape[1:] for port in session.inputs] == [SHAPE[1:]]
    assert repr(session).startswith("Session('") and " on cpu: 'input' (torch.float32, " in repr(session)
    for batch in (1, 2, 5):
        assert close(session, torch.randn(batch, *SHAPE[1:]))


def test_a_result_stays_when_the_session_runs_again(tmp_path: Path) -> None:
    session = rmfx.Session(net_file(tmp_path))
    x = torch.randn(SHAPE)
    [first] = session.run(x)
    kept = first.clone()
    [second] = session.run(torch.randn(SHAPE))
    assert torch.equal(first, kept) and not torch.equal(first, second)


def test_inputs_that_are_not_contiguous_or_need_gradients(tmp_path: Path) -> None:
    session = rmfx.Session(net_file(tmp_path))
    x = torch.randn(SHAPE)
    [expected] = session.run(x)
    strange = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.equal(session.run(strange)[0], expected)


def test_a_view_that_negates_is_negated(net: Path) -> None:
    x = torch.randn(SHAPE)
    with rmfx.Session(net) as session:
        assert torch.equal(session(torch._neg_view(x))[0], session(-x)[0])


def test_inputs_by_position_and_by_name(tmp_path: Path) -> None:
    session = rmfx.Session(two_inputs(tmp_path))
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for [z] in (session.run(x, y), session.run(x, y=y), session.run(y=y, x=x)):
        assert torch.equal(z, x - y)


@pytest.mark.parametrize(
    ("positional", "named"), [(1, ""), (3, ""), (2, "x"), (1, "x"), (0, "x"), (1, "z"), (2, "z"), (0, "")]
)
def test_each_input_is_given_once(positional: int, named: str, tmp_path: Path) -> None:
    session = rmfx.Session(two_inputs(tmp_path))
    with pytest.raises(RmfxError, match=rf"takes 2 inputs \(x, y\), each once; got {positional} by position"):
        session.run(*[torch.zeros(2, 3)] * positional, **{name: torch.zeros(2, 3) for name in named})


@pytest.mark.parametrize(
    ("y", "told"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), r"torch.float64, shape \(2, 3\): cast it with .to\(torch.float32\)"),
        (torch.zeros(3), r"shape \(3,\): it needs 2 dimensions, none of them empty"),
        (torch.zeros(0, 3), "none of them empty"),
        (torch.zeros(2, 4), r"the input 'y' \(torch.float32, nx3\) .*dimension 1 must be 3"),
        (torch.zeros(4, 3), r"where x\[0\] is 2: dimension 0 must be 2"),
        (torch.zeros(2, 3, device="meta"), r"on meta: move it with .to\('cpu'\), where the session runs"),
        (None, "got a NoneType: give a torch tensor"),
    ],
)
def test_an_input_that_does_not_fit_is_told(y: Tensor, told: str, tmp_path: Path) -> None:
    with pytest.raises(RmfxError, match=told):
        rmfx.Session(two_inputs(tmp_path)).run(torch.zeros(2, 3), y)


@pytest.mark.parametrize("element", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT32])
def test_dtypes(element: int, tmp_path: Path) -> None:
    session = rmfx.Session(two_inputs(tmp_path, element))
    dtype = session.inputs[0].dtype
    x, y = torch.arange(6).reshape(2, 3).to(dtype), torch.ones(2, 3, dtype=dtype)
    [z] = session.run(x, y)
    assert z.dtype == dtype and torch.equal(z, x - y)


def test_bfloat16_and_bool_are_bound_too(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)
    cast = written(tmp_path, [node], [("x", TensorProto.BOOL, [2])], [("y", TensorProto.BFLOAT16, [2])])
    [y] = rmfx.Session(cast).run(torch.tensor([True, False]))
    assert torch.equal(y, torch.tensor([1.0, 0.0], dtype=torch.bfloat16))


def test_sizes_that_only_the_result_knows(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
    ]
    outputs: list[tuple[str, int, list[int | str]]] = [
        ("places", TensorProto.INT64, [2, "found"]),
        ("sum", TensorProto.FLOAT, []),
    ]
    session = rmfx.Session(written(tmp_path, nodes, [("x", TensorProto.FLOAT, ["n", 2])], outputs))
    for x in (torch.tensor([[0.0, 3.0], [4.0, 0.0]]), torch.zeros(3, 2)):
        places, total = session.run(x)
        assert torch.equal(places, x.nonzero().T) and total.shape == () and float(total) == float(x.sum())


def test_an_output_of_another_size_than_the_file_says(tmp_path: Path) -> None:
    nodes = [helper.make_node("Concat", ["x", "x"], ["both"], axis=0), helper.make_node("Relu", ["both"], ["y"])]
    session = rmfx.Session(
        written(tmp_path, nodes, [("x", TensorProto.FLOAT, ["n"])], [("y", TensorProto.FLOAT, ["n"])])
    )
    with pytest.raises(RmfxError, match="onnxruntime failed: .*computed output shape for this run is .6."):
        session.run(torch.zeros(3))


def test_a_closed_session_says_so(tmp_path: Path) -> None:
    path = net_file(tmp_path)
    with rmfx.Session(path) as session:
        session.run(torch.zeros(SHAPE))
    with pytest.raises(RmfxError, match="net.onnx is closed"):
        session.run(torch.zeros(SHAPE))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": "fp64"}, "unknown precision 'fp64': choose one of fp32, tf32, fp16, bf16, or None"),
        ({"precision": "tf32"}, "precision='tf32' is of NVIDIA GPUs, and the session is to run on cpu"),
        ({"precision": "fp16"}, r"is not in fp16: .*rmfx.export\(..., precision='fp16'\)"),
        ({"precision": "bf16"}, "is not in bf16"),
        ({"precision": "fp32", "device": "tensorrt"}, "TensorRT takes TF32 where it likes"),
        ({"graphs": True}, "graphs=True records CUDA graphs, and the session is to run on cpu: choose cuda"),
        ({"graphs": True, "device": "tensorrt"}, "choose cuda"),
        ({"threads": 0}, "threads=0 on cpu"),
        ({"threads": 2, "device": "cuda"}, "threads=2 on cuda"),
    ],
)
def test_options_that_contradict_are_told(options: dict[str, object], told: str, net: Path) -> None:
    with pytest.raises(RmfxError, match=told):
        rmfx.Session(net, **options)  # type: ignore[arg-type]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(OnnxImportError, match="cannot read .*text.onnx as ONNX"):
        rmfx.Session(tmp_path / "text.onnx", precision="fp32")
    with pytest.raises(RmfxError, match="onnxruntime cannot run this network on cpu"):
        rmfx.Session(tmp_path / "text.onnx")


@pytest.mark.parametrize(
    ("device", "provider"), [("cuda", "CUDAExecutionProvider"), ("tensorrt:1", "TensorrtExecutionProvider")]
)
def test_what_is_not_there_is_an_error_and_not_the_cpu(device: str, provider: str, tmp_path: Path) -> None:
    if provider in onnxruntime.get_available_providers():
        pytest.skip(f"{provider} is installed")
    with pytest.raises(RuntimeUnavailableError, match=rf"{provider} is not active .*pip install 'rmfx\[gpu\]'"):
        rmfx.Session(net_file(tmp_path), device)


@pytest.mark.gpu_runtime
def test_on_the_gpu_and_in_ieee_arithmetic(tmp_path: Path) -> None:
    session = rmfx.Session(net_file(tmp_path), "cuda", "fp32")
    for batch in (1, 2, 5):
        x = torch.randn(batch, *SHAPE[1:], device="cuda")
        assert close(session, x) and session.run(x)[0].is_cuda
    with pytest.raises(RmfxError, match=r"on cpu: move it with .to\('cuda:0'\)"):
        session.run(torch.randn(SHAPE))


@pytest.mark.gpu_runtime
def test_tf32_is_a_switch(tmp_path: Path) -> None:
    # The sum of 64 products of numbers that TF32 rounds: IEEE float32 is a thousand times closer.
    net = nn.Conv2d(64, 64, 3, padding=1).eval()
    x = torch.randn(4, 64, 32, 32)
    path = rmfx.export(net, tmp_path / "net.onnx", x)
    with torch.no_grad():
        truth = copy.deepcopy(net).double()(x.double())
    errors = {
        name: float((rmfx.Session(path, "cuda", name).run(x.cuda())[0].cpu() - truth).abs().max())  # type: ignore[arg-type]
        for name in ("fp32", "tf32")
    }
    assert errors["fp32"] < 1e-5 < errors["tf32"] < 1e-2


@pytest.mark.gpu_runtime
def test_a_cuda_graph_computes_what_the_session_computes(tmp_path: Path) -> None:
    path = net_file(tmp_path, dynamic_batch=False)
    recorded, plain = rmfx.Session(path, "cuda", graphs=True), rmfx.Session(path, "cuda")
    results = []
    for _ in range(4):  # the first runs record, later ones replay
        x = torch.randn(SHAPE, device="cuda")
        results.append((recorded.run(x)[0], plain.run(x)[0]))
    assert all(torch.allclose(a, b, rtol=0, atol=4e-6 * float(b.abs().max())) for a, b in results)
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.gpu_runtime
def test_a_cuda_graph_needs_fixed_sizes(tmp_path: Path) -> None:
    with pytest.raises(RmfxError, match=r"graphs=True needs fixed shapes, and .* has free sizes.*dynamic_batch=False"):
        rmfx.Session(net_file(tmp_path), "cuda", graphs=True)


@pytest.mark.gpu_runtime
def test_a_node_that_the_gpu_lacks_is_an_error(tmp_path: Path) -> None:
    node = helper.make_node("StringConcat", ["x", "x"], ["y"])
    path = written(tmp_path, [node], [("x", TensorProto.STRING, [2])], [("y", TensorProto.STRING, [2])])
    with pytest.raises(RmfxError, match="cannot run this network on cuda"):
        rmfx.Session(path, "cuda")
