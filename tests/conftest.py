"""What every test runs under: fixed seeds, one thread per worker, markers with reasons, importable torchvision."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import settings

from rmfx.backend.bound import Bound
from rmfx.backend.compiler import _warn_once
from rmfx.vision import import_torchvision

# No deadlines: the first call of a torch kernel is slow. Derandomised: a red run must be red again.
settings.register_profile("rmfx", deadline=None, derandomize=True)
settings.load_profile("rmfx")


def _make_importable(package: str) -> None:
    """The root of the repository is not on the path of tests, see ``setup.cfg``."""
    folder = Path(__file__).resolve().parent.parent / package
    file, places = folder / "__init__.py", [str(folder)]
    spec = importlib.util.spec_from_file_location(package, file, submodule_search_locations=places)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    spec.loader.exec_module(module)


_make_importable("benchmarks")


def _take_a_core(worker: int) -> None:
    """onnxruntime and compilers take a thread per core that they may run on, and idle threads of one spin."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[worker % len(cores)]})


def pytest_configure(config: pytest.Config) -> None:
    """Keep parallel workers off each other's cores, and make torchvision importable everywhere."""
    if hasattr(config, "workerinput"):  # set by pytest-xdist in its workers only
        _take_a_core(int(config.workerinput["workerid"].removeprefix("gw")))
        torch.set_num_threads(1)
    if importlib.util.find_spec("torchvision"):
        import_torchvision()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason that the summary prints."""
    lacking = {}
    if not torch.cuda.is_available():
        lacking = dict.fromkeys(("gpu", "gpu_runtime"), "needs an NVIDIA GPU that torch can use")
    elif "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        lacking = {"gpu_runtime": "needs onnxruntime-gpu"}
    for item in items:
        for marker, reason in lacking.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before, and nothing left behind."""
    torch._dynamo.reset()
    _warn_once.cache_clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[Bound]:
    """The graph of each conversion by the back end, as they happen."""
    seen: list[Bound] = []
    convert = Bound._converted

    def noted(self: Bound, args: tuple[Any, ...]) -> Callable[..., Any]:
        seen.append(self)
        return convert(self, args)

    monkeypatch.setattr(Bound, "_converted", noted)
    return seen


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
