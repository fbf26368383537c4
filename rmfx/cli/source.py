"""Turn the MODEL of a command line into a network and an example input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

import rmfx
from rmfx import zoo
from rmfx.cli.console import step
from rmfx.cli.options import ModelOptions
from rmfx.errors import ModelNameError

SUFFIX = ".rmfx"


@dataclass(frozen=True)
class Source:
    """A network with the name the user gave it; ``saved`` when it comes from a file of :func:`rmfx.save`."""

    name: str
    network: nn.Module
    saved: bool


def is_saved(name: str) -> bool:
    """Whether ``name`` means a file of :func:`rmfx.save`."""
    return name.endswith(SUFFIX)


def open_model(name: str, options: ModelOptions) -> Source:
    """Build or load the network called ``name``, cast to the chosen dtype.

    Raises:
        ModelNameError, FileFormatError: when there is no such network, or its file is damaged.
    """
    with step(f"building {name}"):
        if is_saved(name):
            network: nn.Module = _load(Path(name))
        else:
            network = zoo.build(name, weights=options.weights, pretrained=options.pretrained, seed=options.seed)
        return Source(name, network.to(options.dtype), is_saved(name))


def example_for(source: Source, options: ModelOptions) -> Tensor:
    """A random example input for ``source``.

    Raises:
        ModelNameError: when the size is not known and not given.
    """
    size = options.shape or options.size
    return zoo.example_input(source.name, source.network, size, batch=options.batch, seed=options.seed)


def _load(path: Path) -> nn.Module:
    if not path.is_file():
        raise ModelNameError(f"there is no file {path}: make one with `rmfx convert MODEL -o {path}`")
    return rmfx.load(path)
