"""Run a network on labelled images: its loss, its accuracy, its answers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmfx.errors import RmfxError
from rmfx.learn.data import Data, Split
from rmfx.learn.machine import Machine, layout_on


def placed(images: Tensor, like: nn.Module) -> Tensor:
    """``images`` in the dtype of the parameters of ``like``, laid out as those are while training."""
    first = next(parameter for parameter in like.parameters() if parameter.is_floating_point())
    return images.to(first.dtype, memory_format=layout_on(first.device))


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """What ``network`` answers, ``[n, classes]``, in at least float32.

    Raises:
        RmfxError: when it answers anything but a tensor.
    """
    logits = network(images)
    if not isinstance(logits, Tensor):
        raise RmfxError(
            f"the network gives a {type(logits).__name__} in training mode, not one tensor of logits: build it without "
            "its auxiliary outputs"
        )
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch: int, machine: Machine) -> tuple[float, float]:
    """Mean cross entropy and accuracy of ``model`` on all images of ``split``, which the processes share.

    ``model`` must be on the device of ``machine``; it is left in eval mode.
    """
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=machine.device)
    for images, labels in split.batches(batch, share=machine.share, device=machine.device):
        with machine.accelerator.autocast():
            logits = logits_of(model, placed(images, model))
        totals[0] += F.cross_entropy(logits, labels, reduction="sum")
        totals[1] += (logits.argmax(1) == labels).sum()
    loss, correct = machine.sum(totals)
    return loss / len(split), correct / len(split)


@torch.no_grad()
def answers(model: nn.Module, split: Split, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels for all images of ``split``, batch by batch; ``model`` is left in eval mode."""
    model.eval()
    for images, labels in split.batches(batch, device=device):
        yield logits_of(model, placed(images, model)), labels


@torch.no_grad()
def check_fits(model: nn.Module, data: Data) -> None:
    """Refuse a network that does not take the images of ``data``, or does not give one number for each class.

    Raises:
        RmfxError: says which, with both numbers.
    """
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    if like is None:
        raise RmfxError("the network has no parameters: there is nothing to train")
    modes = {module: module.training for module in model.modules()}
    images = torch.zeros(2, *data.shape, dtype=like.dtype, device=like.device)
    try:
        logits = model.eval()(images)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RmfxError(f"the network does not take images of {data.name}, {list(data.shape)}: {reason}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(logits, Tensor) or logits.shape != (2, data.classes):
        shape = list(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
        raise RmfxError(f"the network's output is {shape}, and {data.name} has {data.classes} classes")
