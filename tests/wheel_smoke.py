"""Smoke test of an installed wheel: run it outside the repository, with the wheel first on ``PYTHONPATH``.

It converts, saves, loads and verifies a small network, and checks that what it imported is the wheel.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

import rmfx
import rmfx.passes
from rmfx.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent


class Block(nn.Module):
    """A residual block with signed input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.conv2(torch.relu(self.conv1(x)))


def check_it_is_the_wheel() -> None:
    for module in (rmfx, rmfx.passes):
        origin = Path(module.__file__ or "").resolve()
        parts = origin.relative_to(REPOSITORY).parts if origin.is_relative_to(REPOSITORY) else ("build",)
        if parts[0] in ("rmfx", "passes"):
            sys.exit(f"{module.__name__} was imported from the sources ({origin}), not from the wheel")
    if not (Path(rmfx.__file__ or "").parent / "py.typed").is_file():
        sys.exit("the wheel has no py.typed marker")
    (script,) = (entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "rmfx")
    if script.load() is not main:
        sys.exit(f"the console script rmfx means {script.value}")


def check_it_works(folder: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block()).eval(), torch.randn(2, 3, 9, 7)
    plain = rmfx.convert(model, x)
    rmfx.save(plain, folder / "net.rmfx")
    rmfx.verify(model, rmfx.load(folder / "net.rmfx"), x)
    removed = rmfx.report(plain).count("removed")
    if removed != 2:
        sys.exit(f"{removed} of 2 residual sums removed")


if __name__ == "__main__":
    check_it_is_the_wheel()
    with tempfile.TemporaryDirectory() as folder:
        check_it_works(Path(folder))
    print(f"wheel smoke test passed: rmfx {metadata.version('rmfx')} from {Path(rmfx.__file__ or '').parent}")
