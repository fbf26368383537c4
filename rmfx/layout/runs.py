"""Runs of carried channels: where they come from, through which layers they are carried, and where they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from rmfx.algebra.affine import Affine, Weights, compose, dirac, rounded
from rmfx.algebra.bounds import Bounds
from rmfx.algebra.grid import Grid
from rmfx.algebra.narrow import gather
from rmfx.algebra.rows import columns_read
from rmfx.layout.signals import Signals, advance, signals_of
from rmfx.layout.stack import Step, layer_map, stages_behind, steps_before


@dataclass(frozen=True, eq=False)
class Run:
    """Channels that enter a stack at its first layer and are merged by the layer behind its last one.

    Attributes:
        steps: of the stack; every layer but the first one carries the channels.
        last: the layer that merges them.
        ends: the signals in front of ``last``.
        starts: the same signals behind the first layer.
        gain: what they were multiplied by on the way.
    """

    steps: tuple[Step, ...]
    last: fx.Node
    ends: Signals
    starts: Signals
    gain: Tensor

    @property
    def channels(self) -> Tensor:
        """The carried channels in front of ``last``."""
        return torch.cat([self.ends.first, self.ends.second[self.ends.second >= 0]])

    @property
    def entry(self) -> Affine:
        """The map from the input of the first layer to the signals, at the positions in front of ``last``."""
        first = self.steps[0].affine
        stride = [1] * first.grid.dims
        for step in self.steps[1:]:
            stride = [a * b for a, b in zip(stride, step.affine.grid.stride, strict=True)]
        starts, everything = self.starts, torch.arange(first.in_channels)

        def compute() -> Weights:
            weight, bias = first.weights()
            rows = gather(weight, first.groups, starts.first, everything)
            offset = None if bias is None else bias[starts.first]
            if bool(starts.kept.any()):  # halves: their difference is the value
                factor = torch.where(starts.kept, starts.split, 1.0)
                second = torch.where(starts.kept, starts.second, 0)
                other = gather(weight, first.groups, second, everything)
                other = torch.where(_along_rows(starts.kept, other), other, 0.0)
                rows = (rows - other) / _along_rows(factor, rows)
                if bias is not None and offset is not None:
                    offset = (offset - torch.where(starts.kept, bias[second], 0.0)) / factor
            return rows, offset

        rows = replace(first, out_channels=len(starts.first), groups=1, compute=rounded(compute), stored=None)
        return compose(dirac(rows.out_channels, Grid.sampling(stride)), rows) if set(stride) - {1} else rows

    @property
    def exit(self) -> Affine:
        """The map from the signals to the output of ``last``, without its bias."""
        last, ends, gain = layer_map(self.last), self.ends, self.gain

        def compute() -> Weights:
            weight, _ = last.weights()
            columns = gather(weight, last.groups, torch.arange(last.out_channels), ends.first)
            factor = ends.split * gain
            return columns * factor.reshape(1, -1, *[1] * last.grid.dims), None

        return replace(last, in_channels=len(gain), groups=1, has_bias=False, compute=rounded(compute), stored=None)


def _along_rows(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))


def find_runs(last: fx.Node, patient: bool) -> tuple[Run, ...]:
    """The runs that ``last`` merges, from those that begin first; silent where there are none.

    Args:
        last: a convolution or linear layer of one input.
        patient: find none where ``last`` carries a channel on: a longer run ends behind it.
    """
    steps = steps_before(last)
    if not steps:
        return ()
    levels, bounds = signals_of(steps)
    top = levels[-1]
    if not len(top.first) or (patient and _goes_on(last, top, bounds)):
        return ()
    merged, feeds_one = _merged(last, top)
    level, signal, gain = _anchors(steps, levels, merged)
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, (at, which) in enumerate(zip(level.tolist(), signal.tolist(), strict=True)):
        rows, found = steps[at].rows, levels[at]
        row, kept = int(found.first[which]), bool(found.kept[which])
        tap = not kept and int(rows.column[row]) >= 0 and int(rows.partner[row]) < 0
        if at < len(steps) - 1 or tap or bool(feeds_one[index]) or (bool(rows.alone[row]) and not kept):
            groups.setdefault((at, tap), []).append(index)
    runs = []
    for (at, _), members in sorted(groups.items()):
        index = torch.tensor(members)
        starts = _chosen(levels[at], signal[index])
        runs.append(Run(steps[at:], last, _chosen(top, merged[index]), starts, gain[index]))
    return tuple(runs)


def _chosen(signals: Signals, index: Tensor) -> Signals:
    fields = ("first", "second", "split", "kept", "parent", "gain")
    return Signals(*(getattr(signals, field)[index] for field in fields))


def _goes_on(last: fx.Node, top: Signals, bounds: Bounds) -> bool:
    stages = stages_behind(last)
    if stages is None:
        return False
    behind, _ = advance(Step(last, stages), top, bounds)
    return bool((behind.parent >= 0).any())


def _merged(last: fx.Node, top: Signals) -> tuple[Tensor, Tensor]:
    """The signals that ``last`` reads as such, and which of them one row only reads."""
    affine = layer_map(last)
    weight, _ = affine.weights()
    rows = torch.arange(affine.out_channels)
    first, second = (
        gather(weight, affine.groups, rows, channels.clamp(min=0)).reshape(len(rows), len(channels), -1)
        for channels in (top.first, top.second)
    )
    alike = (first == -second).all(2).all(0) | (top.second < 0)
    read = (first != 0).any(2).sum(0)
    merged = (alike & (read > 0)).nonzero().flatten()
    return merged, read[merged] == 1


def _anchors(steps: Sequence[Step], levels: Sequence[Signals], merged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each signal enters: the level, its index there, and what it is multiplied by from there on.

    A channel in front of a layer is left behind for an earlier one only where nothing but carried channels reads it.
    """
    at, signal, gain = torch.full_like(merged, len(steps) - 1), merged.clone(), torch.ones(len(merged)).double()
    moving = torch.ones(len(merged), dtype=torch.bool)
    for level in range(len(steps) - 1, 0, -1):
        found, step, earlier = levels[level], steps[level], levels[level - 1]
        if not len(earlier.first) or not bool(moving.any()):
            break
        others = torch.ones(step.affine.out_channels, dtype=torch.bool)
        for channels in (found.first, found.second):
            mine = channels[signal[moving]]
            others[mine[mine >= 0]] = False
        read = columns_read(step.affine, others)
        for stage in steps[level - 1].stages:
            read = read | stage.gate.read if stage.gate is not None else read
        here = torch.where(moving, signal, 0)
        parent = found.parent[here]
        halves = [channels[parent.clamp(min=0)] for channels in (earlier.first, earlier.second)]
        free = ~read[halves[0]] & ~(read[halves[1].clamp(min=0)] & (halves[1] >= 0))
        moving = moving & (parent >= 0) & free
        gain = torch.where(moving, gain * found.gain[here], gain)
        signal = torch.where(moving, parent, signal)
        at = torch.where(moving, level - 1, at)
    return at, signal, gain
