"""Labelled images, and how they are cut into batches and shared out among processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rmfx.errors import RmfxError


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one of ``count`` processes takes: equal, contiguous, in order of rank."""

    rank: int = 0
    count: int = 1

    def part_of(self, batch: Tensor, size: int) -> Tensor:
        """This share of ``batch``, a global batch of ``size``, or what is left of one at the end of a split.

        >>> Share(1, 2).part_of(torch.arange(6), 6).tolist(), Share(1, 2).part_of(torch.arange(4), 6).tolist()
        ([3, 4, 5], [3])
        """
        part = size // self.count
        return batch[self.rank * part : (self.rank + 1) * part]


WHOLE = Share()


class Split(Protocol):
    """One half of a dataset, for training or for testing."""

    def __len__(self) -> int:
        """How many images there are."""

    def batches(
        self, size: int, *, order: int | None = None, share: Share = WHOLE, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images ``[n, C, H, W]`` in float32, normalised, and labels ``[n]`` in int64.

        Args:
            size: of a global batch, over all shares.
            order: None: all images, in order, as they are. A number: shuffled and augmented by it as the seed, the same
                for all shares; an incomplete last batch is left out.
            share: the part of each global batch to yield.
            device: where the tensors are wanted.

        Raises:
            RmfxError: when ``size`` cannot be shared out equally, or is larger than the split (``order`` given).
        """


@dataclass(frozen=True)
class Data:
    """A dataset: ``shape`` is that of one image, ``(channels, height, width)``."""

    name: str
    train: Split
    test: Split
    shape: tuple[int, int, int]
    classes: int


def check_size(size: int, share: Share, images: int, order: int | None) -> None:
    """Refuse a global batch that cannot be made.

    Raises:
        RmfxError: as in :meth:`Split.batches`.
    """
    if size < 1 or size % share.count:
        raise RmfxError(f"a batch of {size} images cannot be shared out equally among {share.count} processes")
    if order is not None and size > images:
        raise RmfxError(f"a batch of {size} images is more than the {images} there are to train on: take a smaller one")
