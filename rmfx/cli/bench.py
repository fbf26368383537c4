"""``rmfx bench``: how fast two networks are, each in a runtime of its own, measured in interleaved pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

import rmfx
from rmfx.cli import console, options
from rmfx.cli.source import ONNX_SUFFIX, Source, example_for, open_model, shape_of
from rmfx.deploy.signature import read_signature
from rmfx.errors import OnnxImportError
from rmfx.graph.cost import network_parameters
from rmfx.measure.paired import Call, Comparison, compare
from rmfx.measure.runners import runner, session_call
from rmfx.measure.target import RUNTIMES, Target


@dataclass(frozen=True)
class _Entrant:
    model: str
    runtime: str
    input: Any
    macs: int | None  # of one call, with its batch
    parameters: int | None
    call: Call

    def to_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "call"}


def bench(
    first: Annotated[str, typer.Argument(metavar="A", help="A MODEL: a name, a .rmfx file, or an .onnx file.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another MODEL, or the same one.")],
    runtime: Annotated[
        str,
        typer.Option("--runtime", metavar="RUNTIME[:DEVICE]", help=f"Of A, one of {', '.join(RUNTIMES)}."),
    ] = "eager",
    runtime_b: Annotated[
        str | None, typer.Option("--runtime-b", metavar="RUNTIME[:DEVICE]", help="That of B, if it is another one.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of the runtimes on a CPU.")] = None,
    pairs: Annotated[int, typer.Option("--pairs", min=2, help="How often each is timed.")] = 50,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.0, help="Stop after so long, with fewer pairs, but 7.")
    ] = None,
    weights: options.WeightsOption = None,
    pretrained: options.PretrainedOption = False,
    size: options.SizeOption = None,
    input_shape: options.ShapeOption = None,
    batch: options.BatchOption = 1,
    dtype: options.DtypeOption = "float32",
    seed: options.SeedOption = 0,
    json: options.JsonOption = False,
) -> None:
    """Time A and B in alternation, and tell the ratio B / A with its 95 % interval.

    The options build whichever of the two is a name; nothing is converted. In onnxruntime an .onnx file runs as it is,
    any other network is exported first.
    """
    chosen = options.model_options(weights, pretrained, size, input_shape, batch, dtype, seed)
    asked = zip((first, second), (runtime, runtime_b or runtime), strict=True)
    targets = [(name, dataclasses.replace(Target.of(text), threads=threads)) for name, text in asked]
    one, other = (_enter(name, target, chosen) for name, target in targets)
    with console.step(f"timing {pairs} pairs"):
        measured = compare("B / A", one.call, other.call, pairs=pairs, seconds=seconds)
    if json:
        told = {"a": one.to_dict(), "b": other.to_dict(), "threads": threads, "batch": batch}
        console.out_json({**told, **measured.to_dict()})
        return
    _show(one, other, measured)


def _enter(name: str, target: Target, chosen: options.ModelOptions) -> _Entrant:
    as_it_is = name.endswith(ONNX_SUFFIX) and target.runtime == "onnxruntime"
    source = _file(name) if as_it_is else open_model(name, chosen)
    example = example_for(source, chosen)
    inputs = (example,) if isinstance(example, torch.Tensor) else example
    macs, parameters = _size(source, inputs)
    with console.step(f"preparing {name} for {target}"):
        call = session_call(name, inputs, target) if as_it_is else runner(source.network, inputs, target)
    return _Entrant(name, f"{target.runtime}:{target.device}", shape_of(example), macs, parameters, call)


def _file(name: str) -> Source:
    """An ONNX file to run and not to import; its network, for counting, is empty where it cannot be imported."""
    signature = read_signature(name)
    try:
        network: torch.nn.Module = rmfx.from_onnx(name, check=False)
    except OnnxImportError as problem:
        console.note(f"MACs of {name} are not counted: {problem}")
        network = torch.nn.Module()
    return Source(name, network.eval(), False, signature)


def _size(source: Source, inputs: tuple[torch.Tensor, ...]) -> tuple[int | None, int | None]:
    """MACs of convs and matrix products by torch's own counter, and parameters; of one call."""
    if not [*source.network.children()]:
        return None, None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        source.network(*inputs)
    return counter.get_total_flops() // 2, network_parameters(source.network)


def _show(one: _Entrant, other: _Entrant, measured: Comparison) -> None:
    for letter, entrant, latency in (("A", one, measured.first_ms), ("B", other, measured.second_ms)):
        counts = f"{_count(entrant.macs)} MACs, {_count(entrant.parameters)} parameters"
        console.out(f"{letter}: {entrant.model} in {entrant.runtime}: {latency:.3f} ms; {counts}")
    console.out(f"{measured}: B is {measured.verdict}")


def _count(number: int | None) -> str:
    """A count for people.

    >>> _count(1_814_000_000), _count(12), _count(None)
    ('1.81 G', '12', 'unknown')
    """
    if number is None:
        return "unknown"
    unit, size = next(((unit, size) for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if number >= size), ("", 1))
    return f"{number / size:.2f} {unit}" if unit else str(number)
