"""Equality of an original and a converted network, on inputs chosen to expose a mistake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.exact import UnroundedCasts
from rmfx.check.compare import AMPLITUDE, Inputs, hostile_like, in_dtype, noise_floor, relative_difference, run
from rmfx.check.promised import keeping_promises
from rmfx.errors import RmfxError, UnsupportedModelError, VerificationError
from rmfx.front.doors import enter
from rmfx.inputs import as_tuple, bind
from rmfx.modules import SizeGuard
from rmfx.passes.normalise import normalise
from rmfx.report import report

TOLERANCE = 1e-12  # float64 rounding over some hundred layers, relative to the largest output
NOISE_FACTOR = 100.0  # ... or this many times the network's own noise floor, where that is larger
STORED_FACTOR = 10.0  # the same for weights stored in less than float64: each was rounded once, by half a unit
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
    args = () if example_inputs is None else as_tuple(example_inputs)
    tried = _inputs(args, example_kwargs or {}, seed, quick)
    for model in (original, converted):
        if not isinstance(model, nn.Module):
            raise RmfxError(f"verify compares two torch.nn.Module, not a {type(model).__name__}")
    unrounded = all(t.dtype == torch.float64 for t in converted.parameters() if t.is_floating_point())
    exact, other = in_dtype(original, torch.float64), in_dtype(converted, torch.float64)
    if value_ranges:
        tried = keeping_promises(exact, tried, (args, dict(example_kwargs or {})), value_ranges)
    worst, tolerance, compared = 0.0, TOLERANCE, []
    for index, inputs in enumerate(tried):
        try:
            truth = run(exact, inputs, torch.float64)
        except (RuntimeError, ValueError, AssertionError) as error:
            if index == 0:
                reason = str(error).strip().split("\n")[0]
                raise UnsupportedModelError(
                    f"the original cannot be run in float64 on inputs of the example's shape ({reason}): "
                    "give inputs that it takes, or verify=False where its code is bound to another dtype"
                ) from error
            continue  # another size or batch than the model allows
        if not any(bool(value.isfinite().any()) for value in truth) and any(value.numel() for value in truth):
            raise UnsupportedModelError(
                "all outputs of the original are infinite or NaN on the inputs that networks are compared on, normal "
                f"numbers with a deviation of {AMPLITUDE:g}: give value_ranges={{input: (low, high)}} between which "
                "they are not, or verify=False"
            )
        if index and _refuses_size(other, inputs):
            continue
        difference, tolerance = _compare(original, exact, other, inputs, truth, tolerance, seed, unrounded)
        worst = max(worst, difference)
        compared.append((inputs, truth))
    errors = (0.0, 0.0) if quick else _float32_errors(original, converted, compared)
    untested = _untested(other, *compared[0], tolerance) if probe else ()
    return Verification(worst, tolerance, *errors, tuple(_shape(inputs) for inputs, _ in compared), untested)


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
    return bool(sizes) and _shape(inputs)[-len(sizes) :] != sizes


def _compare(
    original: nn.Module,
    exact: nn.Module,
    other: nn.Module,
    inputs: Inputs,
    truth: list[Tensor],
    tolerance: float,
    seed: int,
    unrounded: bool,
) -> tuple[float, float]:
    """(difference, tolerance), or a VerificationError; ``unrounded``: the converted weights are stored in float64."""
    failure: RuntimeError | None = None
    try:
        difference = relative_difference(run(other, inputs, torch.float64), truth)
    except RuntimeError as error:
        difference, failure = float("inf"), error
    if difference > tolerance:
        factor = NOISE_FACTOR if unrounded else STORED_FACTOR
        tolerance = max(tolerance, factor * noise_floor(exact if unrounded else original, inputs, truth, seed))
    if difference > tolerance:
        difference = _difference_without_casts(exact, other, inputs)
    if difference > tolerance and failure is not None:
        reason = str(failure).strip().split("\n")[0]
        raise UnsupportedModelError(
            f"the converted network cannot be run in float64 ({reason}): its code is bound to another dtype; "
            "give verify=False, or a model in float64"
        ) from failure
    if difference > tolerance:
        raise VerificationError(
            f"the networks differ by {difference:.2e} of the largest output (tolerance {tolerance:.1e}) at input "
            f"{_shape(inputs)}, seed {seed}; {_first_difference(exact, other, inputs, tolerance)}"
        )
    return difference, tolerance


def _difference_without_casts(exact: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """The difference where casts in the code of both do not round; infinite where the code insists on a dtype."""
    try:
        with UnroundedCasts():
            truth, result = (run(model, inputs, torch.float64) for model in (exact, other))
    except RuntimeError:
        return float("inf")
    return relative_difference(result, truth)


def _shape(inputs: Inputs) -> tuple[int, ...]:
    return next((tuple(x.shape) for x in (*inputs[0], *inputs[1].values()) if isinstance(x, Tensor)), ())


def _float32_errors(
    original: nn.Module, converted: nn.Module, compared: list[tuple[Inputs, list[Tensor]]]
) -> tuple[float, float]:
    """Largest relative float32 error of each network; both see the inputs rounded to float32, and so does the truth."""
    single = [in_dtype(model, torch.float32) for model in (original, converted)]
    exact = in_dtype(original, torch.float64)
    errors = [0.0, 0.0]
    for (args, kwargs), _ in compared:
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


def _untested(converted: nn.Module, inputs: Inputs, truth: list[Tensor], tolerance: float) -> tuple[str, ...]:
    """Places where no carried tap can be changed so that the comparison fails."""
    if not isinstance(converted, fx.GraphModule):
        return ()
    removed = [entry for entry in report(converted).entries if entry.status == "removed" and entry.carrier]
    parameters = dict(converted.named_parameters())
    return tuple(
        entry.name
        for entry in removed
        if not any(_seen(converted, parameters[name], at, inputs, truth, tolerance) for name, at in entry.carried_taps)
    )


def _seen(
    converted: nn.Module,
    weight: nn.Parameter,
    tap: tuple[int, ...],
    inputs: Inputs,
    truth: list[Tensor],
    tolerance: float,
) -> bool:
    """Whether scaling one tap makes the comparison fail; the tap is put back."""
    with torch.no_grad():
        before = weight[tap].clone()
        weight[tap] = before * (1 + PROBE)
        try:
            return relative_difference(run(converted, inputs, torch.float64), truth) > tolerance
        finally:
            weight[tap] = before


def _first_difference(exact: nn.Module, other: nn.Module, inputs: Inputs, tolerance: float) -> str:
    """Names the first value that both networks compute and that differs."""
    if not isinstance(other, fx.GraphModule):
        return "the converted model is no GraphModule, so the layer cannot be named"
    try:
        reference = normalise(enter(exact, *inputs).gm)
    except RmfxError as error:
        return f"the layer cannot be named, since the original cannot be followed: {error}"
    wanted = {node.meta["origin"] for node in other.graph.nodes if "origin" in node.meta}
    theirs = _Recorder(reference, wanted)
    theirs.run(*bind(reference, *inputs))
    mine = _Recorder(other, wanted)
    mine.run(*bind(other, *inputs))
    for origin, (node, value) in mine.values.items():
        if origin not in theirs.values:
            continue
        difference = relative_difference([value], [theirs.values[origin][1]])
        if difference > tolerance:
            name = node.target if node.op == "call_module" else node.name
            return f"first at {name} (in place {node.meta.get('place', '')!r}), by {difference:.2e}"
    return "every layer that both share agrees up to the outputs"


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of nodes with a wanted origin."""

    def __init__(self, gm: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.values: dict[str, tuple[fx.Node, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        origin = n.meta.get("origin")
        if origin in self.wanted and isinstance(value, Tensor):
            self.values[origin] = (n, value.detach().clone())
        return value
