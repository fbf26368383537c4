"""Runs of carried channels: where they come from, through which layers they are carried, and where they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from rmfx.algebra.affine import Affine, Weights, compose, dirac, rounded
from rmfx.algebra.bounds import Bounds
from rmfx.algebra.grid import Grid
from rmfx.algebra.narrow import cheapest, gather
from rmfx.algebra.rows import columns_read
from rmfx.errors import InexactError
from rmfx.graph.linear import map_of
from rmfx.layout.signals import Signals, advance, signals_of
from rmfx.layout.stack import Step, stages_behind, steps_before


@dataclass(frozen=True, eq=False)
class Run:
    """Channels that enter a stack at its first layer and are merged by the layer behind its last one.

    Attributes:
        steps: of the stack.
        last: the layer that merges them.
        ends: the signals in front of ``last``.
        starts: the same signals behind the layer that makes them; the layers behind that one carry them.
        gain: what they were multiplied by since.
        inner: the run that is merged by the layer that makes them, where that is not the first: a projection that
            stands in the middle of the stack.
    """

    steps: tuple[Step, ...]
    last: fx.Node
    ends: Signals
    starts: Signals
    gain: Tensor
    inner: Run | None = None

    @property
    def channels(self) -> Tensor:
        """The carried channels in front of ``last``."""
        return torch.cat([self.ends.first, self.ends.second[self.ends.second >= 0]])

    @property
    def entry(self) -> Affine:
        """The map from the input of the first layer to the signals, at the positions in front of ``last``.

        Raises:
            InexactError: where it goes through two layers that both pad.
        """
        at = 0 if self.inner is None else len(self.inner.steps)
        rows = _rows(self.steps[at].affine if self.inner is None else self.inner.whole, self.starts)
        stride = [1] * rows.grid.dims
        for step in self.steps[at + 1 :]:
            stride = [a * b for a, b in zip(stride, step.affine.grid.stride, strict=True)]
        return compose(dirac(rows.out_channels, Grid.sampling(stride)), rows) if set(stride) - {1} else rows

    @property
    def exit(self) -> Affine:
        """The map from the signals to the output of ``last``, without its bias."""
        last, ends, gain = map_of(self.last), self.ends, self.gain

        def compute() -> Weights:
            weight, _ = last.weights()
            columns = gather(weight, last.groups, torch.arange(last.out_channels), ends.first)
            return columns * (ends.split * gain).reshape(1, -1, *[1] * last.grid.dims), None

        narrow = replace(last, in_channels=len(gain), groups=1, compute=rounded(compute), stored=None)
        return replace(narrow, has_bias=False)

    @property
    def whole(self) -> Affine:
        """What ``last`` makes of the signals, with its bias, as a map of the input of the first layer."""
        last, merged = map_of(self.last), cheapest(self.exit)

        def compute() -> Weights:
            return merged.weights()[0], last.weights()[1]

        return compose(replace(merged, has_bias=last.has_bias, compute=rounded(compute)), cheapest(self.entry))


def _rows(affine: Affine, signals: Signals) -> Affine:
    """The map to ``signals``: to one channel each, or to half the difference of two."""

    def compute() -> Weights:
        weight, bias = affine.weights()
        kept = signals.kept
        second, factor = torch.where(kept, signals.second, 0), torch.where(kept, signals.split, 1.0)
        everything = torch.arange(affine.in_channels)
        rows, others = (gather(weight, affine.groups, index, everything) for index in (signals.first, second))
        along = (-1, *[1] * (rows.dim() - 1))
        rows = (rows - others * kept.reshape(along)) / factor.reshape(along)
        return rows, None if bias is None else (bias[signals.first] - bias[second] * kept) / factor

    return replace(affine, out_channels=len(signals.first), groups=1, compute=rounded(compute), stored=None)


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
    if patient and _goes_on(last, levels[-1], bounds):
        return ()
    return _runs(steps, levels, last, torch.ones(map_of(last).out_channels, dtype=torch.bool))


def _runs(steps: Sequence[Step], levels: Sequence[Signals], last: fx.Node, rows: Tensor) -> tuple[Run, ...]:
    """The runs that the output channels ``rows`` of ``last`` merge."""
    top = levels[-1]
    merged, feeds_one = _merged(last, top, rows)
    level, signal, gain = _anchors(steps, levels, merged)
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, (at, which) in enumerate(zip(level.tolist(), signal.tolist(), strict=True)):
        read, found = steps[at].rows, levels[at]
        row, kept = int(found.first[which]), bool(found.kept[which])
        tap = not kept and int(read.column[row]) >= 0 and int(read.partner[row]) < 0
        if at < len(steps) - 1 or tap or bool(feeds_one[index]) or (bool(read.alone[row]) and not kept):
            groups.setdefault((at, tap), []).append(index)
    runs = []
    for (at, tap), members in sorted(groups.items()):
        among = torch.tensor(members)
        starts = levels[at].chosen(signal[among])
        run = Run(tuple(steps[at:]), last, top.chosen(merged[among]), starts, gain[among])
        runs.append(run if tap or not at else _prolonged(run, steps, levels, at))
    return tuple(sorted(runs, key=lambda run: -len(run.steps)))


def _prolonged(run: Run, steps: Sequence[Step], levels: Sequence[Signals], at: int) -> Run:
    """``run`` from further back, where its first layer makes the signals of what only it reads, and is carried too."""
    step = steps[at]
    rows = _marked(run.starts, step.affine.out_channels)
    read = columns_read(step.affine, rows)
    others = columns_read(step.affine, ~rows)
    for stage in steps[at - 1].stages:
        others = others | stage.gate.read if stage.gate is not None else others
    if bool((read & (others | ~_marked(levels[at - 1], step.affine.in_channels))).any()):
        return run
    inner = _runs(steps[:at], levels[:at], step.layer, rows)
    if len(inner) != 1 or not torch.equal(_marked(inner[0].ends, len(read)), read):
        return run
    longer = replace(run, steps=(*inner[0].steps, *run.steps), inner=inner[0])
    return longer if _is_exact(longer) else run


def _is_exact(run: Run) -> bool:
    try:
        return run.entry is not None
    except InexactError:  # two layers that pad, one behind the other
        return False


def _marked(signals: Signals, channels: int) -> Tensor:
    """The channels that hold ``signals``, bool ``[channels]``."""
    first, second = signals.at(channels)
    return (first >= 0) | (second >= 0)


def _goes_on(last: fx.Node, top: Signals, bounds: Bounds) -> bool:
    """Whether a row of ``last`` that makes a signal again reads signals only."""
    stages = stages_behind(last)
    if stages is None or not len(top.first):
        return False
    step = Step(last, stages)
    behind, _ = advance(step, top, bounds)
    affine = step.affine
    weight, _ = affine.weights()
    signals = _marked(top, affine.in_channels).reshape(affine.groups, 1, -1)
    used = (weight != 0).reshape(affine.groups, affine.out_channels // affine.groups, weight.shape[1], -1).any(3)
    only = (used.any(2) & ~(used & ~signals).any(2)).reshape(-1)
    return bool((only & _marked(behind, affine.out_channels)).any())


def _merged(last: fx.Node, top: Signals, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The signals that ``rows`` of ``last`` read as such, and which of them one row only reads."""
    affine = map_of(last)
    height, width = affine.out_channels // affine.groups, affine.in_channels // affine.groups
    weight = affine.weights()[0].reshape(affine.groups, height, width, -1) * rows.reshape(affine.groups, -1, 1, 1)
    columns = weight.transpose(1, 2).flatten(0, 1)  # [channel, row of its group, tap]
    read = (columns != 0).any(2).sum(1)
    first, second, pair = top.first, top.second.clamp(min=0), top.second >= 0
    alike = ~pair
    alike[pair] = (columns[first[pair]] == -columns[second[pair]]).all(2).all(1) & (
        (first // width == second // width)[pair]
    )
    merged = (alike & (read[first] > 0)).nonzero().flatten()
    return merged, read[first[merged]] == 1


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
        read = columns_read(step.affine, ~_marked(found.chosen(signal[moving]), step.affine.out_channels))
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
