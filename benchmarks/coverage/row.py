"""One network: built, filled, converted, run against the original in float64, and told in one row."""

from __future__ import annotations

import gc
import math
import resource
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rmfx
from benchmarks.coverage.models import Attempt, attempts, build
from benchmarks.coverage.sums import Recorded, countable, recording, shapes, tally
from benchmarks.coverage.weights import fill
from rmfx.errors import RmfxError
from rmfx.report import Report

TOLERANCE = 1e-11
NOISE_FACTOR = 100
OVERHEAD = 2**30  # bytes of the interpreter and its libraries
RESCALINGS = (1.0, 0.5, 0.25)  # of all weights, for networks that overflow, or amplify rounding beyond reason
UNSTABLE = 1e-9  # a network that amplifies one ulp beyond this proves little: other input sizes are tried
MAX_TRIES = 3
Row = dict[str, Any]


@dataclass(frozen=True)
class Order:
    """What a worker is to do with one network.

    Attributes:
        name: ``source:network``.
        memory: bytes that this process may take.
        execute: convert and run, instead of planning only.
        last: nothing with more memory comes later, so what does not fit is counted only.
        limited: see to it that no more memory is taken; for the rest of this process.
        size: of the input, to be tried first.
    """

    name: str
    memory: int
    execute: bool = True
    last: bool = True
    limited: bool = False
    size: int | None = None


class Unbuildable(Exception):
    """The network itself could not be built or run, whatever rmfx does."""


def measure(order: Order) -> Row:
    """The row of one network. Whatever goes wrong is in the row."""
    row: Row = {"model": order.name, "source": order.name.partition(":")[0]}
    start = time.perf_counter()
    try:
        if not order.execute:
            row["branches"] = []
            _plan(order, row)
        elif not _executed(order, row):
            if not order.last:
                return {**row, "status": "later"}
            _plan(order, row)
    except Unbuildable as error:
        row |= {"status": "unbuildable", "error": str(error)}
    except RmfxError as error:
        row |= {"status": "refused", "entered": "none", "error": f"{type(error).__name__}: {error}"}
    except Exception as error:  # a crash is a row too, whatever it is
        last = traceback.format_exc(limit=-4)
        row |= {"status": "crashed", "error": f"{type(error).__name__}: {str(error)[:500]}", "traceback": last}
    row["seconds"] = {**row.get("seconds", {}), "total": round(time.perf_counter() - start, 2)}
    used = resource.getrusage(resource.RUSAGE_SELF)
    row["seconds"]["cpu"] = round(used.ru_utime + used.ru_stime, 2)
    row["peak_bytes"] = used.ru_maxrss * 1024
    return row


