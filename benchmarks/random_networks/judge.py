"""Converts a random network and says whether that is right; the only file here that knows rmfx."""

from __future__ import annotations

import inspect
import random
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import rmfx
from benchmarks.random_networks.program import Network
from rmfx.check.compare import Inputs, noise_floor, relative_difference
from rmfx.errors import InexactError, RmfxError, VerificationError
from rmfx.graph.region import is_residual
from rmfx.hostile import randomise

TOLERANCE = 1e-11  # relative to the largest output; an algebraic mistake is larger
NOISE_FACTOR = 100.0  # ... or this many times the network's own noise floor, where that is larger
NOISE_DRAWS = 3
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """How to convert.

    Attributes:
        inputs: with example inputs.
        arguments: of :func:`rmfx.convert`.
    """

    inputs: bool = True
    arguments: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.arguments)
        return ("with" if self.inputs else "without") + " example inputs" + (f", {given}" if given else "")

    def smaller(self) -> Iterator[Order]:
        """Orders with one argument less."""
        for index in range(len(self.arguments)):
            yield replace(self, arguments=self.arguments[:index] + self.arguments[index + 1 :])


def draw_order(r: random.Random) -> Order:
    """Any options, the usual ones more often."""
    inputs = r.random() < 0.7
    found: list[tuple[str, Any]] = [("verify", inputs and r.random() < 0.1)]
    choices: dict[str, tuple[Any, ...]] = {
        "carrier": ("direct", "masked", "split", "shift"),
        "downsample": ("conv", "input"),
        "fuse": ("always", "never"),
        "keep_bn": (True,),
        "concat": (True,),
        "drop_dead_channels": (True,),
    }
    known = inspect.signature(rmfx.convert).parameters
    for name, values in choices.items():
        wanted, value = r.random() < 0.25, r.choice(values)
        if wanted and name in known:
            found.append((name, value))
    return Order(inputs, tuple(found))


@dataclass(frozen=True)
class Verdict:
    """What became of one network.

    Attributes:
        status: ``right``, ``refused`` (as a whole, with a reason), ``wrong``, ``crashed``; ``idle`` where the network
            itself has no finite outputs.
        detail: of what is not right.
        difference: the largest relative one.
        sums: residual sums by status.
        reasons: of sums that stay, without names and numbers.
        sizes: how many inputs were compared.
    """

    status: str
    detail: str = ""
    difference: float = 0.0
    sums: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    sizes: int = 0

    @property
    def bad(self) -> bool:
        """Whether it must not be."""
        return self.status in ("wrong", "crashed")


class _UnequalError(Exception):
    pass


