"""Pruning of whole networks: channels that say least go, physically, from every layer that has them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rmfx import account
from rmfx.collector import uncollected
from rmfx.copying import deep_copy
from rmfx.errors import RmfxError
from rmfx.graph.linear import mixes
from rmfx.lower import lower as lowered
from rmfx.measure.paired import sample
from rmfx.measure.runners import runner
from rmfx.measure.target import Target
from rmfx.ordinary import outside_inference_mode
from rmfx.prepare import Prepared, prepare
from rmfx.pruning.constants import dead_sets
from rmfx.pruning.coupling import Coupling, couple, is_group_wise
from rmfx.pruning.importance import Data, Importance, Loss, cross_entropy, scores
from rmfx.pruning.reconstruct import reconstruct
from rmfx.pruning.removal import Removal, remove
from rmfx.pruning.spaces import Costs, Space, spaces_of
from rmfx.pruning.wanted import Ranked, Wanted
from rmfx.report import Report, attach, report
from rmfx.rewrite import finished

Scope = Literal["global", "layer"]

_SAMPLES = 15  # calls that a latency is the median of


@dataclass(frozen=True)
class Width:
    """Channels of the layers that hang together with the one called ``layer``, before and after.

    Attributes:
        constants: how many of those after emit a constant only, for readers that pad with zeros.
    """

    layer: str
    before: int
    after: int
    constants: int = 0


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network and what was taken from it.

    Attributes:
        network: narrower layers in the same graph, in eval mode, with a :class:`rmfx.report.Report`.
        widths: of everything that could be pruned, in graph order.
        fixed: why other layers keep their channels.
        parameters, macs: before and after; MACs are per sample.
        error: largest change of an output on the example inputs, by the largest output; before any fine-tuning.
        lost: constants of removed channels that no layer could take over, so that they are simply missing.
    """

    network: fx.GraphModule
    widths: tuple[Width, ...]
    fixed: Mapping[str, str]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    error: float
    lost: int

    def to_dict(self) -> dict[str, Any]:
        """Everything but the network, JSON-able."""
        told = {name: value for name, value in vars(self).items() if name not in ("network", "widths")}
        return {**told, "fixed": dict(self.fixed), "widths": [asdict(width) for width in self.widths]}

    def __str__(self) -> str:
        lines = [f"{w.layer}: {w.before} -> {w.after} channels" for w in self.widths if w.after < w.before]
        ratios = [f"{before} -> {after} ({after / before:.2f}x)" for before, after in (self.parameters, self.macs)]
        lines += [f"parameters {ratios[0]}, MACs {ratios[1]}", f"outputs changed by {self.error:.3g} of the largest"]
        if self.lost:
            lines.append(f"{self.lost} constants of removed channels are missing")
        return "\n".join(lines)


