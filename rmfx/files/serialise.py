"""Save a converted network and load it again: graph as JSON, weights as safetensors, nothing pickled, nothing run.

The file (:mod:`rmfx.files.archive`) holds a JSON document of two parts. ``graph``: the nodes
(:mod:`rmfx.files.graph_json`), the module tree and the table of tensors (:mod:`rmfx.files.module_json`), the class
name and mode. ``report``: the Report.
Loading builds only classes and functions from closed lists, on the meta device, and then puts the saved tensors in.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from rmfx.errors import FileFormatError
from rmfx.files import archive
from rmfx.files.graph_json import decode_graph, encode_graph
from rmfx.files.layer_json import is_layer
from rmfx.files.module_json import attach, encode_modules, encode_tensors
from rmfx.files.values import fields
from rmfx.report import Report, attached
from rmfx.report import attach as attach_report

_FIELDS = {
    "class_name": str,
    "training": bool,
    "graph": dict,
    "modules": list,
    "tensors": list,
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def save(converted: fx.GraphModule, path: str | os.PathLike[str]) -> Path:
    """Write ``converted`` to one ``.rmfx`` file, atomically: a crash or a full disk leaves an old file whole.

    Kept bit by bit: parameters and buffers with dtype, memory format (channels-last) and ``requires_grad``, which
    tensors are shared, train or eval mode of every module, node names, and the Report. Not kept: devices of weights
    (:func:`load` gives CPU tensors), hooks (refused), type annotations and other metadata of nodes, and the classes of
    containers, which become plain ``nn.Module``.

    Args:
        converted: what ``rmfx.convert`` returned, or any ``torch.fx.GraphModule`` in normal form.
        path: where to write; the suffix ``.rmfx`` is usual.

    Returns:
        ``path``.

    Raises:
        FileFormatError: when the network holds a layer or calls a function outside the file format, naming it, or
            when ``path`` cannot be written.
    """
    if not isinstance(converted, fx.GraphModule):
        raise FileFormatError(f"cannot be saved: {type(converted).__name__} is no torch.fx.GraphModule; convert first")
    if any(getattr(converted, hooks) for hooks in _HOOKS):
        raise FileFormatError("cannot be saved: the network has hooks, which are code; remove them first")
    called = {str(node.target) for node in converted.graph.nodes if node.op == "call_module"}
    table, tensors = encode_tensors(converted)
    graph = {
        "class_name": type(converted).__name__,
        "training": converted.training,
        "graph": encode_graph(converted.graph),
        "modules": encode_modules(converted, called),
        "tensors": table,
    }
    report = attached(converted)
    content = {"graph": graph, "report": None if report is None else report.to_dict()}
    _demand_loadable(content, tensors)
    return archive.write(path, content, tensors)


def load(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Read a file of :func:`save`; all tensors are on the CPU.

    Raises:
        FileFormatError: when the file is missing, damaged, hostile, or of another version. Nothing in the file is
            ever executed: it can only name layers and functions from closed lists.
    """
    content, tensors = archive.read(path)
    try:
        return _assemble(content, tensors)
    except FileFormatError as problem:
        raise FileFormatError(f"cannot load {path}: {problem}") from problem


def _demand_loadable(content: Any, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to write what could not be read: build it once, on the meta device."""
    try:
        _assemble(content, {name: tensor.to("meta") for name, tensor in tensors.items()})
    except FileFormatError as problem:
        raise FileFormatError(f"cannot be saved: {problem}") from problem


def _assemble(content: Any, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    network, report = fields(content, "document", {"graph": dict, "report": object})
    class_name, training, graph, modules, table = fields(network, "network", _FIELDS)
    if not class_name.isidentifier():
        raise FileFormatError(f"not the name of a class: {class_name!r}")
    # A GraphModule around an empty graph first: names in the file that collide with its own attributes are found.
    converted = fx.GraphModule(nn.Module(), fx.Graph(), class_name)
    attach(converted, modules, table, tensors)
    layers = {name for name, module in converted.named_modules(remove_duplicate=False) if is_layer(module)}
    decoded = decode_graph(graph, layers, {entry["name"] for entry in table})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of the generated source; what is wrong in it raises
            converted.graph = decoded
        converted.graph.lint()
    except Exception as problem:  # the generated source does not compile, in one of many ways
        raise FileFormatError(f"its graph makes no valid code: {problem}") from problem
    converted.training = training
    if report is not None:
        attach_report(converted, _report(report, layers))
    return converted


def _report(data: Any, layers: set[str]) -> Report:
    try:
        report = Report.from_dict(data)
        str(report)  # reads every field as what it should be
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as problem:
        raise FileFormatError(f"its report is malformed ({problem!r})") from problem
    for name, channels in report.carried_norms.items():
        if name not in layers or not all(type(channel) is int for channel in channels):
            raise FileFormatError(f"its list of carried channels of {name!r} is malformed")
    return report
