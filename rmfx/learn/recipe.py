"""How a network is trained: every number that the result depends on, in one frozen value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from rmfx.errors import RmfxError

Schedule = Literal["cosine", "step"]
Precision = Literal["float32", "bf16", "fp16"]

_POSITIVE = ("epochs", "batch", "learning_rate", "step_every", "step_factor")
_NOT_NEGATIVE = ("momentum", "weight_decay", "warmup", "smoothing", "seed")
_WHOLE = ("epochs", "batch", "step_every", "seed")
_BELOW_ONE = ("momentum", "smoothing")


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with momentum, and what goes with it.

    Attributes:
        epochs: passes over the training images.
        batch: images of one step, over all processes.
        learning_rate: the highest one; :func:`rmfx.learn.schedule.rate_at` says how it changes.
        momentum, nesterov: of the gradient.
        weight_decay: of weights with two or more dimensions; norms, biases and slopes are left alone.
        schedule: ``"cosine"``, down to 0 at the end, or ``"step"``: times ``step_factor`` every ``step_every`` epochs.
        warmup: epochs, or parts of one, in which the learning rate rises linearly first.
        smoothing: of the labels: the part of the probability that is shared out among all classes.
        precision: ``"float32"``: that of the parameters, whatever it is; ``"bf16"`` or ``"fp16"``: mixed.
        ema: decay of an exponential moving average of the weights, such as 0.999, evaluated beside them.
        clip: the largest norm of the gradient.
        seed: of the order of the images, of their augmentation and of dropout.

    Raises:
        RmfxError: for a value that makes no sense; names it.

    >>> Recipe(epochs=5, learning_rate=0.05).momentum
    0.9
    >>> Recipe(epochs=0)
    Traceback (most recent call last):
    rmfx.errors.RmfxError: recipe: epochs must be above 0, got 0
    """

    epochs: int = 30
    batch: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    step_every: int = 30
    step_factor: float = 0.1
    warmup: float = 0.0
    smoothing: float = 0.0
    precision: Precision = "float32"
    ema: float | None = None
    clip: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _WHOLE:
            _demand(isinstance(getattr(self, name), int), name, "must be a whole number", self)
        for name in _POSITIVE:
            _demand(0 < getattr(self, name) < float("inf"), name, "must be above 0", self)
        for name in _NOT_NEGATIVE:
            _demand(0 <= getattr(self, name) < float("inf"), name, "must not be negative", self)
        for name in _BELOW_ONE:
            _demand(getattr(self, name) < 1, name, "must be below 1", self)
        _demand(self.schedule in get_args(Schedule), "schedule", f"must be one of {get_args(Schedule)}", self)
        _demand(self.precision in get_args(Precision), "precision", f"must be one of {get_args(Precision)}", self)
        _demand(self.warmup < self.epochs, "warmup", f"must be shorter than the {self.epochs} epochs", self)
        _demand(self.ema is None or 0 < self.ema < 1, "ema", "must be between 0 and 1", self)
        _demand(self.clip is None or self.clip > 0, "clip", "must be above 0", self)
        _demand(not self.nesterov or self.momentum > 0, "nesterov", "needs momentum", self)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a JSON-able dictionary."""
        return asdict(self)


def _demand(holds: bool, name: str, rule: str, recipe: Recipe) -> None:
    if not holds:
        raise RmfxError(f"recipe: {name} {rule}, got {getattr(recipe, name)!r}")
