"""The second door: models whose Python code symbolic tracing cannot follow, through ``torch.export``.

``torch.export`` runs the code once, on tensors without values, and records the operators it calls. So code may read
sizes and decide by them, and the result holds for these sizes; the batch stays free where the code allows it. What
writes into views of tensors is recorded once more without writing.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_config
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from rmfx.errors import NormalFormError, TraceError
from rmfx.front.aliasing import resolve_in_place
from rmfx.front.aten import spell_aten
from rmfx.front.program import open_program
from rmfx.front.reroll import reroll
from rmfx.front.tracer import is_user_file
from rmfx.quiet import quiet


@dataclass(frozen=True)
class Exported:
    """A graph that came through ``torch.export``.

    Attributes:
        gm: the graph.
        fixed_batch: whether it holds for one batch size only.
        functional: whether torch rewrote views that are written into, which may have put sizes into the graph.
    """

    gm: fx.GraphModule
    functional: bool
    fixed_batch: bool

    def same_as(self, other: Exported) -> bool:
        """Whether two graphs do the same with the same numbers."""
        return _calls(self.gm.graph) == _calls(other.gm.graph)


def export(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], free_batch: bool = True) -> Exported:
    """The graph of ``model`` for inputs of these shapes, over a tree that shares its weights.

    Args:
        model: a structural copy in eval mode, settled: exporting may change it.
        args, kwargs: example inputs; values do not matter.
        free_batch: try to leave the batch free.

    Raises:
        TraceError: when an input is no tensor, or ``torch.export`` cannot follow the code either.
    """
    where = _device(model)
    args, kwargs = pytree.tree_map(lambda x: _placed(x, where), (tuple(args), dict(kwargs)))
    for value in pytree.tree_leaves((args, kwargs)):
        if not isinstance(value, Tensor):
            raise TraceError(f"torch.export would make the input {value!r} a constant: give tensors only")
    program = _with_free_batch(model, args, kwargs) if free_batch else None
    fixed = program is None
    return Exported(*_graph(program or _export(model, args, kwargs, None)), fixed)


def program_graph(program: ExportedProgram) -> fx.GraphModule:
    """The graph of a program in the functions of torch, nothing in place, layers under the names they had.

    Raises:
        TraceError: when the program takes what is no tensor, or changes its weights.
    """
    return _graph(program)[0]


def _graph(program: ExportedProgram) -> tuple[fx.GraphModule, bool]:
    """The graph, and whether views that are written into had to be rewritten."""
    gm = open_program(program)
    try:
        return respell(gm), False
    except NormalFormError:  # writes into views of tensors
        with quiet():
            functional = program.run_decompositions({})
        return respell(open_program(functional)), True


def _calls(graph: fx.Graph) -> list[Any]:
    """What each node does, with which numbers, on which other nodes."""
    index = {node: f"node {position}" for position, node in enumerate(graph.nodes)}
    named = ((node.target if node.op != "placeholder" else "", node.args, dict(node.kwargs)) for node in graph.nodes)
    return [(target, repr(map_arg((args, kwargs), lambda node: index[node]))) for target, args, kwargs in named]


def respell(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` without operators of ATen and without anything in place; its tensors are shared.

    Raises:
        NormalFormError: when a write into a view cannot be given an out-of-place meaning.
    """
    spelled = fx.GraphModule(gm, spell_aten(gm.graph), type(gm).__name__)
    resolve_in_place(spelled)
    reroll(spelled)
    for node in spelled.graph.nodes:
        node.meta.pop("val", None)
        node.meta.pop("leaf", None)
    spelled.recompile()
    return spelled


def _device(model: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)


def _placed(value: Any, device: torch.device | None) -> Any:
    """An input where the model is: one on the meta device has no use for values."""
    on_meta = device is not None and device.type == "meta"
    return value.detach().to("meta") if isinstance(value, Tensor) and on_meta else value


# -- the batch --------------------------------------------------------------------------------------------------------


def _with_free_batch(model: nn.Module, args: Any, kwargs: Any) -> ExportedProgram | None:
    """The program for any batch, or ``None`` where the code does not allow it."""
    batches = {x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if x.dim() > 1}
    if len(batches) != 1:
        return None
    batch = max(2, batches.pop())  # torch.export takes a size of 1 for one that broadcasts
    args, kwargs = pytree.tree_map(lambda x: _of_batch(x, batch), (args, kwargs))
    try:
        program = _export(model, args, kwargs, _shapes(model, args, kwargs))
    except TraceError:
        return None
    return program if _is_free(program) else None


def _of_batch(x: Tensor, batch: int) -> Tensor:
    if x.dim() < 2 or x.shape[0] == batch:
        return x
    return torch.zeros((batch, *x.shape[1:]), dtype=x.dtype, device=x.device)


def _shapes(model: nn.Module, args: Any, kwargs: Any) -> Any:
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return pytree.tree_map(lambda x: {0: Dim.AUTO} if x.dim() > 1 else None, dict(bound))


def _is_free(program: ExportedProgram) -> bool:
    """Whether the program is the same for every batch: no size of one is fixed, and all that the code asked of it, such
    as whether it is even, has the same answer for all."""
    user = set(program.graph_signature.user_inputs)
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in user]
    for size in (x.shape[0] for x in inputs if x.dim() > 1):
        if isinstance(size, int) or size.node.maybe_as_int() is not None:
            return False
        for guard in size.node.shape_env.guards:
            symbols = list(guard.expr.free_symbols)
            if len(symbols) != 1 or any(guard.expr.subs(symbols[0], batch) != True for batch in _BATCHES):  # noqa: E712
                return False
    return True


# Not 1: torch asks for that where it lays out memory. doors.py sees to code that does.
_BATCHES = (*range(2, 130), 1000, 1024, 10007)


@contextlib.contextmanager
def _as_when_it_runs() -> Iterator[None]:
    """Tell the model's code that it is not exported: what it computes when it runs is wanted, not what it exports."""
    asked = torch.compiler.is_exporting

    def is_exporting() -> bool:
        return asked() and not is_user_file(sys._getframe(1).f_code.co_filename)

    torch.compiler.is_exporting = is_exporting
    try:
        yield
    finally:
        torch.compiler.is_exporting = asked


def _export(model: nn.Module, args: Any, kwargs: Any, shapes: Any) -> ExportedProgram:
    try:
        # Without this, torch.export takes every batch for larger than 1.
        with (
            quiet(),
            contextlib.redirect_stderr(io.StringIO()),  # where a graph that cannot be exported is printed
            symbolic_config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
            _as_when_it_runs(),
        ):
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever the model's own code raises on such inputs
        message = str(error).strip().split("\n")[0] or type(error).__name__
        raise TraceError(f"torch.export: {message}") from error
