"""Prove that an ONNX file computes what a torch module computes: run both, against a float64 truth.

For each trial input there are three results: ``truth``, the module in float64; ``torch``, the module in its own dtype;
``onnx``, the file in onnxruntime. Neither of the last two is right by itself: both round. So the file passes when

    |onnx - truth|  <=  NOISE_FACTOR * |torch - truth|  +  FLOOR[dtype] * max|truth|

for the largest error of each output: onnxruntime may round in another order, but may not be far worse than torch. The
rule needs no tolerance that fits all depths, since a deep network shows by itself how much it amplifies rounding. Where
that is more than ``NOISE_LIMIT[dtype]`` of the largest output, the rule would prove nothing, and the check fails.

On large inputs, gates (squeeze-excite, SiLU) can make a network chaotic: there rounding grows by thousands on some
inputs and not on others, and what torch loses tells nothing of what onnxruntime may lose. A trial that fails there is
repeated on smaller inputs, by the same rule. Chaos is measured, see ``CHAOS``: a wrong graph is no chaos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rmfx.copying import deep_copy
from rmfx.deploy import runtime
from rmfx.errors import ExportError, RmfxError, RuntimeUnavailableError

# A maximum over many outputs differs by small factors between two orders of summation; a wrong graph by orders of
# magnitude.
NOISE_FACTOR = 8.0
# An output of few numbers can be right in torch by luck: then this many units in the last place of the largest number
# are allowed anyhow. 32 in float32; 4 in the half types, whose units are coarse and whose sums are made in float32.
# Float64 has no truth above it: 5e4 units are the rounding of sums of some thousand terms through a hundred layers.
FLOOR = {torch.float64: 1e-11, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Float32 that is wrong in the second digit, or a half type that is wrong by a quarter, is noise and no result.
NOISE_LIMIT = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 0.25, torch.bfloat16: 0.25}
# Inputs reach far beyond the clamps of ReLU6 and Hardswish; smaller ones only where the dtype overflows, or for chaos.
AMPLITUDES = (12.0, 3.0, 1.0)
BATCHES = (1, 3)
# A network is chaotic at an amplitude where the rounding error of torch, the worst of some inputs, is this many times
# that at the smallest amplitude; others stay below 4.
CHAOS = 10.0
_CHAOS_INPUTS = 8


@dataclass(frozen=True)
class Trial:
    """One input and what the module makes of it, in its own dtype and in float64."""

    name: str
    inputs: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]
    truth: tuple[Tensor, ...]
    arithmetic: torch.dtype | None = None

    @property
    def noise(self) -> float:
        """The rounding error of the network in its own dtype, relative to the largest number of each output."""
        pairs = [(a.double(), b) for a, b in zip(self.expected, self.truth, strict=True) if b.is_floating_point()]
        errors = [float((a - b).abs().max()) / (float(b.abs().max()) or 1.0) for a, b in pairs if b.numel()]
        return max(errors, default=0.0)


def check_file(
    path: Path,
    module: nn.Module,
    inputs: Sequence[Tensor],
    batched: Sequence[bool],
    device: str,
    original: Path | None = None,
    arithmetic: torch.dtype | None = None,
) -> None:
    """Run ``path`` with onnxruntime's graph optimiser off and on, and compare with ``module``.

    Args:
        path: the ONNX file.
        module: in eval mode; not changed.
        inputs: positional example inputs, one trial by themselves; others are drawn like them.
        batched: which inputs have a dynamic batch axis; those are tried at the batch sizes ``BATCHES``.
        device: where onnxruntime runs, see :func:`rmfx.deploy.runtime.session`.
        original: the ONNX file that ``module`` was imported from, which then takes the place of torch: ``path`` may not
            be far worse than it.
        arithmetic: the dtype whose rounding is allowed, where the outputs are cast from another one than their own.

    Raises:
        ExportError: naming the trial, the output, the error and what was allowed.
        RuntimeUnavailableError: when ``device`` is not active.
    """
    sources = _Sources(_runner(_on_cpu(module), original), _in_float64(module), arithmetic)
    ladders = list(_ladders(sources, tuple(value.detach().cpu() for value in inputs), batched))
    against = "" if original is None else f" against {original.name}"
    for optimise in (False, True):
        how = f"onnxruntime on {device}, optimiser {'on' if optimise else 'off'}{against}"
        try:
            session = runtime.session(path, device, optimise)
        except RuntimeUnavailableError:
            raise
        except RmfxError as problem:
            raise _cannot_run(how, problem) from problem
        for ladder in ladders:
            ladder.compare(session, how)


def outputs_of(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors that ``module`` returns, in the order in which an ONNX file lists them."""
    with torch.no_grad():
        return tuple(leaf for leaf in pytree.tree_leaves(module(*inputs)) if isinstance(leaf, Tensor))


