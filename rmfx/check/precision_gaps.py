"""What TF32 and the half types cost an original and its plain form, as numbers of their own.

Verification compares two networks in IEEE float64 and float32, where they are one function up to rounding. GPUs mostly
run them in less. There the plain network rounds in other places: what the original adds beside a convolution, it
carries through convolutions. Whether it ends up further from the truth depends on the precision, the network and its
inputs; this measures it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rmfx.check.compare import Inputs, in_dtype, is_floating, largest_error, run
from rmfx.check.layer_gaps import LayerGap, layer_gaps
from rmfx.check.precisions import DTYPES, Precision, precision
from rmfx.errors import UnsupportedModelError, VerificationError
from rmfx.inputs import as_tuple

_OVERFLOW = "overflow"  # how an error is written where a value is infinite or NaN


@dataclass(frozen=True)
class PrecisionGap:
    """The errors of both networks in one precision.

    Attributes:
        precision: its name.
        simulated: the device of the networks does not have it.
        original, plain: largest error over all outputs, each relative to the largest magnitude in the original's
            float64 output; infinite where an output is infinite or NaN; ``None`` where it could not be run.
        reason: why it could not.
        layers: the errors of each layer of the plain network, where they were asked for.
    """

    precision: str
    simulated: bool = False
    original: float | None = None
    plain: float | None = None
    reason: str | None = None
    layers: tuple[LayerGap, ...] = ()

    @property
    def ratio(self) -> float | None:
        """The error of the plain network divided by that of the original; ``None`` where that is not finite."""
        if self.original is None or self.plain is None or not self.original:
            return None
        return self.plain / self.original if math.isfinite(self.original + self.plain) else None

    def to_dict(self) -> dict[str, Any]:
        """The gap as JSON-able dictionaries; an infinite error is the text "overflow"."""
        plain = pytree.tree_map(lambda x: _OVERFLOW if x == math.inf else x, asdict(self))
        return {**plain, "ratio": self.ratio}


@dataclass(frozen=True)
class PrecisionGaps:
    """One :class:`PrecisionGap` per precision; prints as a table with a line for each, then those of the layers."""

    gaps: tuple[PrecisionGap, ...]

    def __getitem__(self, precision: str) -> PrecisionGap:
        """The gap of one precision, by name; a ``KeyError`` where it was not asked for."""
        return {gap.precision: gap for gap in self.gaps}[precision]

    def to_dict(self) -> dict[str, Any]:
        """All gaps as JSON-able dictionaries, by name."""
        return {gap.precision: gap.to_dict() for gap in self.gaps}

    def __str__(self) -> str:
        lines = [f"{'error in':<20}{'original':>10}{'plain':>10}{'ratio':>8}", *map(_line, self.gaps)]
        for gap in self.gaps:
            if gap.layers:
                lines += ["", *_layer_lines(gap)]
        return "\n".join(lines)


def precision_gaps(
    original: nn.Module,
    plain: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    precisions: Sequence[str] = tuple(DTYPES),
    per_layer: bool = False,
) -> PrecisionGaps:
    """Run both networks in each precision, where they are, and compare them with the original in float64.

    TF32 on a GPU that has it is that of cuDNN and cuBLAS; elsewhere it is simulated, and so marked
    (:mod:`rmfx.check.precisions`). The half types are those of the device. A precision in which a network cannot be
    run is a line with the reason. Each precision rounds the inputs first, and this is not counted as an error.

    Args:
        original, plain: modules on one device; both are copied, neither is changed.
        example_inputs, example_kwargs: as in :func:`rmfx.convert`, on that device. Their values matter: give inputs as
            the network gets them in use.
        precisions: names among "float64", "float32", "tf32", "bfloat16" and "float16".
        per_layer: also the errors at each layer of the plain network.

    Raises:
        VerificationError: when outputs differ in number or shape, or the original's are not finite in float64.
        UnsupportedModelError: when a network cannot be run in float64 on these inputs.
        RmfxError: for an unknown precision; with ``per_layer``, when ``plain`` is no ``GraphModule`` or the code of the
            original cannot be followed.

    >>> net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).eval()
    >>> precision_gaps(net, net, torch.ones(1, 2, 8, 8))["float32"].ratio
    1.0
    """
    inputs = (as_tuple(example_inputs), dict(example_kwargs or {}))
    device = next((x.device for x in (*original.parameters(), *original.buffers())), torch.device("cpu"))
    _demand_comparable(original, plain, inputs)
    wanted = [precision(name, device) for name in precisions]
    return PrecisionGaps(tuple(_gap(original, plain, inputs, each, per_layer) for each in wanted))


def _demand_comparable(original: nn.Module, plain: nn.Module, inputs: Inputs) -> None:
    truth, other = (_in_float64(model, inputs) for model in (original, plain))
    shapes = [[tuple(x.shape) for x in outputs] for outputs in (truth, other)]
    if shapes[0] != shapes[1]:
        raise VerificationError(f"the networks return different outputs, of shape {shapes[0]} and {shapes[1]}")
    if not _finite(truth):
        raise VerificationError("the original returns infinities or NaN in float64 on these inputs: give others")


def _in_float64(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    try:
        return run(in_dtype(model, torch.float64), inputs, torch.float64)
    except (RuntimeError, ValueError, AssertionError) as problem:
        raise UnsupportedModelError(
            f"a {type(model).__name__} cannot be run in float64 on these inputs ({_first_line(problem)}): give inputs "
            "that it takes, on its device; code that is bound to another dtype has no float64 truth"
        ) from problem


def _gap(original: nn.Module, plain: nn.Module, inputs: Inputs, chosen: Precision, per_layer: bool) -> PrecisionGap:
    rounded = pytree.tree_map(lambda x: x.to(chosen.dtype) if is_floating(x) else x, inputs)
    if not _finite(pytree.tree_leaves(rounded)):
        return PrecisionGap(chosen.name, chosen.simulated, reason=f"the inputs overflow in {chosen.name}")
    truth = run(in_dtype(original, torch.float64), rounded, torch.float64)
    errors = []
    for which, model in (("original", original), ("plain network", plain)):
        try:
            outputs = run(in_dtype(model, chosen.dtype), rounded, chosen.dtype, chosen.arithmetic)
        except RuntimeError as problem:  # an operator that the device lacks in this dtype, or code bound to another
            reason = f"the {which} cannot be run: {_first_line(problem)}"
            return PrecisionGap(chosen.name, chosen.simulated, reason=reason)
        errors.append(largest_error(outputs, truth))
    layers = layer_gaps(original, plain, rounded, chosen) if per_layer else ()
    return PrecisionGap(chosen.name, chosen.simulated, errors[0], errors[1], layers=layers)


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)


def _finite(values: list[Any]) -> bool:
    return all(bool(x.isfinite().all()) for x in values if isinstance(x, Tensor))


def _line(gap: PrecisionGap) -> str:
    name = f"{gap.precision} (simulated)" if gap.simulated else gap.precision
    if gap.reason is not None:
        return f"{name:<20}{gap.reason}"
    ratio = "-" if gap.ratio is None else f"{gap.ratio:.2f}"
    return f"{name:<20}{_shown(gap.original):>10}{_shown(gap.plain):>10}{ratio:>8}"


def _layer_lines(gap: PrecisionGap) -> list[str]:
    width = max(len(layer.layer) for layer in gap.layers) + 2
    header = f"{gap.precision:<{width}}{'own':>10}{'plain':>10}{'original':>10}"
    rows = ((layer.layer, layer.own, layer.plain, layer.original) for layer in gap.layers)
    return [header, *(f"{name:<{width}}" + "".join(f"{_shown(x):>10}" for x in errors) for name, *errors in rows)]


def _shown(error: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.1e}" if math.isfinite(error) else _OVERFLOW
