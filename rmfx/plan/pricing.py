"""The price of rewriting a place: estimated from shapes, and measured on the target where that can matter."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx, nn

from rmfx.measure.paired import compare
from rmfx.measure.runners import runner
from rmfx.measure.target import Target
from rmfx.plan.cache import Pair, PriceCache, place_of
from rmfx.plan.finish import laid_out
from rmfx.plan.piece import inputs_of, runnable, signature
from rmfx.plan.roofline import cost

OnStep = Callable[[str], None]  # told what is being measured

_HOPELESS = 1.3  # forms that the estimate finds so much slower are not measured
_BELIEVED = 1.5  # an estimate is not believed that more than so many times the arithmetic is faster
_PAIRS = 15


@dataclass(frozen=True)
class Priced:
    """Milliseconds of a place before and after rewriting it.

    ``after`` of a measured price is ``before`` where the difference is within the noise.
    """

    before: float
    after: float
    measured: bool = False

    @property
    def gain(self) -> float:
        """Milliseconds saved."""
        return self.before - self.after

    def on(self, before: float) -> Priced:
        """The same ratio on another time before: what was measured at different moments is put on one scale."""
        return Priced(before, before * self.after / self.before if self.before else before, self.measured)


class Pricer:
    """Prices places for one target.

    Args:
        target: where the network is to run.
        seconds: time that measuring may take in all; 0 to estimate only.
        cache: of measured prices.
        on_step: told what is measured next.
        channels_last: the layout of images to measure in.
    """

    def __init__(
        self,
        target: Target,
        seconds: float,
        cache: PriceCache,
        on_step: OnStep | None = None,
        *,
        channels_last: bool = False,
    ) -> None:
        self.target = target
        self.channels_last = channels_last
        self._cache = cache
        self._budget = seconds
        self._ends: float | None = None
        self._on_step = on_step
        self._place = place_of(target)
        self._known: dict[tuple[str, str], Priced] = {}

    @property
    def measures(self) -> bool:
        """Whether there is time left to measure; the clock starts at the first question."""
        if self._ends is None:
            self._ends = time.monotonic() + self._budget
        return time.monotonic() < self._ends

    def estimate(self, piece: fx.GraphModule) -> float:
        """Milliseconds by the roofline."""
        return 1e3 * cost(piece.graph.nodes, self.target).seconds

    def price(self, before: fx.GraphModule, after: fx.GraphModule) -> Priced:
        """What it saves to run ``after`` in the place of ``before``."""
        key = signature(before), signature(after)
        if key not in self._known:
            self._known[key] = self._price(before, after, key)
        return self._known[key]

    def _price(self, before: fx.GraphModule, after: fx.GraphModule, key: tuple[str, str]) -> Priced:
        first, second = cost(before.graph.nodes, self.target), cost(after.graph.nodes, self.target)
        estimated = Priced(1e3 * first.seconds, 1e3 * second.seconds)
        if second.macs > _BELIEVED * first.macs:  # a small kernel is far from the rate of its profile
            estimated = Priced(estimated.before, max(estimated.after, estimated.before))
        hopeless = estimated.after > _HOPELESS * estimated.before
        if not self._budget or hopeless or second.at_most(first):
            return estimated
        layout = "channels last" if self.channels_last else "contiguous"
        full = (*key, layout, self._place)
        pair = self._cache.get(full)
        if pair is None:
            pair = self._measure(before, after) if self.measures else None
            if pair is None:
                return estimated
            self._cache.put(full, pair)
        same = pair.low <= 1 <= pair.high
        return Priced(pair.before_ms, pair.before_ms * (1.0 if same else pair.ratio), True)

    def _measure(self, before: fx.GraphModule, after: fx.GraphModule) -> Pair | None:
        inputs = inputs_of(before)
        if inputs is None:
            return None
        if self._on_step is not None:
            self._on_step(outline(before))
        calls = []
        for piece in (before, after):
            made: nn.Module = runnable(piece)
            if self.channels_last:
                made, inputs = laid_out(made, inputs)
            calls.append(runner(made, inputs, self.target, draft=True))
        found = compare("piece", *calls, pairs=_PAIRS)
        return Pair(found.first_ms, found.ratio, *found.interval)


def outline(piece: fx.GraphModule) -> str:
    """A few words for people on what a piece is."""
    shapes = [tuple(node.meta["shape"]) for node in piece.graph.nodes if node.op == "placeholder"]
    layers = sum(node.op == "call_module" for node in piece.graph.nodes)
    return f"{layers} layers on {'x'.join(map(str, shapes[0]))}" if shapes else f"{layers} layers"