def _on_cpu(module: nn.Module) -> nn.Module:
    # The CPU computes in IEEE arithmetic, a GPU by default in TF32: that would widen what is allowed a thousandfold.
    here = all(tensor.device.type == "cpu" for tensor in (*module.parameters(), *module.buffers()))
    return module if here else deep_copy(module).cpu()


def _in_float64(module: nn.Module) -> nn.Module:
    return deep_copy(module).cpu().double()


def _cannot_run(how: str, problem: RmfxError) -> ExportError:
    return ExportError(f"{how}: {problem}. check=False writes the file unchecked")


@dataclass(frozen=True)
class _Sources:
    """What a file is compared with: ``expected`` in the dtype of the network, ``truth`` in float64."""

    expected: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    truth: nn.Module
    arithmetic: torch.dtype | None = None


def _runner(module: nn.Module, original: Path | None) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    if original is None:
        return lambda inputs: outputs_of(module, inputs)
    session = runtime.session(original, "cpu", optimise=False)
    return lambda inputs: tuple(torch.from_numpy(np.asarray(array)) for array in runtime.run(session, inputs))


def _ladders(sources: _Sources, example: tuple[Tensor, ...], batched: Sequence[bool]) -> Iterator[_Ladder]:
    first = _trial("the example inputs", sources, example)
    if first is None:
        raise ExportError("the network's output for the example inputs is not finite, so nothing can be compared")
    yield _Ladder(sources, example, batched, None, (), [first])
    for batch in BATCHES if any(batched) else (None,):
        ladder = _Ladder(sources, example, batched, batch, AMPLITUDES)
        if ladder.trial(0) is None:
            raise ExportError(
                f"the network overflows its dtype on inputs in ±{AMPLITUDES[-1]:g}, so nothing can be compared"
            )
        yield ladder