@contextmanager
def _timed(row: Row, what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds = row.setdefault("seconds", {})
    seconds[what] = round(seconds.get(what, 0) + time.perf_counter() - start, 2)


def _plan(order: Order, row: Row) -> None:
    """Count only: nothing is computed, so neither weights nor activations take memory."""
    misfit: Exception | None = None
    for attempt, model, _ in _built(order, row):
        try:
            _explain(model, attempt, row)
        except Exception as error:
            if not _may_be_the_size(error):
                raise
            misfit = error
        else:
            row["status"] = "counted"
            return
    if misfit is not None:
        raise misfit


def _may_be_the_size(error: Exception) -> bool:
    """Whether planning may have failed because the network, which was not run before, takes inputs of other sizes."""
    if isinstance(error, RmfxError):
        return "cannot be run on the example inputs" in str(error)
    return isinstance(error, (RuntimeError, ValueError, TypeError, IndexError, AssertionError))


def _explain(model: nn.Module, attempt: Attempt, row: Row) -> Report:
    with _timed(row, "explain"), recording() as recorded:
        report = rmfx.explain(model, torch.zeros(attempt.shape, dtype=torch.float64))
    _account(recorded, report, row)
    return report


def _built(order: Order, row: Row) -> Iterator[tuple[Attempt, nn.Module, set[int]]]:
    """All ways of building the network that work, cheapest first; a build is used again for other sizes."""
    last_error: Exception | None = None
    known: tuple[Any, nn.Module, set[int]] | None = None
    for attempt in attempts(order.name, order.size):
        if known is None or known[0] != attempt.options:
            known = None
            try:
                with _timed(row, "build"):
                    known = (attempt.options, *build(order.name, attempt))
            except Exception as error:  # a model's own code raises what it likes when a size does not fit
                last_error = error
                continue
        row["params"] = sum(p.numel() for p in known[1].parameters())
        row["input"] = list(attempt.shape)
        row["options"] = dict(attempt.options)
        yield attempt, known[1], known[2]
    if known is None:
        raise Unbuildable(f"{type(last_error).__name__}: {last_error}")


def _executed(order: Order, row: Row) -> bool:
    """Execute; whether the memory was enough."""
    try:
        _execute(order, row)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return False
    return True


def _execute(order: Order, row: Row) -> None:
    misfit: Exception | None = None
    tries = 0
    for attempt, model, skipped in _built(order, row):
        try:
            if not _fits(order, model, attempt, row):
                return
        except Exception as error:
            if not _may_be_the_size(error):
                raise
            misfit = error
            continue
        if order.limited:  # only now: memory that building has reserved and never touched counts too
            limit = order.memory + OVERHEAD
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            x, truth = _run(attempt, model, skipped, row)
        except Unbuildable as error:
            misfit = error
            continue
        _compare(model, x, truth, row)
        tries += 1
        if tries == MAX_TRIES:
            _calm(attempt, model, skipped, row)
        if _is_stable(row) or tries == MAX_TRIES:
            return
    if not tries and misfit is not None:
        raise misfit


def _is_stable(row: Row) -> bool:
    return (row["noise"] or 0) <= UNSTABLE


def _calm(attempt: Attempt, model: nn.Module, skipped: set[int], row: Row) -> None:
    """Compare with smaller and smaller weights, until one ulp is not amplified any more: then a comparison tells."""
    for factor in RESCALINGS[1:]:
        if _is_stable(row):
            return
        x, truth = _run(attempt, model, skipped, row, (factor,))
        _compare(model, x, truth, row)


def _run(
    attempt: Attempt, model: nn.Module, skipped: set[int], row: Row, factors: Sequence[float] = RESCALINGS
) -> tuple[Tensor, list[Tensor]]:
    """Fill the network and run it: an input and its outputs. Weights become smaller until these are finite."""
    x = torch.randn(attempt.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for factor in factors:
        try:
            with _timed(row, "fill"):
                fill(model, x, skipped, factor=factor)
            with _timed(row, "run"):
                truth = _outputs(model, x)
        except Exception as error:  # a model's own code raises what it likes when a size does not fit
            if _is_out_of_memory(error):
                raise
            raise Unbuildable(f"{type(error).__name__}: {error}") from error
        if all(bool(t.isfinite().all()) for t in truth):
            row |= {"rescaled": factor} if factor != 1 else {}
            return x, truth
    raise Unbuildable("its outputs are not finite")


def _compare(model: nn.Module, x: Tensor, truth: list[Tensor], row: Row) -> None:
    with _timed(row, "convert"), recording() as recorded:
        converted = rmfx.convert(model, x, verify=False)
    _account(recorded, rmfx.report(converted), row)
    with _timed(row, "run_converted"):
        result = _outputs(converted, x)
    del converted
    gc.collect()
    difference = _difference(truth, result)
    noise = None
    if not difference <= TOLERANCE:
        with _timed(row, "noise"):
            noise = _noise(model, x, truth)
    limit = TOLERANCE if noise is None else max(TOLERANCE, NOISE_FACTOR * noise)
    row |= {"difference": difference, "noise": noise, "status": "right" if difference <= limit else "wrong"}


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _fits(order: Order, model: nn.Module, attempt: Attempt, row: Row) -> bool:
    """Whether original and result fit into the memory; if not, the row says how much is needed, or is counted."""
    size = 8 * sum(p.numel() for p in model.parameters())
    if 6 * size < order.memory:
        return True
    report = _explain(model, attempt, row)
    needed = size + int(8 * report.totals.params_after * 1.1) + 2**29
    row["needs_bytes"] = needed
    if needed > order.memory:
        row["status"] = "counted" if order.last else "later"
    return needed <= order.memory


def _account(recorded: Recorded, report: Report, row: Row) -> None:
    counts, reasons = tally(recorded.outcomes)
    if "branches" in row:
        row["branches"] = shapes(recorded.outcomes)
    row |= {
        "entered": recorded.entered(report),
        "left_out": [f"{part.place}: {countable(part.reason)}" for part in report.left_out],
        "sums": counts,
        "reasons": reasons,
        "entries": {status: report.count(status) for status in ("removed", "kept", "refused")},
        "macs": [report.totals.macs_before, report.totals.macs_after],
        "params_after": report.totals.params_after,
    }


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]


def _difference(truth: list[Tensor], others: list[Tensor]) -> float:
    """Largest deviation over the largest value, worst over the outputs; infinite where they have other shapes."""
    if [t.shape for t in truth] != [o.shape for o in others]:
        return math.inf
    worst = 0.0
    for expected, got in zip(truth, others, strict=True):
        deviation = float((expected - got).abs().max())
        scale = float(expected.abs().max())
        relative = deviation / scale if scale else (0.0 if deviation == 0 else math.inf)
        worst = max(worst, relative) if math.isfinite(relative) else math.inf
    return worst


@torch.no_grad()
def _noise(model: nn.Module, x: Tensor, truth: list[Tensor]) -> float:
    """The relative change of the outputs when every parameter moves by one ulp up or down; moves them for good."""
    random = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        up = torch.randint(2, parameter.shape, generator=random, dtype=torch.int8)
        towards = torch.where(up.bool(), math.inf, -math.inf).to(parameter.dtype)
        parameter.copy_(torch.nextafter(parameter, towards))
    return _difference(truth, _outputs(model, x))