@outside_inference_mode
@uncollected
def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    amount: float | None = None,
    threshold: float | None = None,
    budget: Mapping[str, Any] | None = None,
    importance: Importance = "taylor",
    data: Data | None = None,
    loss: Loss = cross_entropy,
    scope: Scope = "global",
    per_mac: bool | None = None,
    round_to: int = 1,
    keep_constants: bool = True,
    calibration: Data | None = None,
    lower: bool = False,
) -> Pruned:
    """Remove the channels that say least, from every layer that has them; there are no masks.

    In a plain network each layer's channels are chosen by themselves, carried ones too: one that goes takes the
    shortcut of that one channel with it. In a residual network, channels of one stage hang together, and go together.

    A channel that goes leaves a constant behind, what it emits without its weights. The layers that read it take that
    into their biases, or, where they pad with zeros, read all such constants from one channel that stays. So channels
    that emitted constants anyway go without changing the function.

    Args:
        model: residual or converted, with batch norms (``convert(keep_bn=True)``) or folded; it is left untouched.
        example_inputs: a tensor or a tuple of positional inputs: costs are for their shapes.
        amount: the part of all channels that goes, as far as whole chunks allow.
        threshold: channels that score below it go. Those that nothing depends on, or that are constant, score 0.
        budget: ``{"macs": 0.5}``: until no more than half of the MACs are left; or ``{"latency_ms": 5, "target":
            "onnxruntime"}``: until it takes no longer there, measured on ``example_inputs``.
        importance: ``"taylor"``, ``"bn"``, ``"l1"``, ``"l2"`` (:mod:`rmfx.pruning.importance`), or a function of the
            network in normal form and its :class:`rmfx.pruning.coupling.Coupling` that scores every set of channels.
        data: batches ``(inputs, labels)``; ``"taylor"`` needs them.
        loss: of outputs and labels, summed over samples.
        scope: rank channels over the whole network, or take ``amount`` of every layer.
        per_mac: rank by score per MAC that is saved, or by score; by default the former for ``"taylor"``, whose scores
            are changes of the loss. A ``threshold`` is one of scores.
        round_to: leave every layer a multiple of so many channels, by keeping the best of those that were to go.
        keep_constants: or leave the constants out, which changes the function a little more; ``error`` says how much.
        calibration: pairs as in ``data``, of which only the inputs are read: make up for what is gone, without any
            training, by least squares on what each layer gave before (:mod:`rmfx.pruning.reconstruct`).
        lower: turn what is left of carried channels back into shortcuts where that costs less (:func:`rmfx.lower`).
            ``budget`` in MACs is of the plain network all the same; one in milliseconds is of the result.

    Raises:
        RmfxError: when not exactly one of ``amount``, ``threshold`` and ``budget`` is given, or one makes no sense, or
            nothing of the network can be pruned, or the budget cannot be met; for ``lower`` with ``calibration``.
        UnsupportedModelError, TraceError, NormalFormError: as for :func:`rmfx.convert`.

    >>> import rmfx
    >>> from rmfx.models import rmnet26x3_32
    >>> x = torch.randn(2, 3, 32, 32)
    >>> plain = rmfx.convert(rmnet26x3_32().eval(), x)
    >>> pruned = prune(plain, x, budget={"macs": 0.5}, importance="l2")
    >>> pruned.macs[1] <= 0.5 * pruned.macs[0]
    True
    """
    if lower and calibration is not None:
        raise RmfxError(
            "least squares (calibration) change the Dirac filters that lower=True needs: choose one of them"
        )
    per_mac = importance == "taylor" if per_mac is None else per_mac
    wanted = Wanted(amount, threshold, budget, scope, per_mac, round_to, keep_constants)
    prepared, coupling = _coupled(model, example_inputs)
    spaces = spaces_of(coupling)
    if not spaces:
        raise RmfxError(f"nothing of this network can be pruned: {_first(coupling)}")
    ranks = scores(prepared.gm, coupling, importance, data, loss)
    ranks[dead_sets(prepared.gm, coupling)] = 0.0
    ranked = Ranked(prepared.gm, coupling, spaces, Costs(coupling, spaces, prepared.before.macs), ranks)

    def latency(removal: Removal, target: Target) -> float:
        again, other = _coupled(model, example_inputs)  # the same sets, by the same numbers
        remove(again.gm, other, removal.on(again.gm))
        assert again.args is not None
        network = finished(again, _report(again, ()), False)
        call = runner(lowered(network, again.args, verify=False) if lower else network, again.args, target)
        return median(sample(call) for _ in range(_SAMPLES))

    removal = wanted.removal(ranked, latency)
    kept = _kept(coupling, removal)
    remove(prepared.gm, coupling, removal)
    pruned = _pruned(prepared, coupling, spaces, removal)
    if calibration is None:
        return _lowered(pruned, prepared) if lower else pruned
    again, _ = _coupled(model, example_inputs)
    reconstruct(pruned.network, finished(again, _report(again, ()), False), kept, calibration)
    assert prepared.args is not None
    return replace(pruned, error=_change(prepared.original, pruned.network, prepared.args))


