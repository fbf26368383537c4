"""The front door: an ``nn.Module`` in, its graph over a private copy out. The caller's model is never touched."""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from rmfx.copying import deep_copy
from rmfx.errors import RmfxError, TraceError, UnsupportedModelError
from rmfx.front.admit import check_admissible
from rmfx.front.aten import has_aten
from rmfx.front.exported import respell
from rmfx.front.live import from_dynamo
from rmfx.front.program import open_module, where
from rmfx.front.settle import settle
from rmfx.front.tracer import Tracer, is_leaf, is_user_file
from rmfx.inputs import input_names

_WHAT_TO_DO = (
    "Follow one path for every input: decide with Python values known before the call, write tensors out of place, "
    "and put what must stay opaque into a function marked with torch.fx.wrap."
)


def trace(
    model: nn.Module, *, absent: Collection[str] = (), allow_training: bool = False, allow_meta: bool = False
) -> fx.GraphModule:
    """The graph of ``model`` in eval mode, over a copy that shares every parameter and buffer that nothing changes.

    Args:
        model: any module; a ``GraphModule`` is traced again, its names, places and lines are kept.
        absent: inputs that are ``None``; the graph has no such inputs.
        allow_training: trace a model in training mode as if it were in eval mode, instead of refusing it.
        allow_meta: trace a model on the meta device, of which no weights can be computed.

    Raises:
        UnsupportedModelError: when the model as a whole cannot be converted.
        TraceError: when its code cannot be followed; names the file and line.

    >>> [node.op for node in trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()).graph.nodes]
    ['placeholder', 'call_module', 'call_module', 'output']
    """
    check_admissible(model, allow_training, allow_meta)
    copied = structural_copy(model)
    for module in copied.modules():
        module.training = False
    settle(copied)
    if isinstance(copied, fx.GraphModule) and (has_aten(copied.graph) or from_dynamo(copied)):
        return respell(open_module(copied))
    if is_leaf(copied):  # tracing steps into its root: hold a lone layer in a box to keep it whole
        copied = nn.Sequential(OrderedDict({type(copied).__name__.lower(): copied})).eval()
    graph = _graph_of(copied, absent)
    if isinstance(model, fx.GraphModule):
        graph = _as_named_before(model.graph, graph)
    graph._tracer_cls = None  # an unpickled result is rebuilt by torch's own tracer
    return fx.GraphModule(copied, graph, type(model).__name__)


def structural_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the modules of ``model`` that shares their parameters and buffers.

    Raises:
        UnsupportedModelError: when something that the model holds cannot be copied.
    """
    try:
        return deep_copy(model, chain(model.parameters(), model.buffers()))
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise UnsupportedModelError(
            f"the model cannot be copied ({error}): copy.deepcopy(model) must work, so that yours stays as it is"
        ) from error


def _graph_of(model: nn.Module, absent: Collection[str]) -> fx.Graph:
    held = list(_held_tensors(model))
    try:
        graph = Tracer().trace(model, dict.fromkeys(name for name in absent if name in input_names(model)) or None)
        _drop_absent(graph)
    except RmfxError:
        raise
    except Exception as error:
        message = str(error).split("\n")[0] or type(error).__name__
        raise TraceError(f"{_culprit(error, model)}: {message}. {_WHAT_TO_DO}") from error
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for tensor in held:
        if tensor.changed() and not (isinstance(tensor.current, fx.Proxy) and tensor.path not in read):
            raise TraceError(
                f"forward of {type(model).__name__} changes {tensor.path}, so the model computes something else on "
                f"every call. {_WHAT_TO_DO}"
            )
    return graph


def _drop_absent(graph: fx.Graph) -> None:
    """Drop the inputs that torch.fx keeps for arguments that are ``None``, to demand that they are."""
    for node in list(graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_assert_is_none":
            source = node.all_input_nodes[0]
            graph.erase_node(node)
            graph.erase_node(source)


@dataclass(frozen=True)
class _Held:
    """A tensor that a module holds, as it was before tracing."""

    module: nn.Module
    name: str
    path: str
    value: Tensor
    version: int

    @property
    def current(self) -> object:
        return getattr(self.module, self.name, None)

    def changed(self) -> bool:
        return self.current is not self.value or _version(self.value) != self.version


def _held_tensors(model: nn.Module) -> Iterator[_Held]:
    for prefix, module in model.named_modules():
        for table in (vars(module), module._parameters, module._buffers):
            for name, value in table.items():
                if isinstance(value, Tensor):
                    yield _Held(module, name, f"{prefix}.{name}" if prefix else name, value, _version(value))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _culprit(error: Exception, model: nn.Module) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_user_file(frame.filename)]
    if not frames:
        return f"the code of {type(model).__name__} cannot be followed"
    last = frames[-1]
    return f"{last.filename}:{last.lineno} cannot be followed (`{last.line}`)"


def _as_named_before(old: fx.Graph, new: fx.Graph) -> fx.Graph:
    """A graph that was traced again, with the names, places and lines it had: the n-th call is the n-th call."""
    calls: dict[tuple[str, object], list[fx.Node]] = {}
    for node in reversed(old.nodes):
        calls.setdefault((node.op, node.target), []).append(node)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in new.nodes:
        same = calls.get((node.op, node.target))
        before = same.pop() if same else node
        args, kwargs = map_arg((node.args, dict(node.kwargs)), copies.__getitem__)
        copies[node] = graph.create_node(node.op, node.target, args, kwargs, before.name)
        copies[node].meta = {"place": _old_place(before), "line": before.meta.get("line")}
    return graph


def _old_place(node: fx.Node) -> str:
    if "place" in node.meta:
        return node.meta["place"]
    if node.op == "call_module":
        return str(node.target).rpartition(".")[0]
    return where(node)[0]
