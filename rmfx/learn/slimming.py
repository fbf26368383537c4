"""Network slimming (Liu et al., 2017; the paper's sections 3.4 and 4.4): train so that many channels can go.

``loss = cross entropy + r * (factor * sum |gamma| + shortcuts * sum s)`` over the scales ``gamma`` of batch norms and
``s`` of shortcuts (:mod:`rmfx.pruning.scales`), which are held at 0 or above. ``r`` rises from 0 to 1 over the first
part of the training. A subgradient step overshoots 0 and never lands on it, so scales of shortcuts below ``OFF`` are
set to 0: only there does the shortcut cost nothing. Their gradients may still lift them again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmfx.errors import RmfxError
from rmfx.learn.objective import Objective
from rmfx.learn.recipe import Recipe
from rmfx.learn.schedule import rate_at
from rmfx.modules import ChannelAffine

OFF = 1e-4  # they are 1 at first
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Slimming(Objective):
    """Cross entropy, and L1 on the scales that channels are ranked by.

    Args:
        factor: of the scales of batch norms; the paper takes 1e-4 to 1e-3. See :meth:`reach` for short trainings.
        shortcuts: of the scales of shortcuts; by default ``factor``.
        ramp: the part of the training over which both rise from 0.

    Raises:
        RmfxError: for a number out of range; when training starts, for a network without any scale.

    >>> slimming = Slimming(1e-4, ramp=0.5)
    >>> [slimming.strength(done) for done in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 0.5, 1.0, 1.0]
    """

    def __init__(self, factor: float, shortcuts: float | None = None, *, ramp: float = 0.2) -> None:
        self._factor, self._shortcuts, self._ramp = factor, factor if shortcuts is None else shortcuts, ramp
        if not (self._factor >= 0 and self._shortcuts >= 0 and 0 <= ramp <= 1):
            raise RmfxError(
                f"slimming: factors must not be negative and ramp be from 0 to 1, got {self._factor}, "
                f"{self._shortcuts} and {ramp}"
            )
        self._norms: list[nn.Parameter] = []
        self._scales: list[nn.Parameter] = []
        self._done = 0.0

    def strength(self, done: float) -> float:
        """That of the penalty when the part ``done`` of the training is over."""
        return min(1.0, done / self._ramp) if self._ramp else 1.0

    def reach(self, recipe: Recipe, steps: int) -> tuple[float, float]:
        """How far scales of norms, and of shortcuts, come down where nothing holds them: they are 1 at first.

        ``factor / (1 - momentum) * sum of rate * r`` over all steps. What papers take, 1e-4, is for trainings of a
        hundred thousand steps; in a thousand it moves nothing.

        Args:
            recipe: of the training.
            steps: of one epoch.

        >>> recipe = Recipe(epochs=160, batch=64)
        >>> [round(Slimming(1e-4, 1e-2).reach(recipe, steps)[0], 2) for steps in (780, 10)]
        [5.01, 0.06]
        """
        total = recipe.epochs * steps
        weighed = sum(rate_at(recipe, step, steps) * self.strength(step / total) for step in range(total))
        moved = weighed / (1 - recipe.momentum)
        return self._factor * moved, self._shortcuts * moved

    def settings(self) -> dict[str, str | float]:
        return {"sparsity": self._factor, "shortcut_sparsity": self._shortcuts, "sparsity_ramp": self._ramp}

    def start(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(getattr(layer, "weight", None), nn.Parameter)]
        self._norms = [layer.weight for layer in layers if isinstance(layer, _NORMS)]
        scales = [layer for layer in layers if isinstance(layer, ChannelAffine) and layer.weight.dim()]
        self._scales = [scale.weight for scale in scales]  # type: ignore[misc]
        if not self._norms and not self._scales:
            raise RmfxError("slimming needs batch norms or scales of shortcuts: this network has none")

    def progress(self, model: nn.Module, done: float) -> None:
        self._done = done
        with torch.no_grad():
            for scale in self._scales:
                scale[scale < OFF] = 0  # also below 0: a carried channel must pass a ReLU

    def loss(self, cross_entropy: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        penalty = cross_entropy.new_zeros(())
        for factor, weights in ((self._factor, self._norms), (self._shortcuts, self._scales)):
            if weights:
                penalty = penalty + factor * torch.cat([weight.abs().flatten() for weight in weights]).sum()
        return cross_entropy + self.strength(self._done) * penalty
