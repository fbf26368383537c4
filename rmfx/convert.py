"""The story of a conversion: trace, normalise, run the passes, emit, verify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from rmfx import account
from rmfx.algebra.carrier import SHIFT_BITS
from rmfx.check.verify import verify as verify_models
from rmfx.collector import collect_new, uncollected
from rmfx.errors import NormalFormError, RmfxError, TraceError, UnsupportedModelError
from rmfx.front.doors import Entered, enter, enter_graph, enter_program
from rmfx.graph.bounds import give_ranges
from rmfx.graph.emit import emit, storage_table
from rmfx.graph.facts import annotate
from rmfx.graph.guard import guard_sizes
from rmfx.graph.pipeline import run_passes
from rmfx.graph.restore import restore
from rmfx.graph.rule import PassResult
from rmfx.inputs import as_tuple, bind, describe
from rmfx.options import Options, Policy
from rmfx.partial import find_parts
from rmfx.passes import inference_passes, training_passes
from rmfx.passes.normalise import normalise
from rmfx.passes.remove_residual import RemoveResidual
from rmfx.report import Report, attach


@dataclass(frozen=True, eq=False)
class _Planned:
    """A network whose passes have run and whose weights are not computed yet."""

    original: nn.Module
    gm: fx.GraphModule
    args: tuple[Any, ...] | None
    kwargs: Mapping[str, Any]
    before: account.Before
    results: tuple[PassResult, ...]
    tensors: dict[str, torch.Tensor]
    entered: Entered

    def report(self, options: Options) -> Report:
        """The account of what was planned."""
        report = account.report_of(self.before, self.results, self.gm, _notes(options))
        account.check_places(options.policy, report)
        return replace(report, size_conditions=(self.entered.sizes,) if self.entered.sizes else ())


@uncollected
def convert(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Policy = "all",
    carrier: str = "auto",
    downsample: str = "cheaper",
    fuse: str = "cheaper",
    max_growth: float | None = None,
    keep_bn: bool = False,
    concat: bool = False,
    drop_dead_channels: bool = False,
    shift_bits: float = SHIFT_BITS,
    value_ranges: Mapping[str, Any] | None = None,
    verify: bool | None = None,
    partial: bool = True,
) -> nn.Module:
    """Rewrite a residual network into a plain one that computes exactly the same function.

    Args:
        model: any ``nn.Module`` in eval mode, also a ``GraphModule`` that Dynamo made, or an ``ExportedProgram``; it is
            left untouched. Code that ``torch.fx.symbolic_trace`` cannot follow goes through ``torch.export``, which
            needs example inputs.
        example_inputs: a tensor or a tuple of positional inputs. Optional: they let sizes be proven, costs be counted
            and the result be verified, all at their shapes. Values do not matter. An ``ExportedProgram`` has its own.
        example_kwargs: keyword inputs, by name.
        policy: ``"all"`` removes every residual connection that can be removed exactly; a list names the places to
            convert (as in the report); a callable gets each :class:`rmfx.report.Entry` and says whether to remove it.
        carrier: how a tensor passes an activation that is not meant for it: ``"auto"``, ``"direct"``, ``"masked"``,
            ``"split"``, ``"shift"`` (:mod:`rmfx.algebra.carrier`).
        downsample: where a projection shortcut is applied: ``"conv"`` (the paper's Figure 2a), ``"input"`` (2b), or
            ``"cheaper"``.
        fuse: compose consecutive convolutions ``"always"``, only when ``"cheaper"`` in MACs, or ``"never"``.
        max_growth: refuse a place whose MACs would grow by more than this factor.
        keep_bn: keep batch norms, for training (see :func:`rmfx.calibrate`); the model may then be in training mode.
        concat: remove concats of what starts at one tensor, too (dense and other concat skips).
        drop_dead_channels: drop channels that are provably never read, or constant, before anything is carried.
        shift_bits: of precision, that the carrier ``"shift"`` may cost; more is refused.
        value_ranges: what is known of values, ``{name: (low, high)}``, for the carrier ``"shift"``
            (:func:`rmfx.bounds_from_data` measures them: then the result is exact on values within them only).
        verify: compare original and result in float64 at the example inputs' shapes; default: when there are any.
        partial: where no way leads through the code of the whole model, convert those of its sub-modules that can be
            followed, with a :class:`rmfx.errors.PartialConversionWarning`, instead of raising the TraceError.

    Returns:
        A ``GraphModule`` of plain layers, with its :class:`rmfx.report.Report` (:func:`rmfx.report.report`). Where only
        parts were converted, a copy of the model that holds such modules; the report says what was left out.

    Raises:
        UnsupportedModelError: when the model as a whole cannot be converted (in training mode, quantised, ...).
        TraceError: when its code cannot be followed; names the file and line.
        VerificationError: when the result differs, which is a bug of rmfx.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    ...     def forward(self, x):
    ...         return x + self.conv2(self.conv1(x).relu())
    >>> plain = convert(Block().eval(), torch.randn(1, 8, 16, 16))
    >>> print([type(layer).__name__ for layer in plain.modules()][-3:])
    ['Conv2d', 'Conv2d', 'PReLU']
    """
    options = Options(
        *(policy, carrier, downsample, fuse, max_growth, keep_bn, concat, drop_dead_channels, shift_bits),
        value_ranges or {},
    )
    try:
        return _convert(model, example_inputs, example_kwargs or {}, options, verify)
    except TraceError as refused:
        if not partial or not isinstance(model, nn.Module):
            raise
        parts = find_parts(model, example_inputs, example_kwargs or {}, refused, options.policy)
        return parts.convert(_part_converter(options, verify), verify)


def _convert(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    kwargs: Mapping[str, Any],
    options: Options,
    verify: bool | None,
) -> fx.GraphModule:
    planned = _plan(model, example_inputs, kwargs, options)
    gm = planned.gm
    report = planned.report(options)
    guard_sizes(gm, report, planned.entered.batch)
    restore(gm)
    collect_new()  # before the large allocations
    if verify or (verify is None and planned.args is not None):
        if planned.args is None:
            raise RmfxError("verify=True needs example_inputs")
        emit(gm, planned.tensors, torch.float64)  # rounded to the model's dtype, weights would hide a small mistake
        verify_models(planned.original, gm, planned.args, example_kwargs=planned.kwargs, quick=True)
    emit(gm, planned.tensors)
    gm.recompile()
    gm.train(planned.original.training)
    attach(gm, account.with_names(report, gm, planned.before))
    account.clean(gm)
    return gm


@uncollected
def explain(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Policy = "all",
    carrier: str = "auto",
    downsample: str = "cheaper",
    fuse: str = "cheaper",
    max_growth: float | None = None,
    keep_bn: bool = False,
    concat: bool = False,
    drop_dead_channels: bool = False,
    shift_bits: float = SHIFT_BITS,
    value_ranges: Mapping[str, Any] | None = None,
    partial: bool = True,
) -> Report:
    """The :class:`rmfx.report.Report` that :func:`convert` with these arguments would leave; computes no weights.

    So the model may be on the meta device. Args and errors are those of :func:`convert`.

    >>> from rmfx.models import rmnet26x3_32
    >>> explain(rmnet26x3_32().eval()).count("removed")
    9
    """
    options = Options(
        *(policy, carrier, downsample, fuse, max_growth, keep_bn, concat, drop_dead_channels, shift_bits),
        value_ranges or {},
    )
    try:
        return _explain(model, example_inputs, example_kwargs or {}, options)
    except TraceError as refused:
        if not partial or not isinstance(model, nn.Module):
            raise
        parts = find_parts(model, example_inputs, example_kwargs or {}, refused, options.policy)
        return parts.explain(
            lambda part, args, kwargs, policy: _explain(part, args, kwargs, replace(options, policy=policy))
        )


def _explain(
    model: nn.Module | ExportedProgram, example_inputs: Any, kwargs: Mapping[str, Any], options: Options
) -> Report:
    planned = _plan(model, example_inputs, kwargs, options, computes=False)
    return account.with_names(planned.report(options), planned.gm, planned.before)


def _part_converter(options: Options, verify: bool | None) -> Callable[..., fx.GraphModule]:
    def convert_part(part: nn.Module, args: Any, kwargs: Mapping[str, Any], policy: Policy) -> fx.GraphModule:
        wanted = verify if args is not None else False  # what is called with other inputs each time has no example
        return _convert(part, args, kwargs, replace(options, policy=policy), wanted)

    return convert_part


def _plan(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    kwargs: Mapping[str, Any],
    options: Options,
    computes: bool = True,
) -> _Planned:
    given = example_inputs is not None or bool(kwargs)
    args = as_tuple(() if example_inputs is None else example_inputs) if given else None
    original: nn.Module
    if isinstance(model, ExportedProgram):
        traced, original = enter_program(model)
        entered = Entered(traced)
        if args is None and model.example_inputs is not None:
            args, kwargs = model.example_inputs
    else:
        original = enter_graph(model, args) if isinstance(model, fx.GraphModule) and args else model
        entered = enter(original, args, kwargs, allow_training=options.keep_bn, allow_meta=not computes)
    if any(tensor.is_meta for tensor in original.parameters()):
        args, kwargs = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, (args, kwargs))
    entered, gm, inputs = _normal(original, entered, args, kwargs, options, computes)
    give_ranges(gm, options.value_ranges)
    _annotate(gm, inputs)
    tensors = storage_table(gm)
    before = account.before(original, gm)
    removal = RemoveResidual(options.carrier, options.downsample, concat=options.concat, shift_bits=options.shift_bits)
    drop_dead = options.drop_dead_channels and computes  # it reads weights
    passes = training_passes(removal) if options.keep_bn else inference_passes(removal, options.fuse, drop_dead)
    results = run_passes(gm, passes, account.veto(options.policy, options.max_growth), keep_dropout=options.keep_bn)
    return _Planned(original, gm, args, kwargs, before, results, tensors, entered)


def _normal(
    model: nn.Module,
    entered: Entered,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any],
    options: Options,
    computes: bool,
) -> tuple[Entered, fx.GraphModule, tuple[Any, ...] | None]:
    """The normal form; writes that it can give no meaning have one in the graph that ``torch.export`` gives."""
    inputs = None if args is None else bind(entered.gm, args, kwargs)
    try:
        return entered, normalise(entered.gm, keep_dropout=options.keep_bn, inputs=inputs), inputs
    except NormalFormError as refused:
        if args is None or isinstance(model, fx.GraphModule) or not entered.symbolic:
            raise
        try:
            entered = enter(
                model, args, kwargs, symbolic=False, allow_training=options.keep_bn, allow_meta=not computes
            )
        except TraceError as error:
            raise NormalFormError(f"{refused}; {error}") from refused
    inputs = bind(entered.gm, args, kwargs)
    return entered, normalise(entered.gm, keep_dropout=options.keep_bn, inputs=inputs), inputs


def _annotate(gm: fx.GraphModule, inputs: tuple[Any, ...] | None) -> None:
    try:
        annotate(gm, inputs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        assert inputs is not None
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedModelError(
            f"the model cannot be run on the example inputs ({describe(inputs)}): {reason}"
        ) from error


def _notes(options: Options) -> tuple[str, ...]:
    if options.keep_bn:
        return ("batch norms kept: equal in eval mode; training differs from the first batch on. Run rmfx.calibrate.",)
    return ()
