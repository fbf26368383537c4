"""One conversion with all options settled: run the passes, compute the weights, verify, account."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from rmfx import account
from rmfx.algebra.recall import recalling
from rmfx.check.verify import verify as verify_models
from rmfx.collector import collect_new
from rmfx.errors import RmfxError, VerificationError
from rmfx.front.doors import enter
from rmfx.graph.emit import emit
from rmfx.graph.guard import guard_sizes
from rmfx.graph.padding import split_padding
from rmfx.graph.pipeline import run_passes
from rmfx.graph.restore import restore
from rmfx.graph.rule import PassResult
from rmfx.options import Options
from rmfx.passes import inference_passes, planned_passes, training_passes
from rmfx.passes.remove_residual import RemoveResidual
from rmfx.plan.finish import lay_channels_last, lay_weights, write_in_place
from rmfx.plan.follow import Follower
from rmfx.plan.value import Plan
from rmfx.prepare import Prepared, prepare
from rmfx.report import Report, attach


@dataclass(frozen=True, eq=False)
class Rewritten:
    """A network whose passes have run and whose weights are not computed yet."""

    prepared: Prepared
    options: Options
    results: tuple[PassResult, ...]

    def report(self) -> Report:
        """The account of what was done."""
        options, prepared = self.options, self.prepared
        report = account.report_of(prepared.before, self.results, prepared.gm, _notes(options))
        account.check_places(options.policy, report)
        return replace(report, size_conditions=(prepared.entered.sizes,) if prepared.entered.sizes else ())


def rewrite(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    kwargs: Mapping[str, Any],
    options: Options,
    verify: bool | None,
) -> fx.GraphModule:
    """The converted network; arguments and errors are those of :func:`rmfx.convert`."""
    plan = options.policy if isinstance(options.policy, Plan) else None
    rewritten = run(model, example_inputs, kwargs, options)
    try:
        return finished(rewritten.prepared, rewritten.report(), verify, plan)
    except VerificationError:
        prepared = rewritten.prepared
        if not prepared.entered.symbolic or isinstance(model, fx.GraphModule) or follows(prepared):
            raise
    # The code decides by something that a stand-in for a tensor answers wrongly, such as isinstance(x, Tensor).
    rewritten = run(model, example_inputs, kwargs, options, symbolic=False)
    return finished(rewritten.prepared, rewritten.report(), verify, plan)


def finished(prepared: Prepared, report: Report, verify: bool | None, plan: Plan | None = None) -> fx.GraphModule:
    """The graph of ``prepared``, on which passes have run, with its weights computed and compared, and its account.

    Args:
        verify: as for :func:`rmfx.convert`.
        plan: says how images are laid out and what is written in place.

    Raises:
        VerificationError: when it differs from the original.
    """
    gm = prepared.gm
    guard_sizes(gm, report, prepared.entered.batch)
    restore(gm)
    if plan is not None and plan.in_place:
        write_in_place(gm)
    if plan is not None and plan.channels_last:
        lay_channels_last(gm)
    collect_new()  # before the large allocations
    if verify or (verify is None and prepared.args is not None):
        if prepared.args is None:
            raise RmfxError("verify=True needs example_inputs")
        emit(gm, prepared.tensors, torch.float64)  # rounded to the model's dtype, weights would hide a small mistake
        verify_models(
            *(prepared.original, gm, prepared.args),
            example_kwargs=prepared.kwargs,
            value_ranges=prepared.value_ranges,
            quick=True,
        )
    emit(gm, prepared.tensors)
    if plan is not None and plan.channels_last:
        lay_weights(gm)
    gm.recompile()
    gm.train(prepared.original.training)
    attach(gm, account.with_names(report, gm, prepared.before))
    account.clean(gm)
    return gm


def follows(prepared: Prepared) -> bool:
    """Whether the graph that tracing gives, before any pass, computes what the model does on its example inputs."""
    assert prepared.args is not None
    model = prepared.original
    traced = enter(model, prepared.args, prepared.kwargs, allow_training=model.training).gm
    try:
        verify_models(model, traced, prepared.args, example_kwargs=prepared.kwargs, quick=True)
    except VerificationError:
        return False
    return True


def run(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    kwargs: Mapping[str, Any],
    options: Options,
    computes: bool = True,
    symbolic: bool = True,
) -> Rewritten:
    """Bring a model in and run the passes on it.

    Args:
        computes: whether weights will be read; without, the model may be on the meta device.
        symbolic: try symbolic tracing first.

    Raises:
        UnsupportedModelError, TraceError, NormalFormError: as for :func:`rmfx.convert`.
        PlanError: when the policy is a plan that cannot be followed.
    """
    prepared = prepare(
        *(model, example_inputs, kwargs),
        keep_bn=options.keep_bn,
        value_ranges=options.value_ranges,
        computes=computes,
        symbolic=symbolic,
    )
    results = _passed(prepared.gm, options)
    split_padding(prepared.gm)
    return Rewritten(prepared, options, results)


def _passed(gm: fx.GraphModule, options: Options) -> tuple[PassResult, ...]:
    if isinstance(options.policy, Plan):
        return _follow(gm, options.policy, options)
    removal = removal_of(options)
    inference = inference_passes(removal, options.fuse, options.drop_dead_channels)
    passes = training_passes(removal) if options.keep_bn else inference
    veto = account.veto(options.policy, options.max_growth)
    return run_passes(gm, passes, veto, keep_dropout=options.keep_bn)


def removal_of(options: Options) -> RemoveResidual:
    """The pass that removes residual sums, as the user wants it."""
    return RemoveResidual(options.carrier, options.downsample, concat=options.concat, shift_bits=options.shift_bits)


@recalling()
def _follow(gm: fx.GraphModule, plan: Plan, options: Options) -> tuple[PassResult, ...]:
    if plan.original:
        return ()
    follower = Follower(plan)
    results = run_passes(gm, planned_passes(removal_of(options)), follower.veto, tune=follower.tune)
    follower.demand_done(results)
    return results


def _notes(options: Options) -> tuple[str, ...]:
    if options.keep_bn:
        return ("batch norms kept: equal in eval mode; training differs from the first batch on. Run rmfx.calibrate.",)
    return ()
