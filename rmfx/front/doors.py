"""Which way a model comes in: symbolic tracing where it can follow the code, else ``torch.export``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from rmfx.errors import TraceError
from rmfx.front.admit import check_admissible
from rmfx.front.exported import Exported, export, program_graph
from rmfx.front.live import from_dynamo, hold_weights
from rmfx.front.program import open_program
from rmfx.front.settle import settle
from rmfx.front.sizes import depends_on_sizes, of_other_size, treats_one_apart
from rmfx.front.trace import structural_copy, trace
from rmfx.inputs import input_names, optional_inputs


@dataclass(frozen=True)
class Entered:
    """A model's graph, not yet in normal form.

    Attributes:
        gm: the graph, over tensors that it shares with the model.
        sizes: why it holds for the example inputs' sizes only, or ``None`` where it holds for all.
        batch: whether that goes for the size of the batch, too.
        symbolic: whether it came by symbolic tracing.
    """

    gm: fx.GraphModule
    sizes: str | None = None
    batch: bool = False
    symbolic: bool = False


def enter(
    model: nn.Module,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any],
    *,
    symbolic: bool = True,
    allow_training: bool = False,
    allow_meta: bool = False,
) -> Entered:
    """The graph of ``model``, by whichever door it fits through.

    Args:
        model: any module; it is left untouched.
        args, kwargs: example inputs, without which ``torch.export`` cannot be asked; ``None`` where there are none.
        symbolic: try symbolic tracing.
        allow_training, allow_meta: as for :func:`rmfx.front.trace.trace`.

    Raises:
        UnsupportedModelError: when the model as a whole cannot be converted.
        TraceError: when its code cannot be followed by any door; names the file and line.

    >>> class Odd(nn.Module):
    ...     def forward(self, x):
    ...         return x.relu() if x.shape[-1] % 2 else x
    >>> import torch
    >>> enter(Odd().eval(), (torch.zeros(1, 3, 5, 5),), {}).sizes
    'the code of the model computes with sizes, or decides by them'
    """
    refused: TraceError | None = None
    if symbolic:
        try:
            return Entered(_symbolic(model, args, kwargs, allow_training, allow_meta), symbolic=True)
        except TraceError as error:
            if args is None or isinstance(model, fx.GraphModule):
                raise
            refused = error
    assert args is not None
    check_admissible(model, allow_training, allow_meta)
    try:
        free = not treats_one_apart(_private(model), args, kwargs)
        exported = export(_private(model), args, kwargs, free)
    except TraceError as error:
        raise TraceError(f"{refused}; {error}" if refused else str(error)) from (refused or error)
    if exported.fixed_batch:
        return Entered(exported.gm, "torch.export could follow the code for these inputs' sizes only", True)
    depends = depends_on_sizes(_private(model), args, kwargs)
    if exported.functional and not depends:
        depends = not _same_at_other_sizes(model, exported, args, kwargs)
    reason = "the code of the model computes with sizes, or decides by them"
    return Entered(exported.gm, reason if depends else None)


def _symbolic(
    model: nn.Module, args: Sequence[Any] | None, kwargs: Mapping[str, Any], training: bool, meta: bool
) -> fx.GraphModule:
    """The graph by symbolic tracing, without the optional inputs that are not given.

    Code that decides by ``mask is None`` would take a stand-in for a mask that is given. Where no inputs are given at
    all, and the code does not run without an optional one, it is one that is always there.
    """
    absent = [name for name in optional_inputs(model) if name not in kwargs]
    absent = [name for name in absent if name not in input_names(model)[: len(args or ())]]
    try:
        return trace(model, absent=absent, allow_training=training, allow_meta=meta)
    except TraceError:
        if args is not None or not absent:
            raise
        return trace(model, allow_training=training, allow_meta=meta)


def _same_at_other_sizes(model: nn.Module, exported: Exported, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    try:
        return exported.same_as(export(_private(model), *of_other_size(args, kwargs)))
    except TraceError:
        return False


def enter_program(program: ExportedProgram) -> tuple[fx.GraphModule, fx.GraphModule]:
    """An exported program's graph in the functions of torch, and as it is: what it is to be compared with.

    Raises:
        UnsupportedModelError, TraceError: as for :func:`enter`.
    """
    original = open_program(program)
    check_admissible(original)
    return program_graph(program), original


def enter_graph(gm: fx.GraphModule, args: Sequence[Any]) -> fx.GraphModule:
    """``gm`` with its weights as attributes, where Dynamo passes them as inputs; itself otherwise."""
    return hold_weights(gm, args) if from_dynamo(gm) else gm


def _private(model: nn.Module) -> nn.Module:
    """A structural copy in eval mode, whose weights are computed no more."""
    copied = structural_copy(model)
    for module in copied.modules():
        module.training = False
    settle(copied)
    return copied
