"""An exponential moving average of a network's weights.

``torch.optim.swa_utils.AveragedModel`` either leaves buffers out, or averages whole numbers among them, too, and cuts
off what is behind the point; and it copies the network, with whatever state it has at that time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average of the parameters and buffers of ``model``; buffers of whole numbers are the model's.

    The decay of the first steps is smaller, ``(1 + updates) / (10 + updates)``, so that the average soon forgets the
    random weights that training begins with.

    Args:
        model: is watched, not copied.
        decay: of the average at each update, such as 0.999.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> with torch.no_grad(): _ = layer.weight.fill_(0.0)
    >>> average = Average(layer, 0.999)
    >>> with torch.no_grad(): _ = layer.weight.fill_(1.0)
    >>> average.update()
    >>> with average.applied():
    ...     print(f"{layer.weight.item():.2f}")
    0.90
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._updates = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._watched = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
        self._averaged = [tensor.clone() for tensor in self._watched]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._averaged, self._watched, 1 - decay)
        self._updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights until the block ends."""
        own = [tensor.clone() for tensor in self._watched]
        self.apply()
        try:
            yield
        finally:
            torch._foreach_copy_(self._watched, own)

    def apply(self) -> None:
        """Give the model the averaged weights for good."""
        torch._foreach_copy_(self._watched, self._averaged)

    def state_dict(self) -> dict[str, int | list[Tensor]]:
        """What :meth:`load_state_dict` needs, tensors and numbers."""
        return {"updates": self._updates, "averaged": list(self._averaged)}

    def load_state_dict(self, state: dict[str, int | list[Tensor]]) -> None:
        """Go on where another average of the same network was."""
        updates, averaged = state["updates"], state["averaged"]
        assert isinstance(updates, int) and isinstance(averaged, list)
        self._updates = updates
        torch._foreach_copy_(self._averaged, averaged)
