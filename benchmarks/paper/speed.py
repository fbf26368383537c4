"""Images per second by the paper's protocol, all networks of a table in one interleaved run.

Paper, section 4: batch 128, 50 batches to warm the hardware up, 50 batches timed, on a V100. Here every network runs
one batch per round, so that a slow moment of the machine hits all of them, and the 50 batches of warming up are shared
among the networks; medians over the rounds count, every sample is kept. On CUDA, networks for small images are timed
twice: launched operation by operation as PyTorch does it (``eager``), and replayed as one CUDA graph (``graph``), where
the time that the CPU takes to launch operations does not count.

What ``speeds.jsonl`` holds already, measured by the same protocol on the same kind of device, is read from there.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from benchmarks.common import CONSOLE, provenance
from benchmarks.paper.setting import Setting
from benchmarks.paper.store import append, rows_in

_LEAST_WARM_UP = 4  # batches of each network

Call = Callable[[], object]


@dataclass(frozen=True)
class Protocol:
    """How to measure.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        batch: images per batch.
        warm_up, timed: batches of each network before the clock runs, and with it.
        dtype: of weights and images; float32 is computed as PyTorch does it, on CUDA with TF32 in convs.
        modes: ``"eager"``, and on CUDA ``"graph"``, too.
    """

    device: str
    batch: int
    warm_up: int
    timed: int
    dtype: torch.dtype = torch.float32
    modes: tuple[str, ...] = ("eager",)


def paper_protocol(device: str, dtype: torch.dtype, networks: int, *, graph: bool) -> Protocol:
    """That of the paper for so many networks; ``graph`` times replays of CUDA graphs, too, where there is CUDA."""
    modes = ("eager", "graph") if graph and device == "cuda" else ("eager",)
    return Protocol(device, 128, max(_LEAST_WARM_UP, math.ceil(50 / networks)), 50, dtype, modes)


@dataclass(frozen=True)
class Speed:
    """Seconds per batch of one network in one mode, sample by sample, in the order of the rounds."""

    batch: int
    seconds: tuple[float, ...]

    @property
    def images_per_second(self) -> float:
        """The median."""
        return self.batch / statistics.median(self.seconds)

    def over(self, other: Speed) -> tuple[float, float, float]:
        """How many times as fast as ``other``, round by round: median and quartiles."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        ratios = [(self.batch / mine) / (other.batch / theirs) for mine, theirs in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return middle, low, high


Speeds = dict[str, dict[str, Speed]]  # of each network, of each mode


def timed(
    name: str,
    networks: Mapping[str, Callable[[], nn.Module]],
    shape: tuple[int, ...],
    protocol: Protocol,
    setting: Setting,
) -> Speeds:
    """Time every network on the same random images of ``shape``, unless that was done before.

    Args:
        name: of the measurement.
        networks: builders of networks in eval mode; built one after the other, all held at once.
        shape: of one image.
        protocol: how.
        setting: where what was measured before lies.
    """
    key = {"name": name, **asdict(protocol), "dtype": str(protocol.dtype), "modes": list(protocol.modes)}
    path = setting.folder / "speeds.jsonl"
    for row in rows_in(path):
        if row["measurement"] == key and list(row["seconds"]) == list(networks):
            return {n: {m: Speed(protocol.batch, tuple(s)) for m, s in by.items()} for n, by in row["seconds"].items()}
    CONSOLE.print(f"timing {len(networks)} networks: {name}, {protocol}")
    speeds = _measure(networks, shape, protocol)
    seconds = {network: {mode: speed.seconds for mode, speed in modes.items()} for network, modes in speeds.items()}
    append(path, {"measurement": key, "seconds": seconds, "provenance": provenance(setting.device)}, setting)
    return speeds


def _measure(networks: Mapping[str, Callable[[], nn.Module]], shape: tuple[int, ...], protocol: Protocol) -> Speeds:
    images = torch.randn(protocol.batch, *shape, generator=torch.Generator().manual_seed(0))
    images = images.to(protocol.device, protocol.dtype)
    with torch.no_grad(), _tuned():
        calls = {name: _calls(build(), images, protocol) for name, build in networks.items()}
        for modes in calls.values():
            for call in modes.values():
                for _ in range(protocol.warm_up):
                    call()
        _wait(protocol)
        seconds: dict[tuple[str, str], list[float]] = {(n, m): [] for n, modes in calls.items() for m in modes}
        for _ in range(protocol.timed):
            for (name, mode), samples in seconds.items():
                samples.append(_seconds(calls[name][mode], protocol))
    return {
        name: {mode: Speed(protocol.batch, tuple(seconds[name, mode])) for mode in modes}
        for name, modes in calls.items()
    }


def _calls(network: nn.Module, images: Tensor, protocol: Protocol) -> dict[str, Call]:
    network = network.eval().to(protocol.device, protocol.dtype)
    calls: dict[str, Call] = {"eager": lambda: network(images)}
    if "graph" in protocol.modes:
        calls["graph"] = _captured(calls["eager"])
    return calls


def _captured(call: Call) -> Call:
    """``call`` as one CUDA graph; it reads and writes the same memory in every replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # algorithms are chosen and workspaces made before the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextlib.contextmanager
def _tuned() -> Iterator[None]:
    """Let cuDNN look for the fastest algorithm of each conv."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _wait(protocol: Protocol) -> None:
    if protocol.device == "cuda":
        torch.cuda.synchronize()


def _seconds(call: Call, protocol: Protocol) -> float:
    """From launch to the end on the device; the device is idle before, so launching counts."""
    start = time.perf_counter()
    call()
    _wait(protocol)
    return time.perf_counter() - start
