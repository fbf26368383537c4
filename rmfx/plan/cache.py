"""Measured prices on disk: one small file each, named by what was measured, where and with which versions."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rmfx.errors import PlanError
from rmfx.files.atomic import replacing
from rmfx.measure.target import Target

FOLDER = Path.home() / ".cache" / "rmfx" / "prices"
_METHOD = "2"  # counts changes in how prices are measured: those of another method are not comparable
_PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Pair:
    """A place as it was and rewritten: milliseconds of the first, the ratio of the second to it, and its interval."""

    before_ms: float
    ratio: float
    low: float
    high: float


class PriceCache:
    """Pairs that were measured before.

    Args:
        folder: where the files lie; ``None`` to remember nothing beyond this object's life.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = FOLDER) -> None:
        self._folder = None if folder is None else Path(folder)
        self._known: dict[str, Pair] = {}

    def get(self, key: Sequence[str]) -> Pair | None:
        """What was measured for ``key``, or ``None``. A damaged file counts as nothing measured."""
        name = _name(key)
        if name not in self._known and self._folder is not None:
            try:
                self._known[name] = Pair(**json.loads((self._folder / name).read_text(encoding="utf-8"))["pair"])
            except (OSError, ValueError, KeyError, TypeError):
                return None
        return self._known.get(name)

    def put(self, key: Sequence[str], pair: Pair) -> None:
        """Remember ``pair`` for ``key``.

        Raises:
            PlanError: when the folder cannot be written.
        """
        name = _name(key)
        self._known[name] = pair
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise PlanError(
                f"cannot keep measured prices in {self._folder}: {problem}; give another cache"
            ) from problem
        with replacing(self._folder / name, PlanError) as scratch:
            scratch.write_text(json.dumps({"key": list(key), "pair": asdict(pair)}, indent=1), encoding="utf-8")


def place_of(target: Target) -> str:
    """The machine, versions and target that a price holds for."""
    threads = target.threads or torch.get_num_threads()
    return "; ".join((str(target), f"{threads} threads", _machine(), _gpu(target.device), *_versions(), _METHOD))


@cache
def _machine() -> str:
    processor = platform.processor() or platform.machine()
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    except OSError:
        return processor  # no Linux: less is known
    return processor


@cache
def _versions() -> tuple[str, ...]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return tuple(found)


def _gpu(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else ""


def _name(key: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(key).encode()).hexdigest()[:40] + ".json"
