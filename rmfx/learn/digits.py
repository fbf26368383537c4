"""scikit-learn's handwritten digits: 1,797 images of 8x8 pixels that come with the package."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from rmfx.errors import RuntimeUnavailableError
from rmfx.learn.data import Data
from rmfx.learn.images import ImageSplit


def originals(seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The images ``[N, 1, 8, 8]`` from -1 to 1 in float32 and their labels ``[N]``: for training, and for testing.

    They are shuffled with ``seed``; every fourth one is for testing.

    Raises:
        RuntimeUnavailableError: when scikit-learn is not installed.

    >>> [len(labels) for _, labels in originals()]
    [1347, 450]
    """
    if importlib.util.find_spec("sklearn") is None:
        raise RuntimeUnavailableError(
            "scikit-learn is not installed, and the digits come with it: pip install 'rmfx[demo]'"
        )
    raw = importlib.import_module("sklearn.datasets").load_digits()
    images = torch.from_numpy(raw.images).float().sub(8).div(8).unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[::4], torch.cat([order[i::4] for i in (1, 2, 3)])
    return (images[train], labels[train]), (images[test], labels[test])


def digits(seed: int = 0) -> Data:
    """The dataset ``digits``."""
    train, test = (ImageSplit(images, labels, (0.0,), (1.0,)) for images, labels in originals(seed))
    return Data("digits", train, test, (1, 8, 8), 10)
