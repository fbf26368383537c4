"""Peak memory of a conversion, over the sizes of the original and the converted network together.

Method: each network in a fresh process, which imports everything, converts a tiny network and builds the network once
for nothing (so that lazily loaded code, thread pools and compiled kernels are there), hands free heap back to the
system and notes its resident memory; builds the network, hands back again, and notes it less the network's own
tensors; the smaller of the two is the *baseline*. The kernel's high-water mark of resident memory is then reset
(``/proc/self/clear_refs``, Linux), the network is converted with ``verify=False``, and the mark is read (``VmHWM``).

Figure: (mark - baseline) / (bytes of the original's tensors + bytes of the converted network's), the largest of three
processes, since what the heap keeps back varies. A conversion that holds both and nothing else gives 1; the limit of
1.2 leaves a fifth for the graph and for working copies. ``ru_maxrss`` is recorded as well: it cannot be reset and
also sees the peak of the imports and of the forward pass that measures the batch-norm statistics.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import rmfx
from benchmarks.common import Figure, finish, options, tensors_of, torchvision_model, tracked
from rmfx.hostile import randomise

MODELS = ("resnet18", "resnet50", "resnet152", "resnext50_32x4d", "regnet_x_3_2gf", "mobilenet_v2")
LIMIT = 1.2
PROCESSES = 3
STATUS = Path("/proc/self/status")
IMAGE = 64  # statistics are measured on small images, so that activations leave no large heap behind


def resident(key: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (high-water mark) of this process in bytes."""
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def size_of(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(model))


def release_heap() -> None:
    """Free what is garbage and hand free heap back, else the conversion would reuse it unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def warm_up() -> None:
    """Convert something small that takes the same paths."""
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    tiny = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), _Residual(branch), nn.ReLU())
    rmfx.convert(randomise(tiny, torch.randn(2, 3, 8, 8)), verify=False)


class _Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


def measure_here(name: str) -> dict[str, int]:
    """The measurement itself; once per process."""
    warm_up()
    torchvision_model(name, IMAGE)
    release_heap()
    before = resident("VmRSS")
    model = torchvision_model(name, IMAGE)
    original = size_of(model)
    release_heap()
    baseline = min(before, resident("VmRSS") - original)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    converted = rmfx.convert(model, verify=False)
    peak = resident("VmHWM")
    return {
        "original_bytes": original,
        "converted_bytes": size_of(converted),
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "ru_maxrss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure(name: str, threads: int) -> dict[str, int]:
    """:func:`measure_here` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--threads", str(threads), "--here", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(sample: dict[str, int]) -> float:
    """The figure of one process."""
    tensors = sample["original_bytes"] + sample["converted_bytes"]
    return (sample["peak_bytes"] - sample["baseline_bytes"]) / tensors


def main() -> None:
    """Run the benchmark, or with ``--here`` one measurement in this process."""
    if "--here" in sys.argv:
        torch.set_num_threads(int(sys.argv[sys.argv.index("--threads") + 1]))
        print(json.dumps(measure_here(sys.argv[sys.argv.index("--here") + 1])))
        return
    arguments = options(__doc__, MODELS)
    figures: list[Figure] = []
    samples: dict[str, list[dict[str, int]]] = {}
    for name in tracked(arguments.models, len(arguments.models)):
        samples[name] = [measure(name, arguments.threads) for _ in range(PROCESSES)]
        worst = max(ratio(sample) for sample in samples[name])
        figures.append(Figure(name, "peak memory / (original + converted)", worst, LIMIT))
    finish("memory", figures, samples, write=not arguments.no_write)


if __name__ == "__main__":
    main()