@dataclass
class _Ladder:
    """One trial, and others on smaller inputs to take its place; each is made when it is needed."""

    sources: _Sources
    example: tuple[Tensor, ...]
    batched: Sequence[bool]
    batch: int | None
    amplitudes: tuple[float, ...]
    trials: list[Trial] = field(default_factory=list)
    tried: list[float] = field(default_factory=list)
    first: int = 0  # the trials before it lie in chaos
    noises: dict[float, float] = field(default_factory=dict)

    def compare(self, session: Any, how: str) -> None:
        """Compare on the first trial; on the next one where the network is chaotic at the amplitude of this one."""
        while (trial := self.trial(self.first)) is not None:
            try:
                result = runtime.run(session, trial.inputs)
            except RmfxError as problem:
                raise _cannot_run(how, problem) from problem
            try:
                _compare(trial, result, how)
                return
            except ExportError:
                if self.trial(self.first + 1) is None or not self._is_chaotic(self.tried[self.first]):
                    raise
                self.first += 1

    def trial(self, index: int) -> Trial | None:
        """The trial at the ``index``-th amplitude where results are finite."""
        while len(self.trials) <= index and self.amplitudes:
            amplitude, *smaller = self.amplitudes
            self.amplitudes = tuple(smaller)
            where = "" if self.batch is None else f" at batch {self.batch}"
            trial = _trial(f"random inputs in ±{amplitude:g}{where}", self.sources, self._draw(amplitude, 0))
            if trial is not None:
                self.trials.append(trial)
                self.tried.append(amplitude)
        return self.trials[index] if index < len(self.trials) else None

    def _draw(self, amplitude: float, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        sizes = [self.batch if moving else None for moving in self.batched]
        pairs = zip(self.example, sizes, strict=True)
        return tuple(_drawn(value, size, amplitude, generator) for value, size in pairs)

    def _is_chaotic(self, amplitude: float) -> bool:
        return self._noise(amplitude) > CHAOS * self._noise(AMPLITUDES[-1])

    def _noise(self, amplitude: float) -> float:
        """The largest rounding error over some inputs, relative to the largest output."""
        if amplitude not in self.noises:
            found = (_trial("", self.sources, self._draw(amplitude, 1 + seed)) for seed in range(_CHAOS_INPUTS))
            self.noises[amplitude] = max((trial.noise for trial in found if trial is not None), default=0.0)
        return self.noises[amplitude]


def _drawn(example: Tensor, batch: int | None, amplitude: float, generator: torch.Generator) -> Tensor:
    """A tensor like ``example``, with ``batch`` rows if given: signed noise, or for integers the example's own rows."""
    rows = example if batch is None else example[torch.arange(batch) % len(example)]
    if not rows.is_floating_point():
        return rows
    noise = torch.rand(rows.shape, generator=generator, dtype=torch.float64)
    return ((2 * noise - 1) * amplitude).to(rows.dtype)


def _trial(name: str, sources: _Sources, inputs: tuple[Tensor, ...]) -> Trial | None:
    """Run the network in its dtype and in float64; ``None`` when a result is not finite."""
    expected = sources.expected(inputs)
    try:
        doubles = tuple(value.double() if value.is_floating_point() else value for value in inputs)
        exact = outputs_of(sources.truth, doubles)
    except RuntimeError as problem:
        raise ExportError(
            f"the network does not run in float64, so there is no truth to compare with ({problem}). "
            "check=False writes the file unchecked"
        ) from problem
    finite = all(bool(value.isfinite().all()) for value in (*expected, *exact))
    return Trial(name, inputs, expected, exact, sources.arithmetic) if finite else None


def _compare(trial: Trial, result: list[np.ndarray[Any, Any]], how: str) -> None:
    if len(result) != len(trial.expected):
        raise ExportError(f"{how}: the file has {len(result)} outputs, the network {len(trial.expected)}")
    for index, (array, expected, truth) in enumerate(zip(result, trial.expected, trial.truth, strict=True)):
        where = f"{how}, {trial.name}, output {index}"
        value = torch.from_numpy(np.asarray(array))
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise ExportError(f"{where}: {_kind(value)} from the file, {_kind(expected)} from the network")
        if not expected.is_floating_point():
            _demand_equal(value, expected, where)
            continue
        _demand_close(value, expected, truth, trial.arithmetic or expected.dtype, where)


def _demand_equal(value: Tensor, expected: Tensor, where: str) -> None:
    if not torch.equal(value, expected):
        raise ExportError(f"{where}: {int((value != expected).sum())} of {value.numel()} numbers differ")


def _demand_close(value: Tensor, expected: Tensor, truth: Tensor, dtype: torch.dtype, where: str) -> None:
    if not value.numel():
        return
    scale, noise = float(truth.abs().max()), float((expected.double() - truth).abs().max())
    if noise > NOISE_LIMIT[dtype] * scale:
        raise ExportError(
            f"{where}: torch itself is off by {noise:.3g} from float64, where the largest output is {scale:.3g}: in "
            f"{dtype} this network computes noise. check=False writes the file unchecked"
        )
    errors = (value.double() - truth).abs()
    allowed = NOISE_FACTOR * noise + FLOOR[dtype] * scale
    if bool((errors <= allowed).all()):
        return
    worst = int(errors.nan_to_num(nan=torch.inf).argmax())
    at = tuple(int(i) for i in np.unravel_index(worst, value.shape))
    raise ExportError(
        f"{where}: the file computes {float(value.flatten()[worst]):.9g} at {at}, where float64 gives "
        f"{float(truth.flatten()[worst]):.9g}; off by {float(errors.flatten()[worst]):.3g}, allowed {allowed:.3g} "
        f"(largest output {scale:.3g}, torch itself is off by {noise:.3g})"
    )


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
