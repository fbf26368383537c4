"""The training half of ResDistill (Li et al. 2020): learn from a residual teacher while the own shortcuts fade.

The student of :mod:`rmfx.models.resdistill` ends without shortcuts.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmfx.copying import deep_copy
from rmfx.errors import RmfxError
from rmfx.learn.objective import Objective

Fade = Literal["linear", "cosine"]


@runtime_checkable
class Fading(Protocol):
    """A network whose shortcuts can be weakened."""

    def fade(self, strength: float) -> None:
        """Multiply all shortcuts by ``strength``, from 1 to 0, from now on."""


class Distillation(Objective):
    """Cross entropy, plus the Kullback-Leibler divergence from a teacher's softened answers.

    ``loss = cross entropy + weight * temperature^2 * KL(softmax(teacher / temperature) || softmax(student /
    temperature))``, where the factor keeps the gradients as large as at temperature 1 (Hinton et al. 2015). A student
    that is :class:`Fading` loses its shortcuts over the first ``fading`` of the training.

    Args:
        teacher: a trained network with the same classes; a copy of it runs in eval mode.
        weight, temperature: as above.
        fading: the part of the training after which the shortcuts are gone, up to 1.
        shape: how their strength goes from 1 to 0.

    Raises:
        RmfxError: for a number out of range.

    >>> distillation = Distillation(nn.Linear(1, 2), fading=0.5)
    >>> [distillation.strength(done) for done in (0.0, 0.25, 0.5, 1.0)]
    [1.0, 0.5, 0.0, 0.0]
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        weight: float = 1.0,
        temperature: float = 4.0,
        fading: float = 0.6,
        shape: Fade = "linear",
    ) -> None:
        if not (weight >= 0 and temperature > 0 and 0 < fading <= 1 and shape in get_args(Fade)):
            raise RmfxError(
                f"distillation: weight {weight} must not be negative, temperature {temperature} be above 0, fading "
                f"{fading} be above 0 and at most 1, and shape {shape!r} be one of {get_args(Fade)}"
            )
        self._teacher = teacher
        self._weight, self._temperature, self._fading, self._shape = weight, temperature, fading, shape

    def strength(self, done: float) -> float:
        """That of the shortcuts when the part ``done`` of the training is over."""
        left = max(0.0, 1 - done / self._fading)
        return left if self._shape == "linear" else (1 - math.cos(math.pi * left)) / 2

    def settings(self) -> dict[str, str | float]:
        return {
            "teacher": type(self._teacher).__name__,
            "distillation_weight": self._weight,
            "temperature": self._temperature,
            "fading": self._fading,
            "fading_shape": self._shape,
        }

    def start(self, model: nn.Module) -> None:
        like = next(model.parameters())
        self._teacher = deep_copy(self._teacher).to(like.device, like.dtype).eval()

    def progress(self, model: nn.Module, done: float) -> None:
        if isinstance(model, Fading):
            model.fade(self.strength(done))

    def loss(self, cross_entropy: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            taught = self._teacher(images)
        student, teacher = (F.log_softmax(x.to(logits.dtype) / self._temperature, 1) for x in (logits, taught))
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return cross_entropy + self._weight * self._temperature**2 * divergence
