"""A model on its way to the passes: traced, in normal form, annotated, with the account of what stood there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from rmfx import account
from rmfx.errors import NormalFormError, TraceError, UnsupportedModelError
from rmfx.front.doors import Entered, enter, enter_graph, enter_program
from rmfx.graph.bounds import give_ranges
from rmfx.graph.emit import storage_table
from rmfx.graph.facts import annotate
from rmfx.inputs import as_tuple, bind, describe
from rmfx.passes.normalise import normalise


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network that the passes can run on.

    Attributes:
        original: the user's model.
        gm: its normal form, with facts on its nodes.
        args, kwargs: example inputs; ``args`` is ``None`` where there are none.
        before: what stood there.
        tensors: every tensor of the normal form (:func:`rmfx.graph.emit.storage_table`).
        entered: how it came in.
        value_ranges: what the user knows of values.
    """

    original: nn.Module
    gm: fx.GraphModule
    args: tuple[Any, ...] | None
    kwargs: Mapping[str, Any]
    before: account.Before
    tensors: dict[str, torch.Tensor]
    entered: Entered
    value_ranges: Mapping[str, Any]


def prepare(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    kwargs: Mapping[str, Any],
    *,
    keep_bn: bool = False,
    value_ranges: Mapping[str, Any] | None = None,
    computes: bool = True,
    symbolic: bool = True,
) -> Prepared:
    """Trace, normalise and annotate ``model``, which is left untouched.

    Args:
        example_inputs, kwargs: as for :func:`rmfx.convert`.
        keep_bn: leave dropouts where they are, and admit a model in training mode.
        value_ranges: as for :func:`rmfx.convert`.
        computes: whether weights will be computed; without, the model may be on the meta device.
        symbolic: try symbolic tracing first.

    Raises:
        UnsupportedModelError, TraceError, NormalFormError: as for :func:`rmfx.convert`.

    >>> prepared = prepare(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), torch.zeros(1, 2), {})
    >>> [str(node) for node in prepared.gm.graph.nodes]
    ['input_1', '_0', '_1', 'output']
    """
    given = example_inputs is not None or bool(kwargs)
    args = as_tuple(() if example_inputs is None else example_inputs) if given else None
    original: nn.Module
    if isinstance(model, ExportedProgram):
        traced, original = enter_program(model)
        if args is None and model.example_inputs is not None:
            args, kwargs = model.example_inputs
        return _annotated(original, Entered(traced), args, kwargs, value_ranges or {}, keep_bn)
    original = enter_graph(model, args) if isinstance(model, fx.GraphModule) and args else model
    if isinstance(original, nn.Module) and any(tensor.is_meta for tensor in original.parameters()):
        args, kwargs = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, (args, kwargs))

    def through(symbolic: bool) -> Prepared:
        allowed = {"allow_training": keep_bn, "allow_meta": not computes}
        entered = enter(original, args, kwargs, symbolic=symbolic, **allowed)
        return _annotated(original, entered, args, kwargs, value_ranges or {}, keep_bn)

    if not symbolic:
        return through(False)
    try:
        return through(True)
    except (NormalFormError, UnsupportedModelError) as refused:
        # Writes that the normal form can give no meaning have one in the graph that torch.export gives, and decisions
        # that a stand-in for a tensor answers wrongly (hasattr) are taken rightly there.
        if args is None or isinstance(original, fx.GraphModule):
            raise
        try:
            return through(False)
        except (TraceError, UnsupportedModelError) as error:
            if isinstance(refused, UnsupportedModelError):
                raise refused from None
            raise NormalFormError(f"{refused}; {error}") from refused


def _annotated(
    original: nn.Module,
    entered: Entered,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any],
    ranges: Mapping[str, Any],
    keep_bn: bool,
) -> Prepared:
    inputs = None if args is None else bind(entered.gm, args, kwargs)
    gm = normalise(entered.gm, keep_dropout=keep_bn, inputs=inputs)
    account.mark_carried(gm, original)
    give_ranges(gm, ranges)
    _annotate(gm, inputs)
    return Prepared(original, gm, args, kwargs, account.before(original, gm), storage_table(gm), entered, ranges)


def _annotate(gm: fx.GraphModule, inputs: tuple[Any, ...] | None) -> None:
    try:
        annotate(gm, inputs)
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as error:
        assert inputs is not None
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedModelError(
            f"the model cannot be run on the example inputs ({describe(inputs)}): {reason}"
        ) from error
