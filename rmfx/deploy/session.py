"""ONNX files as functions of torch tensors: nothing is copied, and nothing runs elsewhere than it was asked to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, get_args

import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from rmfx.deploy import runtime
from rmfx.errors import OnnxImportError, RmfxError, RuntimeUnavailableError

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
_HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_TYPES: dict[str, tuple[torch.dtype, int]] = {
    "tensor(float)": (torch.float32, TensorProto.FLOAT),
    "tensor(double)": (torch.float64, TensorProto.DOUBLE),
    "tensor(float16)": (torch.float16, TensorProto.FLOAT16),
    "tensor(bfloat16)": (torch.bfloat16, TensorProto.BFLOAT16),
    "tensor(int64)": (torch.int64, TensorProto.INT64),
    "tensor(int32)": (torch.int32, TensorProto.INT32),
    "tensor(int8)": (torch.int8, TensorProto.INT8),
    "tensor(uint8)": (torch.uint8, TensorProto.UINT8),
    "tensor(bool)": (torch.bool, TensorProto.BOOL),
}


@dataclass(frozen=True)
class Port:
    """One input or output; ``shape`` holds a name where a size is free, ``None`` where it has not even a name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...]
    element: int

    def __str__(self) -> str:
        return f"{self.name!r} ({self.dtype}, {'x'.join(str(size or '?') for size in self.shape) or 'one number'})"


