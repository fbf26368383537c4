"""Turn the MODEL of a command line into a network and an example input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import rmfx
from rmfx import zoo
from rmfx.cli.console import step
from rmfx.cli.options import ModelOptions
from rmfx.deploy.signature import Signature, read_signature
from rmfx.errors import ModelNameError

SUFFIX = ".rmfx"
ONNX_SUFFIX = ".onnx"
Example = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Source:
    """A network with the name the user gave it; ``saved`` when it comes from a file of :func:`rmfx.save`.

    ``signature`` is that of the ONNX file it comes from.
    """

    name: str
    network: nn.Module
    saved: bool
    signature: Signature | None = None

    @property
    def like(self) -> str | None:
        """The ONNX file that a written one must agree with."""
        return None if self.signature is None else self.name


def is_saved(name: str) -> bool:
    """Whether ``name`` means a file of :func:`rmfx.save`."""
    return name.endswith(SUFFIX)


def open_model(name: str, options: ModelOptions) -> Source:
    """Build or load the network called ``name``, cast to the chosen dtype.

    Raises:
        ModelNameError, FileFormatError: when there is no such network, or its file is damaged.
    """
    if name.endswith(ONNX_SUFFIX):
        return _import(name, options)
    with step(f"building {name}"):
        if is_saved(name):
            network: nn.Module = _load(Path(name))
        else:
            network = zoo.build(name, weights=options.weights, pretrained=options.pretrained, seed=options.seed)
        return Source(name, network.to(options.dtype), is_saved(name))


def example_for(source: Source, options: ModelOptions) -> Example:
    """A random example input for ``source``; a tuple where an ONNX file has several.

    Raises:
        ModelNameError, OnnxImportError: when the size is not known and not given.
    """
    if source.signature is not None:
        return _examples(source.signature, options)
    size = options.shape or options.size
    return zoo.example_input(source.name, source.network, size, batch=options.batch, seed=options.seed)


def shape_of(example: Example) -> list[int] | list[list[int]]:
    """The shape of an example input, or of each of several, for JSON."""
    return list(example.shape) if isinstance(example, Tensor) else [list(value.shape) for value in example]


def _import(name: str, options: ModelOptions) -> Source:
    if options.dtype != torch.float32:
        raise ModelNameError(f"{name} keeps the type it was written in: leave out --dtype")
    signature = read_signature(name)
    with step(f"reading {name} and comparing it with onnxruntime"):
        return Source(name, rmfx.from_onnx(name, _examples(signature, options)), False, signature)


def _examples(signature: Signature, options: ModelOptions) -> Example:
    sizes = options.shape if options.size is None else (options.size,)
    examples = signature.examples(sizes, batch=options.batch, seed=options.seed)
    return examples[0] if len(examples) == 1 else examples


def _load(path: Path) -> nn.Module:
    if not path.is_file():
        raise ModelNameError(f"there is no file {path}: make one with `rmfx convert MODEL -o {path}`")
    return rmfx.load(path)
