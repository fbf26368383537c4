"""Cut a plain chain of layers into the stages of a pipeline, one per device.

Between two layers of a chain one tensor passes, so it can be cut anywhere. A residual network cannot: inside a block,
the block's input has to be sent on, too.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from itertools import accumulate
from math import inf

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rmfx.errors import RmfxError


def split(sequential: nn.Sequential, example_input: Tensor, stages: int) -> list[nn.Sequential]:
    """Cut a chain into stages of about equal work.

    Of all ways to cut, one in which the largest stage has the fewest MACs, and of these one that sends the least
    between stages. The layers are those of ``sequential``, not copies.

    Args:
        sequential: a chain, usually from :func:`rmfx.to_sequential`; run once.
        example_input: one input for it; its sizes matter, its values do not.
        stages: how many.

    Returns:
        chains that one after another compute what ``sequential`` computes, each a module for
        ``torch.distributed.pipelining.PipelineStage``. Layers keep the names they have in ``sequential``, so that its
        ``state_dict`` is all of theirs together.

    Raises:
        RmfxError: when ``sequential`` is no ``nn.Sequential``, or has fewer layers than ``stages``.

    >>> chain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 4)).eval()
    >>> [len(stage) for stage in split(chain, torch.zeros(1, 8), 2)]
    [1, 4]
    """
    if not isinstance(sequential, nn.Sequential):
        raise RmfxError(f"only an nn.Sequential can be split, not a {type(sequential).__name__}: see to_sequential")
    if not 1 <= stages <= len(sequential):
        raise RmfxError(f"{len(sequential)} layers cannot be split into {stages} stages")
    work, sent = _measure(sequential, example_input)
    cuts = _cuts(work, sent, stages)
    layers = list(sequential._modules.items())
    ends = zip((0, *cuts), (*cuts, len(layers)), strict=True)
    parts = [nn.Sequential(OrderedDict(layers[start:end])) for start, end in ends]
    for part in parts:
        part.training = sequential.training  # train() would reach into the shared layers
    return parts


def _measure(sequential: nn.Sequential, x: Tensor) -> tuple[list[int], list[int]]:
    """For each layer its FLOPs, and the bytes of its output."""
    work, sent = [], []
    for layer in sequential:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            x = layer(x)
        work.append(counter.get_total_flops())
        sent.append(x.numel() * x.element_size())
    return work, sent


def _cuts(work: list[int], sent: list[int], stages: int) -> tuple[int, ...]:
    """The layers with which stages begin, but for the first.

    >>> _cuts([4, 0, 4, 4], [8, 2, 8, 1], 2)
    (2,)
    """
    before = [0, *accumulate(work)]

    @cache
    def largest(end: int, stages: int) -> int:
        """The work of the largest stage, where the layers before ``end`` are split so that it is least."""
        if stages == 1:
            return before[end]
        return min(max(largest(cut, stages - 1), before[end] - before[cut]) for cut in range(stages - 1, end))

    bound = largest(len(work), stages)

    @cache
    def cheapest(end: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """The least that is sent where no stage has more work than ``bound``, and the cuts."""
        if stages == 1:
            return (0 if before[end] <= bound else inf), ()
        ways = [
            (cheapest(cut, stages - 1)[0] + sent[cut - 1], (*cheapest(cut, stages - 1)[1], cut))
            for cut in range(stages - 1, end)
            if before[end] - before[cut] <= bound
        ]
        return min(ways, default=(inf, ()))

    return cheapest(len(work), stages)[1]