class Session:
    """An ONNX file that onnxruntime runs on torch tensors, where they lie.

    Inputs and outputs are bound by their addresses (IO binding). Outputs are new tensors on each call. An input must
    lie on the device of the session, and be of the type and shape in the file: nothing is moved or cast behind one's
    back (one that is not contiguous is copied).

    Args:
        path: the ONNX file.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"tensorrt"`` or ``"tensorrt:1"``. Every node runs there, or the
            session is refused.
        precision: ``None``: that of the file, with float32 in IEEE arithmetic on the CPU and CUDA. ``"tf32"``: let CUDA
            compute float32 in TF32. ``"fp32"``, ``"fp16"``, ``"bf16"``: refuse a file that is in another one
            (:func:`rmfx.export` writes all three), and TensorRT for ``"fp32"``, since it takes TF32 as it likes.
        threads: of one operator on the CPU; ``None`` for one per core.
        graphs: record the work as a CUDA graph, and replay it: a launch instead of one per kernel. Needs fixed shapes
            (``rmfx.export(..., dynamic_batch=False)``). Inputs are then copied into one place, and outputs out of one,
            on the GPU.
        optimise: let onnxruntime rewrite the graph.

    Raises:
        RuntimeUnavailableError: when onnxruntime, the device, or torch on that device is missing.
        RmfxError: when the file cannot be run there, or the options contradict it or one another.

    >>> import pathlib, rmfx, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "net.onnx"
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    >>> x = torch.randn(1, 3, 16, 16)
    >>> with rmfx.Session(rmfx.export(net, file, x)) as session:
    ...     [y] = session.run(x)
    >>> torch.allclose(y, net(x), atol=1e-6)
    True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "cpu",
        precision: Precision | None = None,
        *,
        threads: int | None = None,
        graphs: bool = False,
        optimise: bool = True,
    ) -> None:
        kind, index = runtime.parse(device)
        _demand_precision(path, kind, precision)
        if graphs and kind != "cuda":
            raise RmfxError(f"graphs=True records CUDA graphs, and the session is to run on {device}: choose cuda")
        if threads is not None and (threads < 1 or kind != "cpu"):
            raise RmfxError(f"threads={threads} on {device}: threads are of the CPU, and at least 1")
        runtime.require(device)
        if kind != "cpu" and not torch.cuda.is_available():
            raise RuntimeUnavailableError(
                f"onnxruntime is to run on {device}, and this torch has no CUDA, so no tensor can lie there: "
                "install a CUDA build of torch, or use rmfx.deploy.runtime.session with arrays"
            )
        self.file = os.fspath(path)
        self.device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", int(index))
        self._session: Any = runtime.session(
            path, device, optimise, threads=threads, tf32=precision == "tf32", graphs=graphs
        )
        self.inputs = tuple(_port(self.file, entry) for entry in self._session.get_inputs())
        self.outputs = tuple(_port(self.file, entry) for entry in self._session.get_outputs())
        self._recorded = self._record() if graphs else None

    def run(self, *inputs: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
        """Run the file once.

        Args:
            inputs: in the order of the file, which is that of ``session.inputs``.
            named: inputs by name; each input is given once, either way.

        Returns:
            the outputs in the order of the file, on the device of the session; the work is done.

        Raises:
            RmfxError: for a wrong number, name, device, dtype or shape of inputs, and for what fails inside.
        """
        if self._session is None:
            raise RmfxError(f"the session of {self.file} is closed")
        values = self._checked(inputs, named)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # onnxruntime runs on a stream of its own
        if self._recorded is None:
            return self._call(values)()
        return self._recorded.replay(self._session, values)

    __call__ = run

    def close(self) -> None:
        """Free what onnxruntime holds; the session cannot run any more."""
        self._session = self._recorded = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        ends = " -> ".join(", ".join(map(str, ports)) for ports in (self.inputs, self.outputs))
        return f"Session({self.file!r} on {self.device}: {ends})"

    def _checked(self, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> list[Tensor]:
        names = [port.name for port in self.inputs]
        given = dict(zip(names, inputs, strict=False))
        if len(inputs) > len(names) or named.keys() & given.keys() or {*given, *named} != set(names):
            raise RmfxError(
                f"{self.file} takes {len(names)} inputs ({', '.join(names)}), each once; got {len(inputs)} by position"
                + (f" and {', '.join(named)} by name" if named else "")
            )
        sizes: dict[str, tuple[int, str]] = {}
        return [self._fitting(port, {**given, **named}[port.name], sizes) for port in self.inputs]

    def _fitting(self, port: Port, value: Tensor, sizes: dict[str, tuple[int, str]]) -> Tensor:
        """``value`` as it can be bound; ``sizes`` are those that free sizes took in inputs before it."""
        if not isinstance(value, Tensor):
            raise RmfxError(f"{self.file}: the input {port} got a {type(value).__name__}: give a torch tensor")
        told = f"{self.file}: the input {port} got a tensor of {value.dtype}, shape {tuple(value.shape)}"
        if value.dtype != port.dtype:
            raise RmfxError(f"{told}: cast it with .to({port.dtype})")
        if value.dim() != len(port.shape) or not value.numel():
            raise RmfxError(f"{told}: it needs {len(port.shape)} dimensions, none of them empty")
        for axis, (size, wanted) in enumerate(zip(value.shape, port.shape, strict=True)):
            if isinstance(wanted, str):
                wanted, first = sizes.setdefault(wanted, (size, f"{port.name}[{axis}]"))
                told += "" if first == f"{port.name}[{axis}]" else f", where {first} is {wanted}"
            if wanted is not None and size != wanted:
                raise RmfxError(f"{told}: dimension {axis} must be {wanted}")
        if value.device != self.device:
            raise RmfxError(f"{told} on {value.device}: move it with .to({str(self.device)!r}), where the session runs")
        return value.detach().resolve_neg().contiguous()  # a view that negates lies in memory as it was

    def bound(self, *inputs: Tensor, **named: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """A call that runs the file on these very tensors, bound once: for many runs on one place in memory.

        What is written into the inputs counts in the next call, and outputs of a call are overwritten by the next.

        Raises:
            RmfxError: as :meth:`run`.
        """
        if self._session is None:
            raise RmfxError(f"the session of {self.file} is closed")
        return self._call(self._checked(inputs, named))

    def _call(self, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        sizes = {
            name: size
            for port, value in zip(self.inputs, inputs, strict=True)
            for name, size in zip(port.shape, value.shape, strict=True)
            if isinstance(name, str)
        }
        shapes = [[sizes.get(size) if isinstance(size, str) else size for size in port.shape] for port in self.outputs]
        known = [self._empty(port, shape) for port, shape in zip(self.outputs, shapes, strict=True)]
        session, binding = self._session, self._bind(inputs, known)

        def call() -> tuple[Tensor, ...]:
            _run(session, binding)
            pairs = zip(known, binding.get_outputs(), strict=True)
            return tuple(self._copied(made) if value is None else value for value, made in pairs)

        return call

    def _empty(self, port: Port, shape: list[int | None]) -> Tensor | None:
        """A place for an output, or ``None`` where its size is known only when it is computed."""
        whole = [size for size in shape if size]
        return torch.empty(whole, dtype=port.dtype, device=self.device) if len(whole) == len(shape) else None

    def _copied(self, value: Any) -> Tensor:
        return torch.from_numpy(value.numpy()).to(self.device)

    def _bind(self, inputs: list[Tensor], outputs: list[Tensor | None]) -> Any:
        binding = self._session.io_binding()
        place = (self.device.type, self.device.index or 0)
        for port, value in zip(self.inputs, inputs, strict=True):
            binding.bind_input(port.name, *place, port.element, list(value.shape), value.data_ptr())
        for port, target in zip(self.outputs, outputs, strict=True):
            if target is None:
                binding.bind_output(port.name, *place)
            else:
                binding.bind_output(port.name, *place, port.element, list(target.shape), target.data_ptr())
        return binding

    def _record(self) -> _Recorded:
        free = [str(port) for port in (*self.inputs, *self.outputs) if not all(isinstance(s, int) for s in port.shape)]
        if free:
            raise RmfxError(
                f"{self.file}: graphs=True needs fixed shapes, and {', '.join(free)} has free sizes: "
                "export it with dynamic_batch=False"
            )
        made = [[torch.zeros(p.shape, dtype=p.dtype, device=self.device) for p in ports]  # type: ignore[arg-type]
                for ports in (self.inputs, self.outputs)]  # fmt: skip
        return _Recorded(made[0], made[1], self._bind(made[0], [*made[1]]))


@dataclass(frozen=True)
class _Recorded:
    """The places that a CUDA graph reads from and writes to; onnxruntime records it in its first runs."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    binding: Any

    def replay(self, session: Any, values: list[Tensor]) -> tuple[Tensor, ...]:
        for place, value in zip(self.inputs, values, strict=True):
            place.copy_(value)
        torch.cuda.current_stream(self.inputs[0].device).synchronize()
        _run(session, self.binding)
        return tuple(place.clone() for place in self.outputs)


