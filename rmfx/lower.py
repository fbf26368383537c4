"""The way back: a plain network's carried channels become shortcuts again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from rmfx import account
from rmfx.algebra.pointwise import NORMS
from rmfx.algebra.recall import recalling
from rmfx.algebra.widened import is_identity_at
from rmfx.check.verify import verify as verify_models
from rmfx.collector import uncollected
from rmfx.graph.padding import join_padding, split_padding
from rmfx.graph.pipeline import run_passes
from rmfx.graph.rewriter import want_all
from rmfx.graph.rule import PassResult
from rmfx.ordinary import outside_inference_mode
from rmfx.passes.lower_carried import LowerCarried
from rmfx.prepare import prepare
from rmfx.rewrite import finished
from rmfx.untouched import leaves_untouched


@outside_inference_mode
@leaves_untouched
@uncollected
def lower(
    plain: nn.Module,
    example_inputs: Any = None,
    *,
    value_ranges: Mapping[str, Any] | None = None,
    verify: bool | None = None,
) -> fx.GraphModule:
    """Turn carried channels back into shortcuts, where that costs less; the function stays exactly the same.

    The channels are found in the weights alone (:mod:`rmfx.passes.lower_carried`), so the network may have been saved,
    pruned or read from ONNX since it was converted. Of a pruned one, what is left of a shortcut is restored.

    Batch norms that were kept stay, and so do dropouts. On carried channels norms are the identity (equation 2), but
    for the rounding of their scales, which is gone from the result. Training changes them: prune, lower, then train on.

    Args:
        plain: a network as :func:`rmfx.convert` leaves it; it is left untouched. In training mode it is taken for what
            it computes in eval mode, and the result is in training mode, too.
        example_inputs: a tensor or a tuple of positional inputs. Optional: they let costs be counted and the result be
            verified, at their shapes.
        value_ranges: what is known of values, as for :func:`rmfx.convert`, where channels are carried by a shift.
        verify: compare ``plain`` and the result in float64; default: when there are example inputs.

    Returns:
        A ``GraphModule``, with a :class:`rmfx.report.Report` whose notes name every shortcut.

    Raises:
        UnsupportedModelError, TraceError, NormalFormError: as for :func:`rmfx.convert`.
        VerificationError: when the result differs, which is a bug of rmfx.

    >>> import torch
    >>> from rmfx import convert, report
    >>> from rmfx.models import rmnet26x3_32
    >>> x = torch.randn(1, 3, 32, 32)
    >>> plain = convert(rmnet26x3_32().eval(), x)
    >>> lowered = lower(plain, x)
    >>> report(lowered).totals.macs_after <= report(plain).totals.macs_before
    True
    """
    prepared = prepare(plain, example_inputs, {}, keep_bn=True, value_ranges=value_ranges)
    joined = join_padding(prepared.gm)
    results = _until_settled(prepared.gm)
    if joined and not results[0].applied:  # then it stays as it was, names and all
        prepared = prepare(plain, example_inputs, {}, keep_bn=True, value_ranges=value_ranges)
    split_padding(prepared.gm)
    report = account.report_of(prepared.before, results, prepared.gm, _notes(results))
    sizes = (prepared.entered.sizes,) if prepared.entered.sizes else ()
    report = replace(report, size_conditions=sizes)
    if not any(isinstance(layer, NORMS) and bool(is_identity_at(layer).any()) for layer in prepared.original.modules()):
        return finished(prepared, report, verify)
    lowered = finished(prepared, report, False)
    if verify or (verify is None and prepared.args is not None):
        networks = (_unrounded(prepared.original), _unrounded(lowered))
        verify_models(*networks, prepared.args, value_ranges=prepared.value_ranges, quick=True)
    return lowered


def _unrounded(network: nn.Module) -> nn.Module:
    """A copy in float64, with norms that are exactly the identity where they are it to rounding."""
    exact = copy.deepcopy(network).double()
    for rounded, layer in zip(network.modules(), exact.modules(), strict=True):
        if isinstance(layer, NORMS) and bool((same := is_identity_at(rounded)).any()):
            assert layer.running_var is not None
            layer.weight.data[same] = torch.sqrt(layer.running_var + layer.eps)[same]
    return exact


@recalling()
def _until_settled(gm: fx.GraphModule) -> tuple[PassResult, ...]:
    """Sweep until nothing changes: outer runs before the ones they enclose, then those whose outer run stays."""
    results: list[PassResult] = []
    for rule in (LowerCarried(), LowerCarried(patient=False)):
        results += run_passes(gm, (rule,), want_all, keep_dropout=True)
        while results[-1].changed:
            results += run_passes(gm, (rule,), want_all, keep_dropout=True)
    done = tuple(applied for result in results for applied in result.applied)
    return (PassResult(LowerCarried.name, done, results[-1].refused),)


def _notes(results: tuple[PassResult, ...]) -> tuple[str, ...]:
    return tuple(
        f"carried channels are a shortcut again in front of {applied.origin}: MACs "
        f"{applied.price.macs_before:.4g} -> {applied.price.macs_after:.4g}"
        for result in results
        for applied in result.applied
    )
