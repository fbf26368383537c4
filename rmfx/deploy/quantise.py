"""ONNX files in int8, by onnxruntime's own static quantisation, with what it costs measured before the file appears."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rmfx.deploy import runtime
from rmfx.deploy.session import Session
from rmfx.errors import ExportError, RmfxError
from rmfx.files.atomic import replacing
from rmfx.inputs import as_tuple

Method = Literal["minmax", "entropy", "percentile"]
_METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
Batch = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Quantised:
    """What quantising cost, on the calibration data.

    Attributes:
        path: the file.
        samples: rows of the calibration data.
        error: root mean square of what the outputs moved, by that of the outputs; the largest of all outputs.
        agreement: part of the samples whose largest number in the first output stays at its place; ``None`` where that
            is not ``[samples, classes]``.
        bytes_before, bytes_after: sizes of the files.
    """

    path: Path
    samples: int
    error: float
    agreement: float | None
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {**asdict(self), "path": str(self.path)}


def quantise(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    data: Iterable[Batch],
    *,
    per_channel: bool = True,
    method: Method = "minmax",
    reduce_range: bool = False,
    keep: Sequence[str] = (),
) -> Quantised:
    """Write the network of ``source`` in int8: weights and activations, with scales measured on ``data`` (static QDQ).

    Weights are symmetric int8 and activations uint8, the pair that onnxruntime computes fastest on x86. Every node that
    has no int8 form stays in float32 between a pair of casts, which the runtime cannot avoid: PRelu is one.

    Args:
        source: an ONNX file in float32.
        path: the file to write.
        data: calibration inputs, each a tensor or a sequence of the inputs in order; some hundred samples are usual.
            They are kept in memory.
        per_channel: one scale per filter, so that a carried channel's filter of a single 1 is exact; or one per layer.
        method: how the range of an activation is taken from what was measured: all of it, or without rare outliers.
        reduce_range: weights of 7 bits, for x86 processors without VNNI, whose int8 sums saturate: there the error
            can be larger with 8 bits. It is measured on the processor that this runs on.
        keep: names of nodes that stay in float32.

    Returns:
        what it cost, measured in onnxruntime on ``data``.

    Raises:
        RuntimeUnavailableError: when onnxruntime is not installed.
        RmfxError: when ``data`` is empty or does not fit the network, or ``source`` cannot be run.
        ExportError: when onnxruntime cannot quantise the network, or a result is not finite.

    >>> import rmfx, tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)).eval()
    >>> x = torch.randn(64, 3, 8, 8)
    >>> float32 = rmfx.export(net, folder / "net.onnx", x)
    >>> 0 < quantise(float32, folder / "int8.onnx", x.split(16), reduce_range=True).error < 0.05  # on any processor
    True
    """
    if method not in get_args(Method):
        raise RmfxError(f"unknown method {method!r}: choose one of {', '.join(get_args(Method))}")
    runtime.require()
    source = os.fspath(source)
    batches = [as_tuple(batch) for batch in data]
    if not batches:
        raise RmfxError("there is no calibration data: give at least one batch of inputs")
    with Session(source) as session:
        names = [port.name for port in session.inputs]
        before = [session.run(*batch) for batch in batches]
    if not all(bool(value.isfinite().all()) for outputs in before for value in outputs):
        raise RmfxError(
            f"the outputs of {source} are not finite on the calibration data, so they have no scale in int8"
        )
    with replacing(path, ExportError) as scratch:
        with _silent():
            _write(source, scratch, _Reader(names, batches), per_channel, method, reduce_range, keep)
        with Session(scratch) as session:
            after = [session.run(*batch) for batch in batches]
        error = _error(before, after)
        sizes = os.stat(source).st_size, scratch.stat().st_size
    return Quantised(Path(path), sum(len(batch[0]) for batch in batches), error, _agreement(before, after), *sizes)


class _Reader:
    """Calibration data as onnxruntime reads it: dictionaries of arrays, then ``None``."""

    def __init__(self, names: Sequence[str], batches: Sequence[tuple[Tensor, ...]]) -> None:
        self.names, self.left = names, list(reversed(batches))

    def get_next(self) -> dict[str, Any] | None:
        if not self.left:
            return None
        return {name: value.detach().numpy() for name, value in zip(self.names, self.left.pop(), strict=True)}


def _write(
    source: str,
    path: Path,
    reader: _Reader,
    per_channel: bool,
    method: Method,
    reduce_range: bool,
    keep: Sequence[str],
) -> None:
    tool = importlib.import_module("onnxruntime.quantization")
    prepare = importlib.import_module("onnxruntime.quantization.preprocess").quant_pre_process
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        try:
            prepare(source, str(prepared), skip_symbolic_shape=True)  # folds norms and constants
            tool.quantize_static(
                str(prepared),
                str(path),
                reader,
                quant_format=tool.QuantFormat.QDQ,
                per_channel=per_channel,
                reduce_range=reduce_range,
                activation_type=tool.QuantType.QUInt8,
                weight_type=tool.QuantType.QInt8,
                nodes_to_exclude=list(keep),
                calibrate_method=tool.CalibrationMethod[_METHODS[method]],
            )
        except OSError:
            raise  # a full disk is told by the caller
        except Exception as problem:  # onnxruntime's quantiser raises ValueError, AttributeError, AssertionError, ...
            raise ExportError(f"onnxruntime cannot quantise {source}: {runtime.first_line(problem)}") from problem


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the quantiser from printing, from setting up the root logger, and from warning through it and its own."""
    idle, own = logging.NullHandler(), logging.getLogger("onnxruntime")
    level = own.level
    logging.root.addHandler(idle)
    logging.root.addFilter(_is_of_others)
    own.setLevel(logging.CRITICAL + 1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        own.setLevel(level)
        logging.root.removeFilter(_is_of_others)
        logging.root.removeHandler(idle)


def _is_of_others(record: logging.LogRecord) -> bool:
    return "onnxruntime" not in Path(record.pathname).parts


Outputs = Sequence[tuple[Tensor, ...]]


def _error(before: Outputs, after: Outputs) -> float:
    worst = 0.0
    for old, new in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True):
        if not old[0].is_floating_point():
            continue
        expected, moved = torch.cat(old).double(), torch.cat(new).double()
        if not bool(moved.isfinite().all()):
            raise ExportError("the quantised network's outputs are not finite on the calibration data")
        worst = max(worst, float((moved - expected).norm() / (expected.norm() or 1.0)))
    return worst


def _agreement(before: Outputs, after: Outputs) -> float | None:
    old, new = (torch.cat([outputs[0] for outputs in batches]) for batches in (before, after))
    return float((old.argmax(1) == new.argmax(1)).double().mean()) if old.dim() == 2 else None