def _run(session: Any, binding: Any) -> None:
    try:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
    except Exception as problem:  # onnxruntime raises RuntimeError here, and classes of its own
        raise RmfxError(f"onnxruntime failed: {runtime.first_line(problem)}") from problem


def _port(file: str, entry: Any) -> Port:
    if entry.type not in _TYPES:
        raise RmfxError(f"{file}: {entry.name!r} is a {entry.type}, which is no tensor that torch has")
    dtype, element = _TYPES[entry.type]
    return Port(entry.name, dtype, tuple(entry.shape), element)


def _demand_precision(path: str | os.PathLike[str], kind: str, precision: Precision | None) -> None:
    if precision is None:
        return
    if precision not in get_args(Precision):
        raise RmfxError(f"unknown precision {precision!r}: choose one of {', '.join(get_args(Precision))}, or None")
    if precision == "tf32" and kind == "cpu":
        raise RmfxError("precision='tf32' is of NVIDIA GPUs, and the session is to run on cpu")
    if precision == "fp32" and kind == "tensorrt":
        raise RmfxError("TensorRT takes TF32 where it likes, and cannot be told not to: precision='tf32', or cuda")
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as problem:  # OSError, or one of protobuf's own
        raise OnnxImportError(f"cannot read {os.fspath(path)} as ONNX: {problem}") from problem
    held = {tensor.data_type for tensor in model.graph.initializer}
    if _HALF.get(precision) not in {None, *held} or (precision not in _HALF and held & {*_HALF.values()}):
        raise RmfxError(
            f"{os.fspath(path)} is not in {precision}: a precision is chosen when a file is written, "
            f"rmfx.export(..., precision={precision.replace('tf32', 'fp32')!r})"
        )