def _lowered(pruned: Pruned, prepared: Prepared) -> Pruned:
    assert prepared.args is not None
    network = lowered(pruned.network, prepared.args)
    told = report(network)
    totals = replace(told.totals, macs_before=pruned.macs[0], params_before=pruned.parameters[0])
    attach(network, replace(told, totals=totals, notes=(*report(pruned.network).notes, *told.notes)))
    assert totals.macs_after is not None
    return replace(
        pruned,
        network=network,
        parameters=(totals.params_before, totals.params_after),
        macs=(pruned.macs[0], totals.macs_after),
        error=_change(prepared.original, network, prepared.args),
    )


def _coupled(model: nn.Module, example_inputs: Any) -> tuple[Prepared, Coupling]:
    prepared = prepare(deep_copy(model).eval(), example_inputs, {}, keep_bn=True)
    if prepared.args is None:
        raise RmfxError("prune needs example_inputs: costs follow from shapes")
    if any(isinstance(leaf, Tensor) and not leaf.numel() for leaf in pytree.tree_leaves(prepared.args)):
        raise RmfxError("prune needs example_inputs that hold a sample: one of them is empty")
    return prepared, couple(prepared.gm)


def _kept(coupling: Coupling, removal: Removal) -> dict[str, Tensor]:
    """What :func:`rmfx.pruning.reconstruct.reconstruct` wants to know of every layer that is not depthwise."""
    found: dict[str, Tensor] = {}
    for node, channels in coupling.channels.items():
        if mixes(node) and not is_group_wise(node):
            rows = torch.where(removal.homes[channels.sets], -1, torch.arange(len(channels.sets)))
            found[str(node.target)] = rows[~removal.gone[channels.sets]]
    return found


def _report(prepared: Prepared, widths: Sequence[Width]) -> Report:
    return replace(account.report_of(prepared.before, (), prepared.gm, _notes(widths)), entries=())


def _pruned(prepared: Prepared, coupling: Coupling, spaces: Sequence[Space], removal: Removal) -> Pruned:
    args = prepared.args
    assert args is not None
    widths = tuple(_widths(spaces, removal))
    told = _report(prepared, widths)
    fixed = {}
    for node, channels in coupling.channels.items():
        reason = coupling.fixed.get(int(channels.sets[0])) if len(channels.sets) else None
        if reason is not None and node.op == "call_module":
            fixed[str(node.target)] = reason
    network, totals = finished(prepared, told, False), told.totals
    assert totals.macs_before is not None and totals.macs_after is not None
    return Pruned(
        network,
        widths,
        fixed,
        (totals.params_before, totals.params_after),
        (totals.macs_before, totals.macs_after),
        _change(prepared.original, network, args),
        removal.lost,
    )


def _widths(spaces: Sequence[Space], removal: Removal) -> Iterator[Width]:
    for space in spaces:
        gone, homes = (int(which[space.sets].sum()) for which in (removal.gone, removal.homes))
        sizes = [space.width * count for count in (len(space.sets), len(space.sets) - gone, homes)]
        yield Width(space.name, *sizes)


def _notes(widths: Sequence[Width]) -> tuple[str, ...]:
    before, after = (sum(getattr(width, name) for width in widths) for name in ("before", "after"))
    why = "" if after < before else ": no chunk of round_to channels that may go is within what was asked for"
    return (f"pruned: {before - after} of {before} channels are gone{why}",)


def _first(coupling: Coupling) -> str:
    reasons = sorted(set(coupling.fixed.values()))
    return reasons[0] if reasons else "it has no layer that mixes channels"


def _change(before: nn.Module, after: nn.Module, args: tuple[Any, ...]) -> float:
    """The largest difference of an output, by the largest number in that output."""
    with torch.no_grad():
        results = [pytree.tree_leaves(model(*args)) for model in (before, after)]
    pairs = [(a, b) for a, b in zip(*results, strict=True) if isinstance(a, Tensor)]
    changes = [float((a - b).abs().max() / (a.abs().max() or 1.0)) for a, b in pairs]
    return max(changes, default=math.nan)
