"""The learning rate of every step."""

from __future__ import annotations

import math

from rmfx.learn.recipe import Recipe


def rate_at(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of one step.

    Args:
        recipe: its ``learning_rate`` is reached at the end of the warm-up.
        step: counted from 0, over all epochs.
        steps: of one epoch.

    >>> [round(rate_at(Recipe(epochs=4, learning_rate=1.0), step, 1), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    >>> stepped = Recipe(epochs=4, learning_rate=1.0, schedule="step", step_every=2, warmup=1)
    >>> [round(rate_at(stepped, step, 2), 3) for step in range(8)]
    [0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1]
    """
    rising = recipe.warmup * steps
    if step < rising:
        return recipe.learning_rate * min(1.0, (step + 1) / rising)
    if recipe.schedule == "step":
        return recipe.learning_rate * recipe.step_factor ** (step // steps // recipe.step_every)
    progress = (step - rising) / (recipe.epochs * steps - rising)
    return recipe.learning_rate * (1 + math.cos(math.pi * progress)) / 2
