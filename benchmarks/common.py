"""What every benchmark shares: named networks, targets that pass or fail, result files with their provenance."""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rmfx.hostile import randomise
from rmfx.vision import import_torchvision

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "onnxscript", "numpy", "torchao")
CONSOLE = Console()
T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """One measured number and the limit it must not exceed."""

    subject: str  # the network
    quantity: str
    value: float
    limit: float

    @property
    def reached(self) -> bool:
        """Whether the target is met; a NaN is a miss."""
        return self.value <= self.limit


def options(doc: str | None, models: Sequence[str] = ()) -> argparse.Namespace:
    """Parse the command line of a benchmark; ``models`` are the defaults of ``--models``, if it has any."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if models:
        parser.add_argument("--models", nargs="+", default=list(models), help="only these (default: all)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results/ as it is")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    return parsed


def torchvision_model(name: str, image: int = 64, seed: int = 0) -> nn.Module:
    """A torchvision network in eval mode, float32, with random weights and hostile batch-norm statistics."""
    models = import_torchvision().models
    torch.manual_seed(seed)
    model = getattr(models, name)(weights=None)
    return randomise(model, torch.randn(4, 3, image, image), seed)


def macs(model: nn.Module, image: int = 224) -> int:
    """Multiply-accumulates for one image, of convs and matrix products, by torch's counter on the meta device.

    Moves ``model`` to the meta device for good: its weights are gone afterwards.
    """
    model.to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, image, image, device="meta", dtype=next(model.parameters()).dtype))
    return counter.get_total_flops() // 2


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, shared ones once."""
    return [*model.parameters(), *model.buffers()]


def tracked(items: Iterable[T], total: int) -> Iterator[T]:
    """Iterate with a progress bar that names the current item, freeing memory between items."""
    columns = (SpinnerColumn(), TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        for item in items:
            progress.update(task, description=str(item))
            yield item
            gc.collect()
            progress.advance(task)


def finish(name: str, figures: Sequence[Figure], samples: object, *, write: bool) -> None:
    """Print the table, write ``results/<name>.json`` and leave with exit status 1 if a target is missed."""
    table = Table("network", "quantity", "measured", "limit", "", title=name)
    for figure in figures:
        mark = "[green]reached[/]" if figure.reached else "[bold red]MISSED[/]"
        table.add_row(figure.subject, figure.quantity, f"{figure.value:.4g}", f"{figure.limit:.4g}", mark)
    CONSOLE.print(table)
    if write:
        _write(name, figures, samples)
    missed = [figure for figure in figures if not figure.reached]
    for figure in missed:
        CONSOLE.print(f"[red]missed[/] {figure.subject}: {figure.quantity} is {figure.value:.4g} > {figure.limit:.4g}")
    sys.exit(1 if missed or not figures else 0)


def _write(name: str, figures: Sequence[Figure], samples: object) -> None:
    RESULTS.mkdir(exist_ok=True)
    content = {
        "benchmark": name,
        "provenance": provenance(),
        "figures": [{**asdict(figure), "reached": figure.reached} for figure in figures],
        "samples": samples,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=True) + "\n", encoding="utf-8")
    CONSOLE.print(f"written to {path.relative_to(RESULTS.parent.parent)}")


def provenance(device: str = "cpu") -> dict[str, object]:
    """Machine, versions, commit and time, as they stand in every result file."""
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") and torch.cuda.is_available() else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or "none",
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "device": device,
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "torch_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def code_version() -> str:
    """Names what is measured, the sources of rmfx as they are: the same for every commit that changes others only."""
    digest = hashlib.sha256()
    for folder in ("rmfx", "passes"):
        for file in sorted((RESULTS.parents[1] / folder).rglob("*.py")):
            digest.update(file.relative_to(RESULTS.parents[1]).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
