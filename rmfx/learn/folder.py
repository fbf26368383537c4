"""Images in folders, one folder per class, through torchvision's ImageFolder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rmfx.errors import RmfxError
from rmfx.learn.data import WHOLE, Data, Share, check_size
from rmfx.vision import import_torchvision

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_EVALUATION_ENLARGED = 256 / 224  # the shorter side before the centre is cut out


def folder(root: Path, size: int = 224, workers: int | None = None) -> Data:
    """The dataset in ``root/train/CLASS/*.jpg`` and ``root/val/CLASS/*.jpg``, as ImageNet is usually laid out.

    Training images are random parts, resized and mirrored; test images are their centres.

    Args:
        root: the folder.
        size: height and width of the images that come out.
        workers: processes that read images; by default one per core, at most 8.

    Raises:
        RmfxError: when a folder is missing or empty, or the two have other classes.
        RuntimeUnavailableError: when torchvision is not installed.
    """
    transforms = import_torchvision().transforms
    end = [transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)]
    train = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *end])
    enlarged = transforms.Resize(round(size * _EVALUATION_ENLARGED))
    plain = transforms.Compose([enlarged, transforms.CenterCrop(size), *end])
    read = {name: _open(root / name) for name in ("train", "val")}
    if read["train"].classes != read["val"].classes:
        raise RmfxError(f"{root}: train and val have different classes (folders)")
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    splits = (FolderSplit(read["train"], train, plain, workers), FolderSplit(read["val"], train, plain, workers))
    return Data(f"folder:{root}", *splits, (3, size, size), len(read["train"].classes))


def _open(path: Path) -> Any:
    try:
        return import_torchvision().datasets.ImageFolder(str(path))
    except FileNotFoundError as error:
        raise RmfxError(f"{path}: one folder of images per class is needed there: {error}") from error


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """A :class:`rmfx.learn.data.Split` read from files, ahead of time and in other processes.

    Attributes:
        images: torchvision's ImageFolder.
        augmenting, plain: from a PIL image to a tensor, for training and for evaluation.
        workers: processes that read.
    """

    images: Any
    augmenting: Any
    plain: Any
    workers: int

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self, size: int, *, order: int | None = None, share: Share = WHOLE, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`rmfx.learn.data.Split.batches` says."""
        check_size(size, share, len(self), order)
        chosen = torch.arange(len(self))
        if order is not None:
            shuffled = torch.randperm(len(self), generator=torch.Generator().manual_seed(order))
            chosen = shuffled[: len(self) // size * size]
        parts = [share.part_of(batch, size).tolist() for batch in chosen.split(size)]
        transform = self.plain if order is None else self.augmenting
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            _Transformed(self.images, transform, order or 0),
            batch_sampler=[part for part in parts if part],
            num_workers=self.workers,
            pin_memory=torch.device(device).type == "cuda",
        )
        for images, labels in _without_traceback(loader):
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _without_traceback(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; what a process that reads them raises comes here wrapped into its traceback."""
    try:
        yield from loader
    except RmfxError as error:
        raise RmfxError(str(error).strip().rpartition(f"{RmfxError.__name__}: ")[2]) from error


@dataclass(frozen=True, eq=False)
class _Transformed(Dataset[tuple[Tensor, Tensor]]):
    """Each image transformed under a seed of its own: the same whichever process reads it, and when."""

    images: Any
    transform: Any
    seed: int

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        try:
            image, label = self.images[index]
        except Exception as problem:  # Pillow raises many classes
            raise RmfxError(f"{self.images.samples[index][0]} cannot be read as an image: {problem}") from problem
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + index)
            return self.transform(image), torch.tensor(label)
