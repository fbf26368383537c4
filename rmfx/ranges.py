"""Value ranges measured on data, for carriers that need bounds which nothing proves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rmfx.copying import deep_copy
from rmfx.errors import RmfxError
from rmfx.graph.bounds import value_name
from rmfx.inputs import as_tuple
from rmfx.prepare import prepare


def bounds_from_data(
    model: nn.Module, batches: Iterable[Any], *, margin: float = 0.25
) -> dict[str, tuple[float, float]]:
    """The range of every value of ``model`` on data, widened by ``margin``: pass it to ``convert(value_ranges=...)``.

    Unlike everything else rmfx relies on, such ranges are measured and not proven: a conversion that uses them
    (``carrier="shift"``) is exact on inputs whose values stay within them, and on no others.

    Args:
        model: in eval mode; not changed. It runs in float64.
        batches: tensors, or tuples of positional inputs.
        margin: what is added at both ends, as a part of the width of the interval.

    Returns:
        ``{name of an input or a node: (low, high)}``; edit it, or keep the part of it that you know to hold.

    Raises:
        RmfxError: when ``batches`` is empty, or a value is not finite.
        UnsupportedModelError, TraceError, NormalFormError: as for :func:`rmfx.convert`.

    >>> model = nn.Sequential(nn.ReLU(), nn.Hardtanh()).eval()
    >>> bounds_from_data(model, [torch.tensor([[-2.0, 4.0]])], margin=0.5)["_0"]
    (-2.0, 6.0)
    """
    if not margin >= 0:
        raise RmfxError(f"margin must not be negative, got {margin!r}")
    exact = deep_copy(model).double()
    recorder: _Recorder | None = None
    with torch.no_grad():
        for batch in batches:
            inputs = pytree.tree_map_only(Tensor, _in_float64, as_tuple(batch))
            if recorder is None:
                recorder = _Recorder(prepare(exact, inputs, {}).gm)
            recorder.run(*inputs)
    if recorder is None:
        raise RmfxError("bounds_from_data needs at least one batch")
    for name, ends in recorder.ranges.items():
        if not all(map(math.isfinite, ends)):
            raise RmfxError(f"{name} is not finite on these data")
    return {
        name: (low - margin * (high - low), high + margin * (high - low))
        for name, (low, high) in recorder.ranges.items()
    }


def _in_float64(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the smallest and the largest element of every value, by the name of its node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.ranges: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            low, high = (float(end) for end in value.aminmax())
            name = value_name(n)
            before = self.ranges.get(name, (low, high))
            self.ranges[name] = min(low, before[0]), max(high, before[1])
        return value
