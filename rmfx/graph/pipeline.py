"""Runs passes in order; between any two the graph is checked to be in normal form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from rmfx.front.normal import check_normal
from rmfx.graph.rewriter import Tune, Veto, as_it_is, sweep
from rmfx.graph.rule import PassResult, Rule

# Called after every pass with its result: dumping, timing and bisecting are callbacks, no pass knows of them.
Callback = Callable[[PassResult, fx.GraphModule], None]


def run_passes(
    gm: fx.GraphModule,
    passes: Sequence[Rule[Any, Any]],
    veto: Veto,
    callback: Callback | None = None,
    *,
    tune: Tune = as_it_is,
    keep_dropout: bool = False,
) -> tuple[PassResult, ...]:
    """Run ``passes`` over ``gm`` (which must be, and stays, in normal form, with dropouts or without).

    Raises:
        NormalFormError: when a pass leaves the normal form: a bug of that pass.
    """
    check_normal(gm, keep_dropout)
    results = []
    for rule in passes:
        result = sweep(gm, rule, veto, tune)
        check_normal(gm, keep_dropout)
        if callback is not None:
            callback(result, gm)
        results.append(result)
    return tuple(results)
