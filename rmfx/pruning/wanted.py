"""What is to go from a network, as its user says it, and the removal that this asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rmfx.errors import RmfxError
from rmfx.measure.target import Target
from rmfx.pruning import choose
from rmfx.pruning.coupling import Coupling
from rmfx.pruning.removal import Removal, settle
from rmfx.pruning.spaces import Costs, Space

Latency = Callable[[Removal, Target], float]  # measures, in milliseconds, what a removal leaves

_TIGHTER = 0.995  # each time that constants which stay make a network miss its budget
_FINENESS = 64  # a latency is met to this part of all that may go


@dataclass(frozen=True, eq=False)
class Ranked:
    """A network whose sets of channels have scores.

    Attributes:
        gm: in normal form.
        coupling, spaces, costs: of it.
        scores: of every set, float64 ``[count]``.
    """

    gm: fx.GraphModule
    coupling: Coupling
    spaces: tuple[Space, ...]
    costs: Costs
    scores: Tensor

    def macs_after(self, removal: Removal) -> float:
        """MACs per sample that are left."""
        return self.costs.macs([int((~removal.gone[space.sets]).sum()) for space in self.spaces])


@dataclass(frozen=True)
class Wanted:
    """Arguments of :func:`rmfx.prune` of the same names.

    Raises:
        RmfxError: when they make no sense.
    """

    amount: float | None
    threshold: float | None
    budget: Mapping[str, Any] | None
    scope: str
    per_mac: bool
    round_to: int
    keep_constants: bool

    def __post_init__(self) -> None:
        given = [x for x in (self.amount, self.threshold, self.budget) if x is not None]
        if len(given) != 1:
            raise RmfxError(f"give one of amount, threshold and budget, got {len(given)} of them")
        for name, value in (("amount", self.amount), ("threshold", self.threshold)):
            if value is not None and not _is_number(value):
                raise RmfxError(f"{name} must be a number, got {value!r}")
        if self.amount is not None and not 0 <= self.amount < 1:
            raise RmfxError(f"amount is a part of all channels, from 0 to less than 1, got {self.amount}")
        if self.budget is not None and not _is_budget(self.budget):
            raise RmfxError(
                "budget must be {'macs': part}, a part above 0 and up to 1, or {'latency_ms': number, 'target': "
                f"'onnxruntime'}}, got {self.budget!r}"
            )
        if self.scope not in ("global", "layer"):
            raise RmfxError(f"scope must be 'global' or 'layer', got {self.scope!r}")
        if self.scope == "layer" and self.amount is None:
            raise RmfxError("scope='layer' is for amount: of every layer so much")
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise RmfxError(f"round_to must be at least 1, and a whole number, got {self.round_to!r}")

    def removal(self, network: Ranked, latency: Latency) -> Removal:
        """What goes from ``network``.

        Raises:
            RmfxError: when a budget cannot be met.
        """
        count = network.coupling.count
        if self.threshold is not None:
            dropped = choose.by_threshold(network.scores, network.spaces, self.threshold, self.round_to, count)
        elif self.amount is not None and self.scope == "layer":
            dropped = choose.by_amount_of_each(network.scores, network.spaces, self.amount, self.round_to, count)
        elif self.amount is not None:
            channels = sum(space.width * len(space.sets) for space in network.spaces)
            dropped = choose.by_amount(self._steps(network), self.amount * channels, count)
        else:
            assert self.budget is not None
            return self._within_macs(network) if "macs" in self.budget else self._within_latency(network, latency)
        return self._settled(network, dropped)

    def _steps(self, network: Ranked) -> list[choose.Step]:
        return list(choose.removals(network.scores, network.spaces, network.costs, self.round_to, per_mac=self.per_mac))

    def _within_macs(self, network: Ranked) -> Removal:
        assert self.budget is not None
        steps, before = self._steps(network), network.costs.macs()
        limit = goal = self.budget["macs"] * before
        while True:
            dropped, left = choose.by_macs(steps, before, goal, network.coupling.count)
            if left > goal:
                part = f"{self.budget['macs']:g} of the MACs"
                raise RmfxError(f"the budget is {part}; with all gone that may, {left / before:.3g} stay")
            removal = self._settled(network, dropped)
            if network.macs_after(removal) <= limit:
                return removal
            goal = min(goal, left) * _TIGHTER

    def _within_latency(self, network: Ranked, latency: Latency) -> Removal:
        """The fewest steps that are fast enough, by bisection."""
        assert self.budget is not None
        limit, target = float(self.budget["latency_ms"]), Target.of(self.budget["target"])
        steps = self._steps(network)

        def after(count: int) -> tuple[Removal, float]:
            dropped = torch.zeros(network.coupling.count, dtype=torch.bool)
            for step in steps[:count]:
                dropped[step.sets] = True
            removal = self._settled(network, dropped)
            return removal, latency(removal, target)

        slow, fast = 0, len(steps)
        best, measured = after(fast)
        if measured > limit:
            told = f"with all gone that may, it takes {measured:.3g} ms"
            raise RmfxError(f"the budget is {limit:g} ms on {target}; {told}")
        while fast - slow > max(1, len(steps) // _FINENESS):
            middle = (slow + fast) // 2
            removal, measured = after(middle)
            if measured <= limit:
                fast, best = middle, removal
            else:
                slow = middle
        return best

    def _settled(self, network: Ranked, dropped: Tensor) -> Removal:
        """The removal; channels that stay as constants take the places of the worst others: widths stay multiples.

        With others gone, other constants may be needed: repeated until their number is the one reckoned with.
        """
        reckoned = [0] * len(network.spaces)
        tried = [reckoned]
        while True:
            more = dropped.clone()
            for space, count in zip(network.spaces, reckoned, strict=True):
                left = space.sets[~dropped[space.sets]]
                if len(left) > count:
                    more[left[network.scores[left].argsort(stable=True)[:count]]] = True
            removal = settle(network.gm, network.coupling, more, keep_constants=self.keep_constants)
            found = [int(removal.homes[space.sets].sum()) for space in network.spaces]
            if self.round_to == 1 or found in tried:
                return removal
            tried.append(found)
            reckoned = found


def _is_budget(budget: object) -> bool:
    if not isinstance(budget, Mapping):
        return False
    if set(budget) == {"macs"}:
        return _is_number(budget["macs"]) and 0 < budget["macs"] <= 1
    return set(budget) == {"latency_ms", "target"} and _is_number(budget["latency_ms"]) and budget["latency_ms"] > 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
