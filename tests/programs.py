"""What the tests of the second front door share: export a model, decompose the program, compare what it computes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from oracle import relative_difference
from torch import Tensor, nn


def exported(model: nn.Module, *inputs: Tensor) -> torch.export.ExportedProgram:
    """The program of ``model``, with free batches."""
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)


def decomposed(program: torch.export.ExportedProgram, how: str) -> torch.export.ExportedProgram:
    """The program as it is (``not``), without writes (``functional``), or in core operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"not": lambda: program, "functional": lambda: program.run_decompositions({})}.get(
            how, program.run_decompositions
        )()


def assert_equal(model: nn.Module, converted: nn.Module, *inputs: Any) -> None:
    """Both compute the same, to 13 digits."""
    with torch.no_grad():
        assert relative_difference(model(*inputs), converted(*inputs)) < 1e-13
