"""What training minimises, and what happens to the network meanwhile: the interface for recipes of other papers."""

from __future__ import annotations

from torch import Tensor, nn


class Objective:
    """The cross entropy with the labels, and nothing else; subclasses add to it (:mod:`rmfx.learn.distill`)."""

    def settings(self) -> dict[str, str | float]:
        """What a resumed training must have in common with the one it goes on with, by name."""
        return {}

    def start(self, model: nn.Module) -> None:
        """Called once before training, with ``model`` on the device, in the dtype that it has while training."""

    def progress(self, model: nn.Module, done: float) -> None:
        """Called before every step and at the end of every epoch; ``done`` goes from 0 to 1, which is the end."""

    def loss(self, cross_entropy: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """The loss of one step, a tensor of one number.

        Args:
            cross_entropy: of the labels; one number, too.
            logits: ``[n, classes]``, in at least float32.
            images: ``[n, C, H, W]``, what the network was given.
        """
        return cross_entropy
