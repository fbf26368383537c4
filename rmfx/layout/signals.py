"""Which channels of a finished network are carried: read off its weights, level by level.

A *signal* is a value that is linear in the input of some layer, whatever activations stand behind that: a channel on
which they are the identity, or two channels ``phi(v)`` and ``phi(-v)`` whose difference is ``k * v``. A signal goes on
behind the next layer where a Dirac filter reads it there and nothing else. Everything is compared exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.bounds import Bounds, activation_bounds
from rmfx.algebra.narrow import gather
from rmfx.algebra.pointwise import EVERYTHING, NORMS, identity_range, is_pointwise, split_constant
from rmfx.algebra.rows import Rows, is_power_of_two
from rmfx.algebra.widened import is_identity_at
from rmfx.graph.bounds import acts_on_channels, bounds_of
from rmfx.graph.facts import module_of, range_of
from rmfx.graph.linear import dims_of
from rmfx.layout.stack import Step, negations_of
from rmfx.modules import ChannelClamp, MaskedActivation

NONE = -1


@dataclass(frozen=True, eq=False)
class Signals:
    """The signals behind one step, all ``[signals]``.

    Attributes:
        first, second: channels; ``second`` is -1 where one channel holds the value itself.
        split: the value is ``(h[first] - h[second]) / split``; 1 for single channels.
        kept: whether a pair was carried as the pair it was, by two Dirac filters (else it was split here).
        parent: the signal behind the step before that a Dirac filter reads here, or -1.
        gain: the value is ``gain`` times that of the parent.
    """

    first: Tensor
    second: Tensor
    split: Tensor
    kept: Tensor
    parent: Tensor
    gain: Tensor

    def chosen(self, index: Tensor) -> Signals:
        """Those at ``index``."""
        fields = (self.first, self.second, self.split, self.kept, self.parent, self.gain)
        return Signals(*(field[index] for field in fields))

    def at(self, channels: int) -> tuple[Tensor, Tensor]:
        """For every channel the signal that it holds, and the one of which it is the second half; -1 for none."""
        first, second = (torch.full((channels,), NONE) for _ in range(2))
        index = torch.arange(len(self.first))
        first[self.first] = index
        pairs = self.second >= 0
        second[self.second[pairs]] = index[pairs]
        return first, second


def signals_of(steps: Sequence[Step]) -> tuple[tuple[Signals, ...], Bounds]:
    """The signals behind each of ``steps``, and bounds of the channels behind the last one."""
    source = steps[0].layer.all_input_nodes[0]
    bounds = _bounds(source, steps[0])
    found: list[Signals] = []
    for step in steps:
        signals, bounds = advance(step, found[-1] if found else None, bounds)
        found.append(signals)
    return tuple(found), bounds


def advance(step: Step, before: Signals | None, bounds: Bounds) -> tuple[Signals, Bounds]:
    """The signals behind ``step``, given those in front of it and the bounds of the channels there."""
    rows = step.rows
    values = _row_bounds(step, bounds.expand(step.affine.in_channels))
    direct = torch.ones(step.affine.out_channels, dtype=torch.bool)
    for stage in step.stages:
        if stage.gate is not None:
            direct &= stage.gate.passes
            values = Bounds(*(torch.where(stage.gate.passes, end, worst) for end, worst in _ends(values)))
            continue
        module = module_of(stage.node)
        assert module is not None
        direct &= unchanged(module, values)
        values = activation_bounds(module, values)
    kept = _kept_pairs(rows, before, direct)
    constant, split = _split_pairs(step, ~direct)
    for p, q, _ in kept:
        direct[[p, q]] = False
    single = direct.nonzero().flatten().tolist()
    first = torch.tensor([*single, *(p for p, _ in split), *(p for p, _, _ in kept)], dtype=torch.long)
    second = torch.tensor([*[NONE] * len(single), *(q for _, q in split), *(q for _, q, _ in kept)], dtype=torch.long)
    parent, gain = (each[first] for each in _continued(rows, before, step.affine.in_channels))
    factor = torch.ones(len(first), dtype=torch.float64)
    factor[len(single) :] = constant
    pairs = torch.zeros(len(first), dtype=torch.bool)
    if kept and before is not None:
        carried, there = torch.tensor([signal for _, _, signal in kept]), slice(len(first) - len(kept), None)
        parent[there], gain[there], factor[there], pairs[there] = carried, 1.0, before.split[carried], True
    return Signals(first, second, factor, pairs, parent, gain), values


def _ends(values: Bounds) -> tuple[tuple[Tensor, float], ...]:
    return (values.low, EVERYTHING[0]), (values.high, EVERYTHING[1]), (values.rms, 1.0)


def unchanged(module: nn.Module, values: Bounds) -> Tensor:
    """The channels on which an activation changes no value within bounds of each, bool ``[C]``.

    >>> unchanged(nn.ReLU(), Bounds.of((torch.tensor([0.0, -1.0]), torch.tensor([1.0, 1.0])))).tolist()
    [True, False]
    """
    if isinstance(module, MaskedActivation):
        return ~module.mask.cpu() | unchanged(module.activation, values)
    if isinstance(module, ChannelClamp):
        return (module.low.cpu() <= values.low) & (values.high <= module.high.cpu())
    if isinstance(module, NORMS):
        return is_identity_at(module)
    inside = identity_range(module)
    same = torch.zeros_like(values.low, dtype=torch.bool)
    if inside is not None:
        same = (inside[0] <= values.low) & (values.high <= inside[1])
    return same | (module.weight.detach().cpu() == 1.0) if isinstance(module, nn.PReLU) else same


def _bounds(source: fx.Node, step: Step) -> Bounds:
    """Of the channels in front of the first step: from the layer that makes them, where a shift needs it from all."""
    dims = dims_of(step.layer)
    assert dims is not None
    if bool(((step.rows.column >= 0) & (step.rows.bias != 0)).any()):
        found = bounds_of(source, dims)
    else:
        found, module = Bounds.of(range_of(source)), module_of(source)
        if module is not None and is_pointwise(module) and acts_on_channels(module, dims):
            found = activation_bounds(module, Bounds.of(range_of(source.all_input_nodes[0]))).within(found)
    return found if found.low.numel() in (1, step.affine.in_channels) else found.hull()


def _row_bounds(step: Step, x: Bounds) -> Bounds:
    """Bounds of rows that read one channel by one tap, or what is not negative by no negative weights; not rounded."""
    rows = step.rows
    read = (rows.column >= 0) & (rows.partner < 0)
    column = rows.column.clamp(min=0)
    ends = torch.stack([rows.factor * end[column] for end in (x.low, x.high)])
    ends = torch.where(read, ends, 0.0)
    exact = is_power_of_two(rows.factor) | ((ends == 0) | ends.isinf()).all(0)
    low, high = (_outward(end, rows.bias, side) for end, side in ((ends.amin(0), -1), (ends.amax(0), 1)))
    known = rows.zero | (read & exact)
    above = torch.where(_sums_of_positives(step, x.low), rows.bias, EVERYTHING[0])
    return Bounds.of((torch.where(known, low, above), torch.where(known, high, EVERYTHING[1])))


def _sums_of_positives(step: Step, low: Tensor) -> Tensor:
    """The rows without weights below 0 that read no channel that may be."""
    affine, positive = step.affine, step.rows.positive
    if bool((low >= 0).all()) or not bool(positive.any()):
        return positive & bool((low >= 0).all())
    index = positive.nonzero().flatten()
    reads = gather(affine.weights()[0], affine.groups, index, (low < 0).nonzero().flatten())
    return positive.index_put((index,), ~(reads != 0).reshape(len(index), -1).any(1))


def _outward(end: Tensor, bias: Tensor, side: int) -> Tensor:
    """``end + bias``, and where that was rounded inwards the next number outwards."""
    total = end + bias
    part = total - end
    error = ((end - (total - part)) + (bias - part)).nan_to_num(0.0)
    return torch.where(error * side > 0, torch.nextafter(total, torch.full_like(total, side * torch.inf)), total)


def _continued(rows: Rows, before: Signals | None, channels: int) -> tuple[Tensor, Tensor]:
    """For every row the signal that it reads and nothing else, or -1, and by what factor."""
    if before is None or not len(before.first):
        return torch.full_like(rows.column, NONE), torch.zeros_like(rows.factor)
    first, second = before.at(channels)
    column, partner = rows.column.clamp(min=0), rows.partner.clamp(min=0)
    single = (rows.column >= 0) & (rows.partner < 0) & (before.second[first[column]] < 0)
    forward = (rows.partner >= 0) & (second[partner] == first[column])
    backward = (rows.partner >= 0) & (second[column] == first[partner]) & ~forward
    signal = torch.where(backward, second[column], first[column])
    gain = rows.factor * torch.where(backward, -1.0, 1.0)
    gain = torch.where(rows.partner >= 0, gain * before.split[signal], gain)
    read = (single | forward | backward) & (signal >= 0) & is_power_of_two(gain) & (rows.bias == 0)
    return torch.where(read, signal, NONE), torch.where(read, gain, 0.0)


def _kept_pairs(rows: Rows, before: Signals | None, direct: Tensor) -> list[tuple[int, int, int]]:
    """Pairs of rows that carry both halves of a pair as they are: (row of the first, of the second, signal)."""
    if before is None:
        return []
    plain = direct & (rows.column >= 0) & (rows.partner < 0) & (rows.factor == 1.0) & (rows.bias == 0)
    reader = dict(zip(rows.column[plain].tolist(), plain.nonzero().flatten().tolist(), strict=True))
    found = []
    for signal, (p, q) in enumerate(zip(before.first.tolist(), before.second.tolist(), strict=True)):
        if q >= 0 and p in reader and q in reader:
            found.append((reader[p], reader[q], signal))
    return found


def _split_pairs(step: Step, among: Tensor) -> tuple[float, list[tuple[int, int]]]:
    """Pairs of rows ``v`` and ``-v`` before an activation with ``phi(t) - phi(-t) = k * t``, and that ``k``."""
    module = module_of(step.stages[0].node) if len(step.stages) == 1 else None
    constant = split_constant(module) if module is not None else None
    if constant is None:
        return 1.0, []
    return constant, [(p, q) for p, q in negations_of(step.layer) if among[p] and among[q]]
