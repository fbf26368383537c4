"""The story of a conversion: trace, normalise, run the passes, emit, verify."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from rmfx import account
from rmfx.algebra.carrier import CHOICES
from rmfx.check.verify import verify as verify_models
from rmfx.collector import collect_new, uncollected
from rmfx.errors import RmfxError, UnsupportedModelError
from rmfx.front.trace import trace
from rmfx.graph.emit import emit, storage_table
from rmfx.graph.facts import annotate
from rmfx.graph.guard import guard_sizes
from rmfx.graph.pipeline import run_passes
from rmfx.graph.restore import restore
from rmfx.graph.rule import PassResult
from rmfx.inputs import as_tuple, bind, describe
from rmfx.passes import inference_passes, training_passes
from rmfx.passes.normalise import normalise
from rmfx.report import Entry, Report, attach

Policy = str | Callable[[Entry], bool] | Collection[str]
_DOWNSAMPLE = ("cheaper", "conv", "input")
_FUSE = ("cheaper", "always", "never")


@dataclass(frozen=True)
class Options:
    """How to convert; the fields are the keyword arguments of :func:`convert`."""

    policy: Policy = "all"
    carrier: str = "auto"
    downsample: str = "cheaper"
    fuse: str = "cheaper"
    max_growth: float | None = None
    keep_bn: bool = False

    def __post_init__(self) -> None:
        _require_one_of("carrier", self.carrier, CHOICES)
        _require_one_of("downsample", self.downsample, _DOWNSAMPLE)
        _require_one_of("fuse", self.fuse, _FUSE)
        if isinstance(self.policy, str):
            _require_one_of("policy", self.policy, ("all",), " (or a callable, or a list of places)")
        elif not callable(self.policy) and not isinstance(self.policy, Collection):
            raise RmfxError(f"policy must be 'all', a callable, or a list of places, got {self.policy!r}")
        if self.max_growth is not None and not (isinstance(self.max_growth, (int, float)) and self.max_growth > 0):
            raise RmfxError(f"max_growth must be a positive factor, got {self.max_growth!r}")


def _require_one_of(option: str, value: str, choices: tuple[str, ...], more: str = "") -> None:
    if value not in choices:
        raise RmfxError(f"{option} must be one of {', '.join(map(repr, choices))}{more}, got {value!r}")


@dataclass(frozen=True, eq=False)
class _Planned:
    """A network whose passes have run and whose weights are not computed yet."""

    gm: fx.GraphModule
    inputs: tuple[Any, ...] | None
    before: account.Before
    results: tuple[PassResult, ...]
    tensors: dict[str, torch.Tensor]


@uncollected
def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Policy = "all",
    carrier: str = "auto",
    downsample: str = "cheaper",
    fuse: str = "cheaper",
    max_growth: float | None = None,
    keep_bn: bool = False,
    verify: bool | None = None,
) -> fx.GraphModule:
    """Rewrite a residual network into a plain one that computes exactly the same function.

    Args:
        model: any ``nn.Module`` in eval mode that ``torch.fx.symbolic_trace`` can follow; it is left untouched.
        example_inputs: a tensor or a tuple of positional inputs. Optional: they let sizes be proven, costs be counted
            and the result be verified, all at their shapes. Values do not matter.
        example_kwargs: keyword inputs, by name.
        policy: ``"all"`` removes every residual connection that can be removed exactly; a list names the places to
            convert (as in the report); a callable gets each :class:`rmfx.report.Entry` and says whether to remove it.
        carrier: how a tensor passes an activation that is not meant for it: ``"auto"``, ``"direct"``, ``"masked"``,
            ``"split"`` (:mod:`rmfx.algebra.carrier`).
        downsample: where a projection shortcut is applied: ``"conv"`` (the paper's Figure 2a), ``"input"`` (2b), or
            ``"cheaper"``.
        fuse: compose consecutive convolutions ``"always"``, only when ``"cheaper"`` in MACs, or ``"never"``.
        max_growth: refuse a place whose MACs would grow by more than this factor.
        keep_bn: keep batch norms, for training (see :func:`rmfx.calibrate`); the model may then be in training mode.
        verify: compare original and result in float64 at the example inputs' shapes; default: when there are any.

    Returns:
        A ``GraphModule`` of plain layers, with its :class:`rmfx.report.Report` (:func:`rmfx.report.report`).

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
    options = Options(policy, carrier, downsample, fuse, max_growth, keep_bn)
    planned = _plan(model, example_inputs, example_kwargs or {}, options)
    gm = planned.gm
    report = account.report_of(planned.before, planned.results, gm, _notes(options))
    account.check_places(policy, report)
    guard_sizes(gm, report)
    restore(gm)
    collect_new()  # before the large allocations
    if verify or (verify is None and planned.inputs is not None):
        if planned.inputs is None:
            raise RmfxError("verify=True needs example_inputs")
        emit(gm, planned.tensors, torch.float64)  # rounded to the model's dtype, weights would hide a small mistake
        verify_models(model, gm, example_inputs, example_kwargs=example_kwargs, quick=True)
    emit(gm, planned.tensors)
    gm.recompile()
    gm.train(model.training)
    attach(gm, account.with_names(report, gm, planned.before))
    account.clean(gm)
    return gm


@uncollected
def explain(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Policy = "all",
    carrier: str = "auto",
    downsample: str = "cheaper",
    fuse: str = "cheaper",
    max_growth: float | None = None,
    keep_bn: bool = False,
) -> Report:
    """The :class:`rmfx.report.Report` that :func:`convert` with these arguments would leave; computes no weights.

    So the model may be on the meta device. Args and errors are those of :func:`convert`.

    >>> from rmfx.models import rmnet26x3_32
    >>> explain(rmnet26x3_32().eval()).count("removed")
    9
    """
    options = Options(policy, carrier, downsample, fuse, max_growth, keep_bn)
    planned = _plan(model, example_inputs, example_kwargs or {}, options, computes=False)
    report = account.report_of(planned.before, planned.results, planned.gm, _notes(options))
    account.check_places(policy, report)
    return account.with_names(report, planned.gm, planned.before)


def _plan(
    model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any], options: Options, computes: bool = True
) -> _Planned:
    traced = trace(model, allow_training=options.keep_bn, allow_meta=not computes)
    gm = normalise(traced, keep_dropout=options.keep_bn)
    inputs = None
    if example_inputs is not None or kwargs:
        inputs = bind(gm, () if example_inputs is None else as_tuple(example_inputs), kwargs)
    _annotate(gm, inputs)
    tensors = storage_table(gm)
    before = account.before(model, gm)
    passes = (
        training_passes(options.carrier, options.downsample)
        if options.keep_bn
        else inference_passes(options.carrier, options.downsample, options.fuse)
    )
    results = run_passes(gm, passes, account.veto(options.policy, options.max_growth), keep_dropout=options.keep_bn)
    return _Planned(gm, inputs, before, results, tensors)


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
