"""CIFAR-10 and CIFAR-100, from the files a user has, through torchvision's dataset classes."""

from __future__ import annotations

from pathlib import Path

import torch

from rmfx.errors import RmfxError
from rmfx.learn.data import Data
from rmfx.learn.images import ImageSplit
from rmfx.vision import import_torchvision

_CLASSES = {"cifar10": 10, "cifar100": 100}
_MEAN, _STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of CIFAR-10's training images, in shades of 0 to 255


def cifar(name: str, root: Path | None) -> Data:
    """The dataset ``cifar10`` or ``cifar100``: training images are moved by up to 4 pixels, and mirrored.

    Raises:
        RmfxError: when ``root`` does not hold its files. Nothing is downloaded.
        RuntimeUnavailableError: when torchvision is not installed.
    """
    if root is None:
        raise RmfxError(f"{name} is read from files: give the folder that holds them")
    dataset = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}[name]
    opener = getattr(import_torchvision().datasets, dataset)
    splits = []
    for is_train in (True, False):
        try:
            read = opener(str(root), train=is_train, download=False)
        except RuntimeError as error:
            raise RmfxError(f"{root} does not hold the files of {dataset} in the form torchvision reads") from error
        images = torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous()
        crop, flip = (4, True) if is_train else (0, False)
        splits.append(ImageSplit(images, torch.tensor(read.targets), _MEAN, _STD, crop, flip))
    return Data(name, splits[0], splits[1], (3, 32, 32), _CLASSES[name])
