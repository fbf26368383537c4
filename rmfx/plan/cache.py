"""Measured prices on disk: one small file each, named by what was measured, where and with which versions."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from rmfx.debug import cache_home
from rmfx.errors import PlanError, PriceCacheWarning
from rmfx.files.atomic import replacing
from rmfx.measure.target import Target

Folder = str | os.PathLike[str] | Literal[True] | None
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

    Where they cannot be kept on disk, they are kept in memory, with a warning: prices save time, nothing hangs on them.

    Args:
        folder: where the files lie; ``True`` for ``rmfx/prices`` in the user's folder for caches; ``None`` to remember
            nothing beyond this object's life.
    """

    def __init__(self, folder: Folder = True) -> None:
        self._wanted = folder
        self._known: dict[str, Pair] = {}
        self._writes = True

    @cached_property
    def _folder(self) -> Path | None:
        if self._wanted is not True:
            return None if self._wanted is None else Path(self._wanted)
        try:
            return cache_home() / "rmfx" / "prices"
        except RuntimeError as problem:
            self._forget(f"there is no folder for caches ({problem})")
            return None

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
        """Remember ``pair`` for ``key``."""
        name = _name(key)
        self._known[name] = pair
        if self._folder is None or not self._writes:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._folder / name, PlanError) as scratch:
                scratch.write_text(json.dumps({"key": list(key), "pair": asdict(pair)}, indent=1), encoding="utf-8")
        except (OSError, PlanError) as problem:
            self._forget(str(problem))

    def _forget(self, reason: str) -> None:
        """Say once that nothing will be on disk."""
        self._writes = False
        warnings.warn(
            f"prices are measured again next time: {reason}; set XDG_CACHE_HOME, or give make_plan(cache=FOLDER)",
            PriceCacheWarning,
            stacklevel=2,
        )


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
