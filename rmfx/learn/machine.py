"""Where training runs: the device, the processes, and the precision, through Hugging Face accelerate."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmfx.errors import RmfxError, RuntimeUnavailableError
from rmfx.learn.data import Share
from rmfx.learn.recipe import Precision
from rmfx.learn.synced_norm import synced

_MIXED = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}
_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU")
_EPOCHS, _PROCESSES = 1_000_003, 65_536  # more than anybody has


@dataclass(frozen=True, eq=False)
class Machine:
    """One process among those that ``accelerate launch`` or ``torchrun`` started, or the only one.

    ``accelerator`` is an ``accelerate.Accelerator``: mixed precision, backward pass and the optimiser are its work.
    """

    accelerator: Any

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def share(self) -> Share:
        """The part of each batch that is for this process."""
        return Share(self.accelerator.process_index, self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and says things."""
        return self.accelerator.is_main_process

    def sum(self, values: Tensor) -> list[float]:
        """``values`` added over all processes, as numbers."""
        return self.accelerator.reduce(values, "sum").tolist()

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.accelerator.wait_for_everyone()

    def seed(self, seed: int, epoch: int) -> None:
        """Seed what a network draws while training, such as dropout, differently in each process."""
        torch.manual_seed((seed * _EPOCHS + epoch) * _PROCESSES + self.share.rank)

    def parallel(self, model: nn.Module) -> nn.Module:
        """``model``, with gradients averaged over all processes."""
        if self.share.count == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        # A network may leave parameters out at times, as one whose shortcuts have faded does.
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)

    @contextmanager
    def hosting(self, model: nn.Module) -> Iterator[None]:
        """Have ``model`` on the device, laid out for it, until the block ends; then where it was, in eval mode.

        The global random generators are left as they were.
        """
        on_cuda = self.device.type == "cuda"
        home = next(model.parameters()).device
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[self.device] if on_cuda else []))
            model.to(self.device)
            stack.callback(model.to, home)
            if on_cuda:
                _lay_out(model, layout_on(self.device))
                stack.callback(_lay_out, model, torch.contiguous_format)
                stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
                torch.backends.cudnn.benchmark = True
            if self.share.count > 1:
                stack.enter_context(synced(model, self.device))
            stack.callback(model.eval)
            yield


def open_machine(precision: Precision = "float32", device: str | None = None) -> Machine:
    """Find out where this process trains, and join the others.

    Args:
        precision: of the arithmetic.
        device: ``"cpu"`` or ``"cuda"``; by default CUDA where there is any.

    Raises:
        RuntimeUnavailableError: when accelerate is not installed, or CUDA is asked for and there is none.
        RmfxError: for a precision that the device does not have, or a way of sharing work that is not supported.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise RuntimeUnavailableError("accelerate is not installed, and training needs it: pip install 'rmfx[train]'")
    on_cpu = _on_cpu(device)
    if on_cpu and precision == "fp16":
        raise RmfxError("precision fp16 needs CUDA: on a CPU choose float32 or bf16")
    accelerate = importlib.import_module("accelerate")
    # accelerate keeps the precision of the first Accelerator of a process for all later ones, unless told to forget.
    importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=on_cpu, mixed_precision=_MIXED[precision])
    if accelerator.distributed_type not in _KINDS:
        raise RmfxError(
            f"accelerate is set up for {accelerator.distributed_type}: rmfx trains in one process, or in several that "
            "each hold the whole network (MULTI_GPU or MULTI_CPU)"
        )
    return Machine(accelerator)


def layout_on(device: torch.device) -> torch.memory_format:
    """How images and weights are laid out while training: channels last on CUDA, where tensor cores want them so.

    Not on a CPU: with channels last, oneDNN there writes past its memory in the gradient of a strided 1x1 conv whose
    input has fewer channels than a vector (8 with AVX2): wrong gradients, or a crash. Known upstream:
    https://github.com/uxlfoundation/oneDNN/issues/6035.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def _lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def _on_cpu(device: str | None) -> bool:
    if device not in (None, "cpu", "cuda"):
        raise RmfxError(f"device {device!r} is not understood: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailableError("device cuda was asked for, and torch finds none: leave it out, or say cpu")
    return device == "cpu" or not torch.cuda.is_available()
