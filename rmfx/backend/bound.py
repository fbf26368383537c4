"""A graph of Dynamo whose weights are bound until they change."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rmfx.backend.admit import has_free_sizes
from rmfx.backend.inner import Freezing, Run, compile_bound, compile_later
from rmfx.backend.settings import Settings
from rmfx.backend.stamp import Stamp
from rmfx.errors import RmfxError
from rmfx.front.live import bind_weights, weight_inputs
from rmfx.report import report

logger = logging.getLogger("rmfx")
_MISSES = 4  # calls in a row, each with other weights, after which binding them is no more worth while


class Bound:
    """Calls the converted form of a graph, converted again whenever its weights are not what they were.

    Args:
        gm: a graph of Dynamo that is admitted; left untouched.
        settings: how to convert and compile it.
    """

    def __init__(self, gm: fx.GraphModule, settings: Settings) -> None:
        self._gm = gm
        self._settings = settings
        self._weights = weight_inputs(gm)
        self._has_free_sizes = has_free_sizes(gm)
        self._folded: tuple[Stamp, Run] | None = None  # one attribute, so that threads never see half of a change
        self._live: Run | None = None
        self._misses = 0
        self._freezing = Freezing(settings)  # decided once, for all weights to come

    def __call__(self, *args: Any) -> Any:
        """What the graph gives for ``args``, real inputs and weights in Dynamo's order."""
        if self._live is not None:
            return self._live(*args)
        folded = self._folded
        weights = [args[index] for index in self._weights]
        if folded is not None and folded[0].holds(weights):
            self._misses = 0
            return folded[1](*args)
        return self._fold(weights, args)(*args)

    def _fold(self, weights: Sequence[Tensor], args: tuple[Any, ...]) -> Run:
        self._misses += 1
        if self._misses > _MISSES:
            return self._give_up(f"its weights changed before each of {_MISSES} calls")
        self._folded = None  # free what it holds first
        stamp = Stamp.of(weights, by_hash=self._settings.check == "hash")
        try:
            run = self._converted(args)
        except RmfxError as error:
            return self._give_up(str(error))
        self._folded = stamp, run
        return run

    def _converted(self, args: tuple[Any, ...]) -> Run:
        gpus = {args[index].device for index in self._weights if args[index].is_cuda}
        # What is made here serves under no_grad, too; the random numbers of the caller stay as they are.
        held, read = bind_weights(self._gm, args)
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(gpus):
            module = self._settings.convert(held, tuple(args[index] for index in read))
        logger.info("rmfx: %s", report(module).summary())
        assert isinstance(module, fx.GraphModule)
        fixed = None if self._has_free_sizes else tuple(args[index] for index in read)
        compiled = compile_bound(module, self._settings, self._freezing, fixed)
        return lambda *args: compiled(*(args[index] for index in read))

    def _give_up(self, reason: str) -> Run:
        logger.warning("rmfx: a graph runs unconverted from now on, on weights as they are: %s", reason)
        self._folded, self._live = None, compile_later(self._gm, self._settings)
        return self._live
