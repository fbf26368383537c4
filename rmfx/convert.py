"""The front of a conversion: what the user says becomes options, and a network or its parts are converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from rmfx import account
from rmfx.algebra.carrier import SHIFT_BITS
from rmfx.collector import uncollected
from rmfx.errors import PlanError, TraceError
from rmfx.inputs import without_absent
from rmfx.measure.target import Target
from rmfx.options import Options, Policy
from rmfx.ordinary import outside_inference_mode
from rmfx.partial import find_parts
from rmfx.plan.auto import plan_network
from rmfx.plan.cache import Folder, PriceCache
from rmfx.plan.pricing import OnStep
from rmfx.plan.value import Plan
from rmfx.report import Report
from rmfx.rewrite import rewrite, run
from rmfx.untouched import leaves_untouched


@outside_inference_mode
@leaves_untouched
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
    target: str | Target = "eager",
    measure: bool | float = True,
    verify: bool | None = None,
    partial: bool = True,
) -> nn.Module:
    """Rewrite a residual network into a plain one that computes exactly the same function.

    Args:
        model: any ``nn.Module`` in eval mode, also a ``GraphModule`` that Dynamo made, or an ``ExportedProgram``; it is
            left untouched. Code that ``torch.fx.symbolic_trace`` cannot follow goes through ``torch.export``, which
            needs example inputs.
        example_inputs: a tensor or a tuple of positional inputs. Optional: they let sizes be proven, costs be counted
            and the result be verified, all at their shapes. Values do not matter, but with ``value_ranges``. An
            ``ExportedProgram`` has its own. Inputs that default to ``None`` and are not among them, the network does
            not have any more.
        example_kwargs: keyword inputs, by name.
        policy: ``"all"`` removes every residual connection that can be removed exactly; ``"auto"`` does at each place
            only what is faster on ``target``, and nothing at all where that is fastest (:func:`rmfx.make_plan`); a
            :class:`rmfx.Plan` is followed; a list names the places to convert (as in the report); a callable gets each
            :class:`rmfx.report.Entry` and says whether to remove it.
        carrier: how a tensor passes an activation that is not meant for it: ``"auto"``, ``"direct"``, ``"masked"``,
            ``"split"``, ``"shift"`` (:mod:`rmfx.algebra.carrier`).
        downsample: where a projection shortcut is applied: ``"conv"`` (the paper's Figure 2a), ``"input"`` (2b), or
            ``"cheaper"``.
        fuse: compose consecutive convolutions ``"always"``, only when ``"cheaper"`` in MACs, or ``"never"``.
        max_growth: refuse a place whose MACs would grow by more than this factor.
        keep_bn: keep batch norms, for training (see :func:`rmfx.calibrate`); the model may then be in training mode.
        concat: remove concats of what starts at one tensor, too (dense and other concat skips).
        drop_dead_channels: drop channels that are provably never read, or constant, and what would be carried for
            shortcuts that are scaled by 0.
        shift_bits: of precision, that the carrier ``"shift"`` may cost; more is refused.
        value_ranges: what is known of values, ``{name: (low, high)}``, for the carrier ``"shift"``
            (:func:`rmfx.bounds_from_data` measures them: then the result is exact on values within them only).
        target: where the network is to run, for ``policy="auto"``: ``"eager"``, ``"inductor"``, ``"onnxruntime"``, with
            ``:cuda`` behind for a GPU, or a :class:`rmfx.Target`.
        measure: for ``policy="auto"``: time candidates on this machine, ``True`` or for so many seconds; ``False`` goes
            by estimates alone.
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

    >>> import torch
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
        *(value_ranges or {}, Target.of(target), measure),
    )
    args, kwargs = without_absent(model, example_inputs, example_kwargs or {})
    try:
        return _convert(model, args, kwargs, options, verify)
    except TraceError as refused:
        if not partial or not isinstance(model, nn.Module) or isinstance(options.policy, Plan):
            raise
        parts = find_parts(model, args, kwargs, refused, options.policy)
        return parts.convert(_part_converter(options, verify), verify)


def _convert(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    kwargs: Mapping[str, Any],
    options: Options,
    verify: bool | None,
) -> fx.GraphModule:
    if options.policy == "auto":
        options = replace(options, policy=plan_network(model, example_inputs, kwargs, options))
    return rewrite(model, example_inputs, kwargs, options, verify)


