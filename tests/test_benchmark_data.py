"""The images of ``benchmarks.prune``: none is learnt from and chosen or tested by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.prune_data import DATASETS, splits
from rmfx.learn.digits import originals
from rmfx.learn.digits32 import digits32
from rmfx.learn.images import ImageSplit
from tests.cifar_files import write_cifar10


def test_cifar_is_split_in_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.from_numpy(write_cifar10(tmp_path, monkeypatch))
    data, test = splits("cifar10", tmp_path, *DATASETS["cifar10"])
    assert isinstance(data.train, ImageSplit) and isinstance(data.test, ImageSplit) and isinstance(test, ImageSplit)
    held = torch.arange(100) % 6 == 0
    for split, expected in ((data.train, pixels[:100][~held]), (data.test, pixels[:100][held]), (test, pixels[100:])):
        assert torch.equal(split.images.flatten(1), expected)
    assert [(split.crop, split.flip) for split in (data.train, data.test, test)] == [(4, True), (0, False), (0, False)]
    assert (data.shape, data.classes) == ((3, 32, 32), 10)


def test_digits_are_split_by_originals() -> None:
    [(_, labels), _] = originals(0)
    images = 2 * len(labels) + 5
    data, test = splits("digits32", None, images, 40)
    whole = digits32(train_images=images, test_images=40)
    assert isinstance(whole.train, ImageSplit) and isinstance(whole.test, ImageSplit)
    assert isinstance(data.train, ImageSplit) and isinstance(data.test, ImageSplit) and isinstance(test, ImageSplit)
    held = torch.tensor([index % len(labels) % 6 == 0 for index in range(images)])
    assert torch.equal(data.train.images, whole.train.images[~held])
    assert torch.equal(data.test.images, whole.train.images[held])
    assert torch.equal(data.test.labels, labels[torch.arange(images) % len(labels)][held])
    assert torch.equal(test.images, whole.test.images)
    assert (data.train.crop, data.test.crop, data.test.flip) == (2, 0, False)
