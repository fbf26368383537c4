"""``rmfx quantise``: an ONNX file in int8, by onnxruntime's static quantisation, and what it costs."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Annotated, Literal
from zipfile import BadZipFile

import numpy as np
import torch
import typer
from torch import Tensor

import rmfx
from rmfx.cli import console, options
from rmfx.cli.outcome import check_output
from rmfx.deploy.signature import Signature, read_signature
from rmfx.errors import RmfxError
from rmfx.learn.sources import open_data

Method = Literal["minmax", "entropy", "percentile"]


def quantise(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="A network in float32.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Calibration inputs: a .npy file, an .npz file with one array per input, or images to train on: "
            "digits, digits32, cifar10, cifar100, folder:PATH with PATH/train/CLASS and PATH/val/CLASS.",
        ),
    ],
    root: options.DataRootOption = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="How many of DATA to use.")] = 256,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples at a time; unless IN fixes that.")] = 32,
    method: Annotated[Method, typer.Option("--method", help="How ranges are taken from what is measured.")] = "minmax",
    per_layer: Annotated[bool, typer.Option("--per-layer", help="One scale per layer, not one per filter.")] = False,
    reduce_range: Annotated[
        bool, typer.Option("--reduce-range", help="Weights of 7 bits, for x86 processors without VNNI.")
    ] = False,
    json: options.JsonOption = False,
) -> None:
    """Quantise weights and activations, run the result, and tell how far its outputs moved on DATA."""
    check_output(output, (".onnx",))
    signature = read_signature(source)
    first = signature.inputs[0].shape
    size = first[0] if first and isinstance(first[0], int) else batch
    batches = _batches(data, root, signature, samples, size)
    with console.step(f"quantising {source}"):
        options_ = {"per_channel": not per_layer, "method": method, "reduce_range": reduce_range}
        done = rmfx.quantise(source, output, batches, **options_)  # type: ignore[arg-type]
    if json:
        console.out_json(done.to_dict())
        return
    console.out(f"wrote {output} ({done.bytes_after / 1e6:.2f} MB of {done.bytes_before / 1e6:.2f} MB)")
    same = "" if done.agreement is None else f"; {done.agreement:.2%} of the answers are the same"
    console.out(f"outputs moved by {done.error:.2%} (root mean square) on {done.samples} samples{same}")


def _batches(data: str, root: Path | None, signature: Signature, samples: int, size: int) -> list[tuple[Tensor, ...]]:
    arrays = _stored(Path(data), signature) if data.endswith((".npy", ".npz")) else (_images(data, root, samples),)
    whole = min(samples, len(arrays[0])) // size * size or min(samples, len(arrays[0]))
    return list(zip(*(array[:whole].split(size) for array in arrays), strict=True))


def _images(data: str, root: Path | None, samples: int) -> Tensor:
    """Random images to train on, since folders hold one class after the other."""
    split = open_data(data, root=root).train
    taken: list[Tensor] = []
    for images, _ in split.batches(min(samples, 64, len(split)), order=0):
        taken.append(images)
        if sum(map(len, taken)) >= samples:
            break
    return torch.cat(taken)


def _stored(path: Path, signature: Signature) -> tuple[Tensor, ...]:
    """One array per input: of an .npz file by the names of the inputs where it has those, else in its own order."""
    try:
        arrays = _arrays(path)
    except (OSError, ValueError, TypeError, EOFError, BadZipFile, zlib.error) as problem:
        raise RmfxError(f"cannot read {path} as arrays of numpy: {problem}") from problem
    names = [entry.name for entry in signature.inputs]
    ordered = [arrays[name] for name in names] if {*names} <= arrays.keys() else [*arrays.values()]
    lengths = {len(array) if array.dim() else 0 for array in ordered}
    if len(ordered) != len(names) or len(lengths) != 1 or 0 in lengths:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise RmfxError(
            f"{path} holds {shapes}; the network needs one array for each of {', '.join(names)}, all of the same length"
        )
    return tuple(ordered)


def _arrays(path: Path) -> dict[str, Tensor]:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return {path.stem: torch.from_numpy(loaded)}
    with loaded:
        return {name: torch.from_numpy(array) for name, array in loaded.items()}
