"""Where a network is to run: a runtime, a device, a number of threads."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rmfx.errors import RmfxError

RUNTIMES = ("eager", "inductor", "onnxruntime", "onnxruntime-int8")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Target:
    """A runtime on a device.

    Attributes:
        runtime: ``eager`` (torch, operation by operation), ``inductor`` (``torch.compile`` with frozen weights),
            ``onnxruntime``, or ``onnxruntime-int8`` (the same, quantised by :func:`rmfx.quantise`).
        device: ``cpu``, ``cuda`` or ``cuda:1``; int8 is for ``cpu``.
        threads: of the runtime on a CPU; ``None`` for as many as it takes by itself.

    Raises:
        RmfxError: when the runtime or device is none of these, or they do not go together.

    >>> Target.of("onnxruntime:cuda")
    Target(runtime='onnxruntime', device='cuda', threads=None)
    """

    runtime: str = "eager"
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise RmfxError(f"unknown runtime {self.runtime!r}: choose one of {', '.join(RUNTIMES)}")
        if not _DEVICE.fullmatch(self.device):
            raise RmfxError(f"unknown device {self.device!r}: choose cpu, cuda or cuda:N")
        if self.runtime == "onnxruntime-int8" and self.device != "cpu":
            raise RmfxError(f"onnxruntime has int8 kernels for the CPU only, not for {self.device}: choose cpu")
        if self.threads is not None and self.threads < 1:
            raise RmfxError(f"threads must be at least 1, got {self.threads}")

    @staticmethod
    def of(text: str | Target) -> Target:
        """The target written as ``runtime`` or ``runtime:device``; a target is returned as it is."""
        if isinstance(text, Target):
            return text
        runtime, _, device = text.partition(":")
        return Target(runtime, device or "cpu")

    def __str__(self) -> str:
        return f"{self.runtime}:{self.device}" + (f", {self.threads} threads" if self.threads else "")
