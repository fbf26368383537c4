"""A small dataset and a small network for tests of training."""

from __future__ import annotations

import torch
from torch import nn

from rmfx.demo import BasicBlock
from rmfx.learn.data import Data
from rmfx.learn.images import ImageSplit
from rmfx.learn.sources import open_data

FACTORY = """
from learning import tiny
def net():
    return tiny(dropout=0.2)
"""


def small(train: int = 256, test: int = 96) -> Data:
    """The first digits; training images move by up to a pixel."""
    data = open_data("digits")
    assert isinstance(data.train, ImageSplit) and isinstance(data.test, ImageSplit)
    images, tested = data.train, data.test
    return Data(
        "small",
        ImageSplit(images.images[:train], images.labels[:train], images.mean, images.std, crop=1),
        ImageSplit(tested.images[:test], tested.labels[:test], tested.mean, tested.std),
        data.shape,
        data.classes,
    )


def tiny(*, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """One residual block among batch norms of all kinds, for ``[n, 1, 8, 8]``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            BasicBlock(8, 8),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32, 16),
            nn.BatchNorm1d(16, momentum=None),
            nn.ReLU(),
            nn.Linear(16, 10),
        )