def judge(network: Network, order: Order) -> Verdict:
    """Convert ``network`` and compare, on its own size and others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = _prepare(network)
        if prepared is None:
            return Verdict("idle")
        model, runs = prepared
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        layers = repr(model)
        try:
            example = runs[0][0].clone() if order.inputs else None
            converted = rmfx.convert(model, example, **dict(order.arguments))
            verdict = _compare(model, converted, runs, network.seed)
            _check_untouched(model, before, layers, runs[0])
            return verdict
        except (VerificationError, _UnequalError) as error:
            return Verdict("wrong", str(error))
        except InexactError:
            return Verdict("crashed", traceback.format_exc())
        except RmfxError as error:
            reason = f"{type(error).__name__}: {error}"
            return Verdict("refused" if str(error) else "crashed", reason, reasons=Counter([impersonal(reason)]))
        except Exception:
            return Verdict("crashed", traceback.format_exc())


def impersonal(reason: str) -> str:
    """A reason without names and numbers, so that equal ones are counted together.

    >>> impersonal("'relu_1' (in block0) inside the branch is also read outside, by add_3")
    '… inside the branch is also read outside, by …'
    """
    reason = re.sub(r"'[^']*'( \(in [^)]*\))?", "…", reason)
    reason = re.sub(r"\bby [a-z_0-9]+(, [a-z_0-9]+)*$", "by …", reason)
    reason = re.sub(r"\(\d[\d, ]*\)|\b[a-z]+(_[a-z0-9]+)*_\d+\b|\d+(\.\d+)?(e-?\d+)?", "…", reason)
    return reason.split("\n")[0][:160]


# -- the network as it is ----------------------------------------------------------------------------------------------

_Run = tuple[Tensor, list[Tensor], Any]  # input, outputs, their structure


def _prepare(network: Network) -> tuple[nn.Module, list[_Run]] | None:
    """The network with hostile weights, and its outputs; nothing where it does not run or is not finite."""
    first = _hostile(network.shape, network.seed)
    try:
        model = randomise(network.build(), first.clone() / 8, network.seed)
        runs = [(first, *_outputs(model, first))]
    except (RuntimeError, ValueError, IndexError):
        return None
    if not _finite(runs[0][1]):
        return None
    for number, shape in enumerate(_other_shapes(network.shape)):
        x = _hostile(shape, network.seed + 1 + number)
        try:
            outputs, structure = _outputs(model, x)
        except (RuntimeError, ValueError, IndexError):
            continue  # a size or batch that the network does not take
        if _finite(outputs):
            runs.append((x, outputs, structure))
    return model, runs


def _other_shapes(shape: Shape) -> list[Shape]:
    """Another batch, and sizes of other parities."""
    sizes = [tuple(s + more for s in shape[2:]) for more in (1, 2, 5)]
    mixed = tuple(s + index % 2 for index, s in enumerate(shape[2:], start=1))
    return [(3, *shape[1:]), *((2, shape[1], *size) for size in (*sizes, mixed) if size)]


def _hostile(shape: Shape, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 8


def _outputs(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Any]:
    with torch.no_grad():
        leaves, structure = pytree.tree_flatten(model(x.clone()))
    return [leaf.clone() for leaf in leaves], structure


def _finite(outputs: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) and bool(tensor.abs().max() > 0) for tensor in outputs)


# -- the converted one -------------------------------------------------------------------------------------------------


def _compare(model: nn.Module, converted: nn.Module, runs: list[_Run], seed: int) -> Verdict:
    report = rmfx.report(converted)
    sums, reasons = Counter[str](), Counter[str]()
    for entry in report.entries:
        if (entry.status == "removed") != (entry.reason is None) or entry.reason == "":
            raise _UnequalError(f"{entry.name} is {entry.status}, for the reason {entry.reason!r}")
        sums[entry.status] += 1
        if entry.reason is not None:
            reasons[impersonal(entry.reason)] += 1
    if isinstance(converted, fx.GraphModule):
        left = sum(is_residual(node) for node in converted.graph.nodes)
        if left > sums["refused"] + sums["kept"]:
            raise _UnequalError(f"{left} sums are left in the graph, the report says {dict(sums)}")
    guarded = bool(report.size_conditions) or any(entry.size_conditions for entry in report.entries)
    worst, compared = 0.0, 0
    for index, (x, want, structure) in enumerate(runs):
        try:
            got, same = _outputs(converted, x)
        except ValueError as error:
            if index and guarded and "this network was converted for" in str(error):
                continue
            raise
        if same != structure:
            raise _UnequalError(f"the output's structure is {same}, not {structure}")
        worst = max(worst, _difference(model, x, want, got, seed))
        compared += 1
    return Verdict("right", "", worst, sums, reasons, compared)


def _difference(model: nn.Module, x: Tensor, want: list[Tensor], got: list[Tensor], seed: int) -> float:
    difference = relative_difference(got, want)
    if difference <= TOLERANCE:
        return difference
    inputs: Inputs = ((x.clone(),), {})
    floor = max(noise_floor(model, inputs, want, seed + draw) for draw in range(NOISE_DRAWS))
    if difference <= NOISE_FACTOR * floor:
        return difference
    shapes = [tuple(tensor.shape) for tensor in got], [tuple(tensor.shape) for tensor in want]
    note = f"; outputs of shapes {shapes[0]}, not {shapes[1]}" if shapes[0] != shapes[1] else ""
    raise _UnequalError(f"differs by {difference:.2e} at {tuple(x.shape)}, noise floor {floor:.1e}{note}")


def _check_untouched(model: nn.Module, before: dict[str, Tensor], layers: str, run: _Run) -> None:
    after = model.state_dict()
    if repr(model) != layers or before.keys() != after.keys():
        raise _UnequalError("the original has other layers than before")
    if changed := [name for name in before if not torch.equal(before[name], after[name])]:
        raise _UnequalError(f"the original's {changed[0]} was changed")
    again = _outputs(model, run[0])[0]
    if not all(torch.equal(a, b) for a, b in zip(again, run[1], strict=True)):
        raise _UnequalError("the original computes something else than before")


# -- smaller -----------------------------------------------------------------------------------------------------------


def shrink(network: Network, order: Order, most: int = 400) -> tuple[Network, Order]:
    """The smallest network and order found within ``most`` tries that are bad in the same way."""
    status = judge(network, order)
    kind = _kind(status)
    tries = 0
    found = True
    while found and tries < most:
        found = False
        candidates: Iterator[tuple[Network, Order]] = (
            *((network, smaller) for smaller in order.smaller()),
            *((smaller, order) for smaller in network.smaller()),
        ).__iter__()
        for candidate in candidates:
            tries += 1
            if tries > most:
                break
            if _kind(judge(*candidate)) == kind:
                (network, order), found = candidate, True
                break
    return network, order


def _kind(verdict: Verdict) -> str:
    if verdict.status != "crashed":
        return verdict.status
    lines = verdict.detail.strip().split("\n")
    places = [line.strip() for line in lines if line.strip().startswith("File ")]
    return f"{impersonal(lines[-1])} {places[-1:]}"
