"""Equality of an original and a converted network, on inputs chosen to expose a mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rmfx.check.compare import AMPLITUDE, Inputs, hostile_like, in_dtype, is_floating, relative_difference, run
from rmfx.check.difference import Pair, shape_of_inputs
from rmfx.check.promised import keeping_promises
from rmfx.errors import RmfxError, UnsupportedModelError
from rmfx.inputs import without_absent
from rmfx.modules import SizeGuard
from rmfx.report import report
from rmfx.untouched import leaves_untouched

SMALLER = (1 / 8, 1 / 64, 1 / 512)  # inputs on which a network is compared that amplifies rounding on larger ones
PROBE = 1e-6  # relative change of one carried tap that every comparison must see


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Attributes:
        difference: largest relative difference in float64, over all inputs tried.
        tolerance: what it was held against.
        float32_original, float32_converted: largest relative error of each in float32 against the float64 truth.
        sizes: shapes of the first tensor input of every comparison.
        untested: places whose carried taps could be changed without the comparison seeing it (dead channels).
    """

    difference: float
    tolerance: float
    float32_original: float
    float32_converted: float
    sizes: tuple[tuple[int, ...], ...]
    untested: tuple[str, ...] = ()

    @property
    def float32_ratio(self) -> float:
        """Float32 error of the converted network divided by that of the original."""
        return self.float32_converted / self.float32_original if self.float32_original else float("nan")

    def __str__(self) -> str:
        text = (
            f"equal: float64 difference {self.difference:.1e} (tolerance {self.tolerance:.1e}), float32 error "
            f"{self.float32_converted:.1e} against {self.float32_original:.1e} of the original, "
            f"{len(self.sizes)} inputs"
        )
        return text + (f"; not exercised by these inputs: {', '.join(self.untested)}" if self.untested else "")


@leaves_untouched
def verify(
    original: nn.Module,
    converted: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    value_ranges: Mapping[str, Any] | None = None,
    seed: int = 0,
    quick: bool = False,
    probe: bool = False,
) -> Verification:
    """Compare two networks in float64 on signed inputs well beyond +-6, and their float32 errors.

    Args:
        original, converted: modules; both are copied, neither is changed.
        example_inputs, example_kwargs: as in :func:`rmfx.convert`; shapes matter, values do not.
        value_ranges: what the conversion was told of values (:func:`rmfx.convert`): inputs are drawn such that it
            holds. Where it does not hold for inner values then, the example inputs themselves are compared on.
        seed: of the random inputs.
        quick: one float64 comparison at the example's shape only.
        probe: also scale one carried tap of every removed connection by ``1 + 1e-6`` and see that the comparison
            fails; places where it does not are reported as untested.

    Raises:
        VerificationError: when outputs differ beyond rounding; names the first surviving layer that does.
        UnsupportedModelError: when the original cannot run on such inputs at all.
        RmfxError: when ``value_ranges`` do not hold on the example inputs either.

    >>> net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).eval()
    >>> verify(net, net, torch.zeros(1, 2, 8, 8)).difference
    0.0
    """
    given, kwargs = without_absent(original, example_inputs, example_kwargs or {})
    args = given or ()
    tried = _inputs(args, kwargs, seed, quick)
    for model in (original, converted):
        if not isinstance(model, nn.Module):
            raise RmfxError(f"verify compares two torch.nn.Module, not a {type(model).__name__}")
    pair = Pair(original, converted)
    if value_ranges:
        tried = keeping_promises(pair.exact, tried, (args, kwargs), value_ranges)
    worst, tolerance, compared = 0.0, 0.0, []
    for index, inputs in enumerate(tried):
        truth = _truth_if_taken(pair, inputs) if index else _truth(pair, inputs)
        if truth is None:
            continue
        found = _compare(pair, inputs, truth, seed, () if value_ranges else SMALLER)
        worst, tolerance = max(worst, found.difference), max(tolerance, found.tolerance)
        compared.append(found)
    errors = (0.0, 0.0) if quick else _float32_errors(original, converted, [one.inputs for one in compared])
    untested = _untested(pair.other, compared[0]) if probe else ()
    return Verification(worst, tolerance, *errors, tuple(shape_of_inputs(one.inputs) for one in compared), untested)


@dataclass(frozen=True)
class _Compared:
    """One comparison that went well."""

    inputs: Inputs
    truth: list[Tensor]
    difference: float
    tolerance: float


