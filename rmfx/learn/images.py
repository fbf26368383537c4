"""Images that fit into memory, moved to the device once and cut into batches there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rmfx.learn.data import WHOLE, Share, check_size


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """A :class:`rmfx.learn.data.Split` in memory.

    Attributes:
        images: ``[N, C, H, W]``, uint8 or float32.
        labels: ``[N]``, int64.
        mean, std: per channel, of the numbers in ``images``.
        crop: pixels by which an image moves at random while training, in both directions, over a border of zeros.
        flip: whether images are mirrored at random while training.

    >>> split = ImageSplit(torch.zeros(5, 1, 2, 2), torch.arange(5), (0.0,), (1.0,))
    >>> [labels.tolist() for _, labels in split.batches(2)]
    [[0, 1], [2, 3], [4]]
    >>> [len(labels) for _, labels in split.batches(2, order=0)]
    [2, 2]
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: int = 0
    flip: bool = False
    _placed: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, which: Tensor | slice) -> ImageSplit:
        """The images that ``which`` indexes, with all else as it is.

        >>> split = ImageSplit(torch.zeros(5, 1, 2, 2), torch.arange(5), (0.0,), (1.0,))
        >>> split.only(slice(2)).labels.tolist(), split.only(split.labels % 2 == 0).labels.tolist()
        ([0, 1], [0, 2, 4])
        """
        return replace(self, images=self.images[which], labels=self.labels[which])

    def batches(
        self, size: int, *, order: int | None = None, share: Share = WHOLE, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`rmfx.learn.data.Split.batches` says."""
        check_size(size, share, len(self), order)
        device = torch.device(device)
        images, labels, mean, std = self._on(device)
        if order is None:
            for places in torch.arange(len(self)).split(size):
                if len(part := share.part_of(places, size)):
                    kept = slice(int(part[0]), int(part[-1]) + 1)
                    yield (images[kept].float() - mean) / std, labels[kept]
            return
        # Everything random is drawn at once, for all shares alike, and moved once: a step waits for no transfer.
        drawn = self._draw(size, torch.Generator().manual_seed(order)).to(device)
        for batch in drawn.split(size, 1):
            chosen, down, right, mirrored = share.part_of(batch.T, size).T
            moved = images[chosen]
            if self.crop or self.flip:
                moved = _move(moved, down, right, mirrored, self.crop)
            yield (moved.float() - mean) / std, labels[chosen]

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Images, labels, mean and standard deviation, moved there when they are first wanted there."""
        if device not in self._placed:
            scales = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
            self._placed[device] = tuple(x.to(device) for x in (self.images, self.labels, *scales))
        return self._placed[device]

    def _draw(self, size: int, random: torch.Generator) -> Tensor:
        """Which image, how far down and right, and whether mirrored: ``[4, N]``, a multiple of ``size`` images."""
        count = len(self) // size * size
        chosen = torch.randperm(len(self), generator=random)[:count]
        down, right = torch.randint(0, 2 * self.crop + 1, (2, count), generator=random)
        mirrored = torch.rand(count, generator=random) < (0.5 if self.flip else 0.0)
        return torch.stack([chosen, down, right, mirrored.long()])


def _move(images: Tensor, down: Tensor, right: Tensor, mirrored: Tensor, crop: int) -> Tensor:
    """Cut each image at its own place out of itself with a border of ``crop`` zeros."""
    height, width = images.shape[2:]
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = right[:, None] + torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None] > 0, columns.flip(1), columns)
    which = torch.arange(len(images), device=images.device)
    padded = F.pad(images, (crop,) * 4)
    return padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