@outside_inference_mode
@leaves_untouched
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
    target: str | Target = "eager",
    partial: bool = True,
) -> Report:
    """The :class:`rmfx.report.Report` that :func:`convert` with these arguments would leave; computes no weights.

    So the model may be on the meta device, but not for what reads weights: ``drop_dead_channels``, and
    ``policy="auto"``, which goes by estimates here. Args and errors are those of :func:`convert`.

    >>> from rmfx.models import rmnet26x3_32
    >>> explain(rmnet26x3_32().eval()).count("removed")
    9
    """
    options = Options(
        *(policy, carrier, downsample, fuse, max_growth, keep_bn, concat, drop_dead_channels, shift_bits),
        *(value_ranges or {}, Target.of(target)),
    )
    given = without_absent(model, example_inputs, example_kwargs or {})
    try:
        return _explain(model, *given, options)
    except TraceError as refused:
        if not partial or not isinstance(model, nn.Module) or isinstance(options.policy, Plan):
            raise
        parts = find_parts(model, *given, refused, options.policy)
        return parts.explain(
            lambda part, args, kwargs, policy: _explain(part, args, kwargs, replace(options, policy=policy))
        )


def _explain(
    model: nn.Module | ExportedProgram, example_inputs: Any, kwargs: Mapping[str, Any], options: Options
) -> Report:
    if options.policy == "auto":
        options = replace(options, policy=plan_network(model, example_inputs, kwargs, replace(options, measure=False)))
    rewritten = run(model, example_inputs, kwargs, options, computes=options.drop_dead_channels)
    return account.with_names(rewritten.report(), rewritten.prepared.gm, rewritten.prepared.before)


def _part_converter(options: Options, verify: bool | None) -> Callable[..., fx.GraphModule]:
    def convert_part(part: nn.Module, args: Any, kwargs: Mapping[str, Any], policy: Policy) -> fx.GraphModule:
        wanted = verify if args is not None else False  # what is called with other inputs each time has no example
        return _convert(part, args, kwargs, replace(options, policy=policy), wanted)

    return convert_part


@outside_inference_mode
@leaves_untouched
@uncollected
def make_plan(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    *,
    target: str | Target = "eager",
    measure: bool | float = True,
    carrier: str = "auto",
    concat: bool = False,
    value_ranges: Mapping[str, Any] | None = None,
    cache: Folder = True,
    on_step: OnStep | None = None,
) -> Plan:
    """Decide, place by place, what makes ``model`` faster on ``target``; changes nothing.

    At each place the plan keeps what is there, or removes the residual sum with one of the carriers, merges linear
    branches, composes convolutions: whatever is cheapest, seams between neighbours included. Prices are estimates
    from shapes; with ``measure``, candidates that may win are timed on the target, and the network that comes out is
    timed against ``model``. If that one is slower, the plan is to rewrite nothing.

    Args:
        model: as for :func:`convert`; in eval mode.
        example_inputs: a tensor or a tuple of tensors; the plan is for their shapes.
        target, measure, carrier, concat, value_ranges: as for :func:`convert`.
        cache: the folder of measured prices, by shape, machine and versions; ``True`` for ``rmfx/prices`` in the user's
            folder for caches (``$XDG_CACHE_HOME``, or ``~/.cache``); ``None`` to remember none. Where it cannot be
            written, none are remembered, with a :class:`rmfx.errors.PriceCacheWarning`.
        on_step: told what is timed next.

    Returns:
        A :class:`rmfx.Plan`: print it, save it, and give it to :func:`apply_plan` or ``convert(policy=plan)``.

    Raises:
        PlanError: when there are no example inputs, or some that are no tensors.
        RuntimeUnavailableError: when the target does not run here.

    >>> import torch
    >>> from rmfx.models import resnet20
    >>> plan = make_plan(resnet20().eval(), torch.randn(1, 3, 32, 32), target="onnxruntime", measure=False)
    >>> plan.count("remove_residual")
    0
    """
    ranges = dict(value_ranges or {})
    options = Options("auto", carrier, concat=concat, value_ranges=ranges, target=Target.of(target), measure=measure)
    given = without_absent(model, example_inputs, {})
    return plan_network(model, *given, options, cache=PriceCache(cache), on_step=on_step)


@outside_inference_mode
@leaves_untouched
def apply_plan(
    plan: Plan,
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    *,
    value_ranges: Mapping[str, Any] | None = None,
    verify: bool | None = None,
) -> fx.GraphModule:
    """The network that ``plan`` makes of ``model``: the one it was made for, or another checkpoint of its architecture.

    Args:
        plan: from :func:`make_plan`.
        model, example_inputs, verify: as for :func:`convert`.
        value_ranges: as for :func:`convert`; another checkpoint has its own, so a plan holds none.

    Raises:
        PlanError: when the plan does not fit; names the place and the condition that is broken there.

    >>> import torch
    >>> from rmfx.models import resnet20
    >>> x = torch.randn(1, 3, 32, 32)
    >>> plan = make_plan(resnet20().eval(), x, measure=False)
    >>> type(apply_plan(plan, resnet20().eval(), x)).__name__
    'ResNet'
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"apply_plan takes a plan, of make_plan or Plan.load, got {plan!r}")
    options = Options(plan, value_ranges=dict(value_ranges or {}), target=plan.target)
    return rewrite(model, *without_absent(model, example_inputs, {}), options, verify)