def _compare(pair: Pair, inputs: Inputs, truth: list[Tensor], seed: int, smaller: Sequence[float]) -> _Compared:
    """The comparison on ``inputs``, or on the largest ``smaller`` ones on which rounding does not drown it."""
    if (found := pair.compare(inputs, truth, seed)) is not None:
        return _Compared(inputs, truth, *found)
    for factor in smaller:
        scaled = pytree.tree_map(lambda x, factor=factor: x * factor if is_floating(x) else x, inputs)
        truth = _truth(pair, scaled)
        if (found := pair.compare(scaled, truth, seed)) is not None:
            return _Compared(scaled, truth, *found)
    raise UnsupportedModelError(
        "the networks cannot be compared: one unit in the last place of the weights moves the outputs by so much that "
        "a mistake could hide behind it. Give inputs on which that is not so, with value_ranges, or verify=False"
    )


def _truth_if_taken(pair: Pair, inputs: Inputs) -> list[Tensor] | None:
    """What the original gives, or ``None`` where inputs of this batch and size are not taken, or tell nothing."""
    try:
        truth = run(pair.exact, inputs, torch.float64)
    except (RuntimeError, ValueError, AssertionError):
        return None
    return truth if _is_somewhere_finite(truth) and not _refuses_size(pair.other, inputs) else None


def _truth(pair: Pair, inputs: Inputs) -> list[Tensor]:
    """What the original gives, on inputs that it must take, and of which it must make something finite."""
    try:
        truth = run(pair.exact, inputs, torch.float64)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedModelError(
            f"the original cannot be run in float64 on inputs of the example's shape ({reason}): "
            "give inputs that it takes, or verify=False where its code is bound to another dtype"
        ) from error
    if not _is_somewhere_finite(truth):
        raise UnsupportedModelError(
            "all outputs of the original are infinite or NaN on the inputs that networks are compared on, normal "
            f"numbers with a deviation of {AMPLITUDE:g}: give value_ranges={{input: (low, high)}} between which "
            "they are not, or verify=False"
        )
    return truth


def _is_somewhere_finite(outputs: list[Tensor]) -> bool:
    """Whether one number of ``outputs`` is finite, or there are none."""
    return any(bool(value.isfinite().any()) for value in outputs) or not any(value.numel() for value in outputs)


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int, quick: bool) -> list[Inputs]:
    """The example's own shape first, then other batches, and sizes of both parities."""
    if not args and not kwargs:
        raise RmfxError("verify needs example_inputs")
    batch = next((int(x.shape[0]) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 1), 1)
    first = hostile_like(args, kwargs, seed, batch)
    if quick:
        return [first]
    more = [(batch + 1, 0), (2, 1), (2, 2)]
    return [first, *(hostile_like(args, kwargs, seed + 1 + i, b, grow) for i, (b, grow) in enumerate(more))]


def _refuses_size(converted: nn.Module, inputs: Inputs) -> bool:
    """Whether the network says itself that it was converted for other sizes."""
    sizes = next((module.sizes for module in converted.modules() if isinstance(module, SizeGuard)), ())
    return bool(sizes) and shape_of_inputs(inputs)[-len(sizes) :] != sizes


def _float32_errors(original: nn.Module, converted: nn.Module, compared: list[Inputs]) -> tuple[float, float]:
    """Largest relative float32 error of each network; both see the inputs rounded to float32, and so does the truth."""
    single = [in_dtype(model, torch.float32) for model in (original, converted)]
    exact = in_dtype(original, torch.float64)
    errors = [0.0, 0.0]
    for args, kwargs in compared:
        rounded = _rounded((args, kwargs))
        truth = run(exact, rounded, torch.float64)
        for index, model in enumerate(single):
            errors[index] = max(errors[index], relative_difference(run(model, rounded, torch.float32), truth))
    return errors[0], errors[1]


def _rounded(inputs: Inputs) -> Inputs:
    def once(x: Any) -> Any:
        return x.float().double() if isinstance(x, Tensor) and x.is_floating_point() else x

    args, kwargs = inputs
    return tuple(once(x) for x in args), {name: once(x) for name, x in kwargs.items()}


def _untested(converted: nn.Module, compared: _Compared) -> tuple[str, ...]:
    """Places where no carried tap can be changed so that the comparison fails."""
    if not isinstance(converted, fx.GraphModule):
        return ()
    removed = [entry for entry in report(converted).entries if entry.status == "removed" and entry.carrier]
    parameters = dict(converted.named_parameters())
    return tuple(
        entry.name
        for entry in removed
        if not any(_seen(converted, parameters[name], at, compared) for name, at in entry.carried_taps)
    )


def _seen(converted: nn.Module, weight: nn.Parameter, tap: tuple[int, ...], compared: _Compared) -> bool:
    """Whether scaling one tap makes the comparison fail; the tap is put back."""
    with torch.no_grad():
        before = weight[tap].clone()
        weight[tap] = before * (1 + PROBE)
        try:
            moved = run(converted, compared.inputs, torch.float64)
            return relative_difference(moved, compared.truth) > compared.tolerance
        finally:
            weight[tap] = before
