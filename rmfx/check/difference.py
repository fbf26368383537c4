"""How far two networks are apart on one input, and what that is held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.exact import UnroundedCasts
from rmfx.check.compare import Inputs, in_dtype, noise_floor, relative_difference, run
from rmfx.errors import RmfxError, UnsupportedModelError, VerificationError
from rmfx.front.doors import enter
from rmfx.inputs import bind
from rmfx.passes.normalise import normalise

TOLERANCE = 1e-12  # float64 rounding over some hundred layers, relative to the largest output
NOISE_FACTOR = 100.0  # ... or this many times the network's own noise floor, where that is larger
STORED_FACTOR = 10.0  # the same for weights stored in less than float64: each was rounded once, by half a unit
MOST_TOLERANCE = 1e-2  # beyond it a comparison proves nothing
MOST_TOLERANCE_OF_HALF = 1.0  # of weights stored in float16 or bfloat16: one unit there is up to a hundredth


class Pair:
    """Two networks to be compared.

    Args:
        original, converted: both are copied, neither is changed.

    Attributes:
        exact, other: copies of both in float64.
    """

    def __init__(self, original: nn.Module, converted: nn.Module) -> None:
        self.original, self.converted = original, converted
        self.exact, self.other = in_dtype(original, torch.float64), in_dtype(converted, torch.float64)
        stored = {t.dtype for t in converted.parameters() if t.is_floating_point()}
        self._unrounded = stored <= {torch.float64}
        coarse = any(torch.finfo(dtype).bits < 32 for dtype in stored)
        self._most = MOST_TOLERANCE_OF_HALF if coarse else MOST_TOLERANCE

    def compare(self, inputs: Inputs, truth: list[Tensor], seed: int) -> tuple[float, float] | None:
        """(difference, what is tolerated), or ``None`` where rounding alone moves the outputs too far to compare them.

        Args:
            truth: what the original gives for ``inputs``, in float64.

        Raises:
            VerificationError: when the difference is larger; names the first surviving layer that differs.
        """
        try:
            result = run(self.other, inputs, torch.float64)
        except RuntimeError as error:
            return self._without_rounding(inputs, error)
        for before, after in zip(truth, result, strict=False):
            if before.dtype != after.dtype:
                raise VerificationError(f"an output is of {after.dtype}, that of the original of {before.dtype}")
        difference, tolerance = relative_difference(result, truth), TOLERANCE
        if difference > tolerance:
            factor, model = (NOISE_FACTOR, self.exact) if self._unrounded else (STORED_FACTOR, self.original)
            tolerance = max(tolerance, factor * noise_floor(model, inputs, truth, seed))
        if difference > tolerance:
            difference = min(difference, self._difference_of_code(inputs))
        if tolerance > self._most:
            return None
        if difference > tolerance:
            raise VerificationError(
                f"the networks differ by {difference:.2e} of the largest output (tolerance {tolerance:.1e}) at input "
                f"{shape_of_inputs(inputs)}, seed {seed}; {self._first_difference(inputs, tolerance)}"
            )
        return difference, tolerance

    def _without_rounding(self, inputs: Inputs, failure: RuntimeError) -> tuple[float, float]:
        """The comparison of networks of which one insists on another type than float64."""
        if (difference := self._difference_of_code(inputs)) <= TOLERANCE:
            return difference, TOLERANCE
        reason = str(failure).strip().split("\n")[0]
        own = next((p.dtype for p in self.converted.parameters() if p.is_floating_point()), torch.float32)
        try:
            run(in_dtype(self.converted, own), inputs, own)
        except RuntimeError as error:
            raise VerificationError(f"the converted network cannot be run ({reason})") from error
        raise UnsupportedModelError(
            f"the converted network cannot be run in float64 ({reason}): its code is bound to another dtype; "
            "give verify=False, or a model in float64"
        ) from failure

    def _difference_of_code(self, inputs: Inputs) -> float:
        """The difference where neither casts round nor new tensors of the code are of float64 in the original alone."""
        return min(self._difference_without_casts(inputs), self._difference_with_constants_as_they_are(inputs))

    def _difference_without_casts(self, inputs: Inputs) -> float:
        """The difference where casts in the code of both do not round; infinite where the code insists on a dtype."""
        try:
            with UnroundedCasts():
                truth, result = (run(model, inputs, torch.float64) for model in (self.exact, self.other))
        except RuntimeError:
            return float("inf")
        return relative_difference(result, truth)

    def _difference_with_constants_as_they_are(self, inputs: Inputs) -> float:
        """The difference where what code makes (``torch.tensor(0.1)``) is rounded as it was when it was traced."""
        made = torch.get_default_dtype()
        try:
            truth, result = (run(model, inputs, torch.float64, made=made) for model in (self.exact, self.other))
        except RuntimeError:
            return float("inf")
        return relative_difference(result, truth)

    def _first_difference(self, inputs: Inputs, tolerance: float) -> str:
        """Names the first value that both networks compute and that differs."""
        if not isinstance(self.other, fx.GraphModule):
            return "the converted model is no GraphModule, so the layer cannot be named"
        try:
            reference = normalise(enter(self.exact, *inputs).gm)
        except RmfxError as error:
            return f"the layer cannot be named, since the original cannot be followed: {error}"
        wanted = {node.meta["origin"] for node in self.other.graph.nodes if "origin" in node.meta}
        theirs = _Recorder(reference, wanted)
        theirs.run(*bind(reference, *inputs))
        mine = _Recorder(self.other, wanted)
        mine.run(*bind(self.other, *inputs))
        for origin, (node, value) in mine.values.items():
            if origin not in theirs.values:
                continue
            difference = relative_difference([value], [theirs.values[origin][1]])
            if difference > tolerance:
                name = node.target if node.op == "call_module" else node.name
                return f"first at {name} (in place {node.meta.get('place', '')!r}), by {difference:.2e}"
        return "every layer that both share agrees up to the outputs"


def shape_of_inputs(inputs: Inputs) -> tuple[int, ...]:
    """Of the first tensor among them."""
    return next((tuple(x.shape) for x in (*inputs[0], *inputs[1].values()) if isinstance(x, Tensor)), ())


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
