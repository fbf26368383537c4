"""Write a network into a model repository of NVIDIA's Triton Inference Server, to be served by its onnxruntime.

repository/
  resnet50/
    config.pbtxt     names, types and sizes as in the newest file; batching; where it runs
    1/model.onnx
    2/model.onnx     the newest version, which is the one that is served
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import TensorProto
from torch import Tensor, nn

from rmfx.deploy.export import export
from rmfx.errors import ExportError
from rmfx.files.atomic import replacing

_CONFIG, _FILE = "config.pbtxt", "model.onnx"
_TYPES: dict[int, str] = {  # what Triton's onnxruntime backend takes; bfloat16 is not among them
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT16: "TYPE_INT16",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.UINT64: "TYPE_UINT64",
    TensorProto.UINT32: "TYPE_UINT32",
    TensorProto.UINT16: "TYPE_UINT16",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.BOOL: "TYPE_BOOL",
}


@dataclass(frozen=True)
class Serving:
    """How Triton runs a network.

    Attributes:
        on: "gpu" or "cpu"; Triton refuses to load a network where that is missing.
        instances: copies that run at the same time, on each GPU or in all.
        max_batch_size: the most samples that Triton puts into one batch. It is 0 in the configuration, and nothing is
            batched, where not every input and output has a free batch.
        preferred_batch_sizes: batches that are not waited beyond; empty for as many as there are, which is best where
            no size is faster than others.
        max_queue_delay_us: how long a request may wait for others to be batched with, in microseconds.
        tf32: let CUDA multiply float32 in TF32, which rounds to 10 bits of mantissa.
    """

    on: Literal["gpu", "cpu"] = "gpu"
    instances: int = 1
    max_batch_size: int = 32
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = 100
    tf32: bool = False

    def __post_init__(self) -> None:
        """Refuse what Triton would refuse only when it loads the network."""
        if self.on not in ("gpu", "cpu"):
            raise ExportError(f"cannot serve on {self.on!r}: choose gpu or cpu")
        if self.instances < 1 or self.max_batch_size < 0 or self.max_queue_delay_us < 0:
            raise ExportError(f"instances must be 1 or more, max_batch_size and max_queue_delay_us 0 or more: {self}")
        if wrong := [size for size in self.preferred_batch_sizes if not 1 <= size <= self.max_batch_size]:
            raise ExportError(
                f"preferred batch size {wrong[0]} is not between 1 and max_batch_size={self.max_batch_size}"
            )


def export_triton(
    converted: nn.Module,
    repository: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Tensor],
    *,
    name: str,
    serving: Serving | None = None,
    **options: Any,
) -> Path:
    """Add ``converted`` to a model repository, as a new version of the model ``name``.

    The ONNX file is written, run and compared by :func:`rmfx.export`. Then its version folder appears, whole, under the
    next free number, and ``config.pbtxt`` is replaced. It describes the newest version, which is the one served;
    changes made in it by hand are lost. When anything fails, the repository is as it was.

    Args:
        converted, example_inputs: as in :func:`rmfx.export`.
        repository: the folder that Triton is given with ``--model-repository``; made if need be.
        name: of the model, under which clients ask for it.
        serving: batching, and where it runs; ``None`` for the defaults of :class:`Serving`.
        **options: of :func:`rmfx.export`: ``precision="fp16"``, ``device="cuda"``, ``dynamic_batch=False``, ...

    Returns:
        the ONNX file of the new version.

    Raises:
        ExportError, UnsupportedModelError, RuntimeUnavailableError: as :func:`rmfx.export`; also for a name that is
            no name of a folder, and inputs or outputs of a type that Triton does not hand to onnxruntime.

    >>> folder = tempfile.mkdtemp()
    >>> net = nn.Sequential(nn.Linear(4, 2), nn.ReLU()).eval()
    >>> import torch
    >>> export_triton(net, folder, torch.zeros(1, 4), name="small").relative_to(folder).as_posix()
    'small/1/model.onnx'
    """
    if not name or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
        raise ExportError(f"{name!r} cannot name a model: it is the name of a folder, and must not begin with a dot")
    serving = Serving() if serving is None else serving
    with _model_folder(Path(repository), name) as model, _scratch_folder(model) as scratch:
        file = export(converted, scratch / _FILE, example_inputs, **options)
        return _publish(scratch, model, _config(name, file, serving)) / _FILE


@contextmanager
def _model_folder(repository: Path, name: str) -> Iterator[Path]:
    """The folder of a model; what had to be made for it is gone when the block fails."""
    model = repository / name
    made = [folder for folder in (model, *model.parents) if not folder.exists()]
    try:
        model.mkdir(parents=True, exist_ok=True)
        yield model
    except OSError as problem:
        raise ExportError(f"cannot write to {model}: {problem.strerror or problem}") from problem
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def _scratch_folder(model: Path) -> Iterator[Path]:
    """A folder that Triton takes for no version, as readable as ``model``; gone at the end where it was not moved."""
    scratch = Path(tempfile.mkdtemp(prefix=".new.", dir=model))
    try:
        scratch.chmod(stat.S_IMODE(model.stat().st_mode))
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, model: Path, config: str) -> Path:
    """Make ``scratch`` the next version of ``model``, and replace its configuration; both or none."""
    version = model / str(1 + max(_versions(model), default=0))
    with ExitStack() as undo:
        with replacing(model / _CONFIG, ExportError) as file:
            file.write_text(config, encoding="utf-8")
            undo.callback(shutil.rmtree, version, ignore_errors=True)
            scratch.rename(version)
        undo.pop_all()
    return version


def _versions(model: Path) -> list[int]:
    """Triton ignores folders whose names are no numbers or begin with a zero."""
    names = [entry.name for entry in model.iterdir()] if model.is_dir() else []
    return [int(name) for name in names if name.isascii() and name.isdigit() and not name.startswith("0")]


def _config(name: str, file: Path, serving: Serving) -> str:
    graph = onnx.load(str(file), load_external_data=False).graph
    inputs, outputs = list(graph.input), list(graph.output)  # torch.onnx lists no weights among the inputs
    batched = serving.max_batch_size > 0 and _free_batch([*inputs, *outputs])
    lines = [
        f"name: {_quoted(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {serving.max_batch_size if batched else 0}",
        *(line for entry in inputs for line in _tensor("input", entry, batched)),
        *(line for entry in outputs for line in _tensor("output", entry, batched)),
        f"instance_group [ {{ kind: KIND_{serving.on.upper()} count: {serving.instances} }} ]",
        "version_policy { latest { num_versions: 1 } }",
    ]
    if batched:
        preferred = [f"preferred_batch_size: {size}" for size in serving.preferred_batch_sizes]
        delay = f"max_queue_delay_microseconds: {serving.max_queue_delay_us}"
        lines.append(f"dynamic_batching {{ {' '.join([*preferred, delay])} }}")
    if serving.on == "gpu":
        option = f'parameters {{ key: "use_tf32" value: "{int(serving.tf32)}" }}'
        accelerator = f'gpu_execution_accelerator [ {{ name: "cuda" {option} }} ]'
        lines += ["optimization {", f"  execution_accelerators {{ {accelerator} }}", "}"]
    return "\n".join(lines) + "\n"


def _free_batch(entries: list[onnx.ValueInfoProto]) -> bool:
    """Whether the first size of all of them is one and the same free one, as Triton demands of what it batches."""
    first = {entry.type.tensor_type.shape.dim[0].dim_param if _sizes(entry) else "" for entry in entries}
    return len(first) == 1 and first != {""}


def _tensor(kind: str, entry: onnx.ValueInfoProto, batched: bool) -> list[str]:
    data_type = _TYPES.get(entry.type.tensor_type.elem_type)
    if data_type is None:
        written = TensorProto.DataType.Name(entry.type.tensor_type.elem_type)
        raise ExportError(
            f"Triton's onnxruntime has no {written} for the {kind} {entry.name!r}: "
            "give example inputs of another type; with precision=, leave io='same'"
        )
    sizes = _sizes(entry)[1:] if batched else _sizes(entry)
    shape = f"dims: [ {', '.join(map(str, sizes))} ]" if sizes else "dims: [ 1 ] reshape { shape: [ ] }"
    return [f"{kind} [ {{ name: {_quoted(entry.name)} data_type: {data_type} {shape} }} ]"]


def _sizes(entry: onnx.ValueInfoProto) -> list[int]:
    """All sizes, -1 where one is free."""
    return [size.dim_value if size.HasField("dim_value") else -1 for size in entry.type.tensor_type.shape.dim]


def _quoted(text: str) -> str:
    """``text`` as a string of protobuf's text format.

    >>> print(_quoted('a"b'))
    "a\\042b"
    """
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character.isprintable() and character not in '"\\':
        return character
    return "".join(f"\\{byte:03o}" for byte in character.encode())
