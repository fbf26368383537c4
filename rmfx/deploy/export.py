"""Write a network as ONNX, and publish the file only after it was run and compared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from rmfx.deploy import runtime
from rmfx.deploy.onnx_check import check_file, outputs_of
from rmfx.deploy.precision import BF16_OPSET, Form, Precision, Rounded, cast, cast_borders, form_of, in_float32
from rmfx.deploy.signature import Signature, read_signature
from rmfx.errors import ExportError, UnsupportedModelError
from rmfx.files.atomic import replacing
from rmfx.onnx_in.importer import from_onnx
from rmfx.quiet import quiet

SELF_CONTAINED_LIMIT = 2**31 - 2**26  # a protobuf ends at 2 GiB; 64 MiB are left for the graph itself
BATCH = "batch"  # the name of the dynamic axis
_DIFFERS_IN_TRAINING = (_NormBase, _DropoutNd, nn.RReLU)
_STACK_TRACE = "pkg.torch.onnx.stack_trace"


def export(
    converted: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Tensor],
    *,
    device: str = "cpu",
    dynamic_batch: bool = True,
    opset: int | None = None,
    check: bool = True,
    like: str | os.PathLike[str] | None = None,
    precision: Precision | None = None,
    io: Literal["same", "half"] = "same",
) -> Path:
    """Write ``converted`` to an ONNX file that onnxruntime was seen to compute rightly.

    The file is made beside ``path`` under another name, checked by ``onnx.checker``, run by onnxruntime with its graph
    optimiser off and on, at batch 1 and 3, on inputs of both signs far beyond 6, and compared with torch and a float64
    truth (:mod:`rmfx.deploy.onnx_check`). Only then does it replace what is at ``path``.

    Args:
        converted: any module in eval mode, usually the result of ``rmfx.convert``; not changed.
        path: the file to write; its folder must exist.
        example_inputs: a tensor or a sequence of positional tensors, on the device of ``converted``.
        device: where onnxruntime runs the check: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        dynamic_batch: leave axis 0 free in every input that has there the same size as the first input.
        opset: ONNX opset version; ``None`` for the default of torch.
        check: run and compare the file. Without it, the file is only validated.
        like: the ONNX file that ``converted`` came from (:func:`rmfx.from_onnx`). Names of inputs and outputs are taken
            over, axis 0 is free where it is free there, and the new file is compared with that one, too.
        precision: of weights and arithmetic: ``"fp16"``, ``"bf16"`` or ``"fp32"``; ``None`` for that of ``converted``.
            The file is compared with torch in that precision, and :func:`rmfx.deploy.precision.gap` tells how far it is
            from ``converted``. onnxruntime has no bfloat16 on the CPU: with ``device="cpu"`` such a file's graph and
            weights are compared with every bfloat16 made float32.
        io: ``"same"``: inputs and outputs keep their type, by casts in the file. ``"half"``: they are in ``precision``.

    Returns:
        ``path``: one self-contained file; beyond 2 GB the weights lie beside it in ``<name>.data``.

    Raises:
        UnsupportedModelError: when ``converted`` is in training mode or no module.
        ExportError: when the path cannot be written, the network cannot be exported, a weight or a value that the
            example inputs lead to is too large for ``precision``, or the file is invalid or computes something else. No
            file is left behind, and an old one stays.
        RuntimeUnavailableError: when ``device`` is not active in the installed onnxruntime.
    """
    _demand_eval(converted)
    inputs = _as_tuple(example_inputs)
    _demand_known(precision, io)
    if precision is None and {p.dtype for p in converted.parameters() if p.is_floating_point()} == {torch.bfloat16}:
        precision, io = "bf16", "half"  # of which onnxruntime has neither the default opset nor, on the CPU, arithmetic
    if check:
        runtime.require(device)
    model = None if like is None else read_signature(like)
    batched = [dynamic_batch and value.dim() > 0 and value.shape[0] == inputs[0].shape[0] for value in inputs]
    if model is not None:
        _demand_fits(model, inputs)
        batched = [free and dynamic_batch for free in model.batched]
    with replacing(path, ExportError) as scratch:
        _demand_runs(converted, inputs)
        form = form_of(converted, inputs, precision, io)
        opset = BF16_OPSET if opset is None and form.dtype is torch.bfloat16 else opset
        with quiet():
            _write(form, scratch, batched, opset, model)
        _validate(scratch, batched, opset)
        if check:
            _check(scratch, form, batched, device)
        if check and like is not None:
            _compare_with(like, scratch, form, batched, device)
    return Path(path)


def _check(path: Path, form: Form, batched: Sequence[bool], device: str) -> None:
    """Compare with torch in the same precision."""
    if form.dtype is not torch.bfloat16 or device != "cpu":
        check_file(path, form.expected, form.inputs, batched, device, arithmetic=form.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        runnable = Path(folder) / path.name
        in_float32(path, runnable)
        inputs = [cast(value, torch.float32) for value in form.inputs]
        check_file(runnable, Rounded(form.written, form.dtype), inputs, batched, device, arithmetic=form.dtype)


def _compare_with(like: str | os.PathLike[str], path: Path, form: Form, batched: Sequence[bool], device: str) -> None:
    """Compare with the file that the network came from, in the precision of that."""
    if form.dtype is None:
        check_file(path, from_onnx(like, check=False), form.inputs, batched, device, Path(like))
        return
    with tempfile.TemporaryDirectory() as folder:
        export(form.original, Path(folder) / path.name, form.inputs, device=device, like=like)


def _demand_known(precision: str | None, io: str) -> None:
    if precision not in (None, *get_args(Precision)):
        raise ExportError(f"unknown precision {precision!r}: choose one of {', '.join(get_args(Precision))}, or None")
    if io not in ("same", "half") or (io == "half" and precision is None):
        raise ExportError(f"io={io!r} with precision={precision!r}: choose 'same', or 'half' with a precision")


def _demand_eval(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"export takes an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if module.training and (module is model or isinstance(module, _DIFFERS_IN_TRAINING)):
            where = f"its {name!r} ({type(module).__name__})" if name else "the network"
            raise UnsupportedModelError(f"{where} is in training mode: call .eval() before exporting")


def _as_tuple(example_inputs: object) -> tuple[Tensor, ...]:
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(inputs, (tuple, list)) or not inputs or not all(isinstance(value, Tensor) for value in inputs):
        raise ExportError(
            f"example_inputs must be a tensor or a sequence of tensors, got {type(example_inputs).__name__}"
        )
    if inputs[0].dim() == 0:
        raise ExportError("the first example input has no dimensions, so there is no batch axis; give a batched tensor")
    return tuple(value.detach().clone() for value in inputs)  # torch.onnx takes one tensor given twice for one input


def _demand_runs(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    try:
        outputs_of(model, inputs)
    except Exception as problem:  # the user's network may raise anything
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
        raise ExportError(f"the network does not run on the example inputs of shape {shapes}: {problem}") from problem


def _demand_fits(like: Signature, inputs: tuple[Tensor, ...]) -> None:
    if len(like.inputs) != len(inputs):
        raise ExportError(f"{like.file} has {len(like.inputs)} inputs, and {len(inputs)} example inputs were given")


def _write(
    form: Form,
    path: Path,
    batched: Sequence[bool],
    opset: int | None,
    like: Signature | None,
) -> None:
    shapes = tuple({0: BATCH} if moving else None for moving in batched) if any(batched) else None
    try:
        program = torch.onnx.export(
            form.written,
            form.inside,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=shapes,
            optimize=not _folds_wrongly(form),
        )
        assert program is not None  # it is None only for the exporter before dynamo
        if form.outer is not None and form.dtype is not None:
            cast_borders(program.model.graph, form.dtype, form.outer)
        if like is not None:
            _rename(program.model.graph, like)
        for node in program.model.graph:
            node.metadata_props.pop(_STACK_TRACE, None)  # paths on the machine of whoever exported
        program.save(path, external_data=_size(form.written) > SELF_CONTAINED_LIMIT)
    except OSError:
        raise  # a full disk is told by the caller
    except Exception as problem:  # torch.onnx wraps what its stages raise in many classes
        advice = "; dynamic_batch=False fixes the batch size of the example inputs" if any(batched) else ""
        raise ExportError(f"torch.onnx cannot export this network: {_root(problem)}{advice}") from problem


def _folds_wrongly(form: Form) -> bool:
    """The exporter folds a norm in bfloat16 into a filter of float32, which no conv in bfloat16 takes."""
    return form.dtype is torch.bfloat16 and any(isinstance(module, _NormBase) for module in form.written.modules())


def _rename(graph: ir.Graph, like: Signature) -> None:
    """Give inputs and outputs the names of ``like``, and other values that have one of those another."""
    wanted = [entry.name for entry in like.inputs], list(like.outputs)
    if len(wanted[1]) != len(graph.outputs) or len({*wanted[0], *wanted[1]}) != len(wanted[0]) + len(wanted[1]):
        raise ExportError(f"the outputs of the network are not those of {like.file}: {', '.join(like.outputs)}")
    ends = {id(value) for value in (*graph.inputs, *graph.outputs)}
    taken = {*wanted[0], *wanted[1]}
    for value in (*graph.initializers.values(), *(output for node in graph for output in node.outputs)):
        if value.name in taken and id(value) not in ends:
            value.name = f"{value.name}_inner"
    for value, name in zip((*graph.inputs, *graph.outputs), (*wanted[0], *wanted[1]), strict=True):
        value.name = name


def _root(problem: BaseException) -> str:
    """The message of the innermost cause: what went wrong, without the exporter's advice on its stages."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return " ".join(str(problem).split())[:600] or type(problem).__name__


def _size(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _validate(path: Path, batched: Sequence[bool], opset: int | None) -> None:
    """Raise unless the file is valid ONNX of the wanted opset, with the wanted free axes."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as problem:
        raise ExportError(f"torch.onnx wrote an invalid file: {problem}") from problem
    model = onnx.load(str(path), load_external_data=False)
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if opset is not None and versions != [opset]:
        raise ExportError(f"torch.onnx wrote opset {versions} instead of {opset}: it cannot express this network there")
    for entry, moving in zip(model.graph.input, batched, strict=True):
        if moving and not entry.type.tensor_type.shape.dim[0].dim_param:
            raise ExportError(
                f"the batch size of input {entry.name!r} was fixed while exporting: the network depends on it. "
                "dynamic_batch=False accepts that"
            )
