"""The images of ``benchmarks.prune``: to train on, to choose by, and for the final test."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from rmfx.learn.data import Data, Split
from rmfx.learn.digits import originals
from rmfx.learn.digits32 import digits32
from rmfx.learn.images import ImageSplit
from rmfx.learn.sources import open_data

DATASETS = {  # all of 3x32x32: images to train on and to choose by, and for the final test
    "digits32": (24_000, 12_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
}
HELD_OUT = 6  # every sixth original is for validation


@cache
def splits(name: str, root: Path | None, images: int, test_images: int) -> tuple[Data, Split]:
    """Data to train on and to choose by, and the images for the final test: all made from different originals.

    Args:
        name: one of ``DATASETS``.
        root: where the files of CIFAR are.
        images: how many are made for training and validation, or, of CIFAR, are taken at most.
        test_images: likewise.
    """
    if name == "digits32":
        drawn = digits32(train_images=images, test_images=test_images)
        [(_, labels), _] = originals(0)
        count, crop = len(labels), 2
    else:
        drawn = open_data(name, root=root)
        count, crop = images, 4  # every image is an original
    whole, test = drawn.train, drawn.test
    assert isinstance(whole, ImageSplit) and isinstance(test, ImageSplit)
    whole = whole.only(slice(images))
    held = torch.arange(len(whole)) % count % HELD_OUT == 0
    learnt, chosen = replace(whole.only(~held), crop=crop), replace(whole.only(held), crop=0, flip=False)
    return Data(f"{name}, split", learnt, chosen, drawn.shape, drawn.classes), test.only(slice(test_images))
