"""Datasets: disjoint, reproducible, cut into equal shares, from real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rmfx import RmfxError
from rmfx.learn.data import Share
from rmfx.learn.digits import originals
from rmfx.learn.digits32 import digits32
from rmfx.learn.images import ImageSplit
from rmfx.learn.sources import open_data
from tests.cifar_files import write_cifar10

Batches = list[tuple[Tensor, Tensor]]


def numbered(count: int, **options: object) -> ImageSplit:
    """Images whose every pixel tells the image and its place."""
    places = torch.arange(36.0).view(1, 1, 6, 6) + 1
    images = places + 100 * torch.arange(count).view(-1, 1, 1, 1)
    return ImageSplit(images, torch.arange(count), (0.0,), (1.0,), **options)  # type: ignore[arg-type]


def same(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


def test_evaluation_sees_every_image_once_and_in_order() -> None:
    split = numbered(11, crop=2, flip=True)
    batches = list(split.batches(4))
    assert [len(labels) for _, labels in batches] == [4, 4, 3]
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(11))
    assert torch.equal(torch.cat([images for images, _ in batches]), split.images)


def test_training_order_is_a_permutation_that_the_seed_chooses() -> None:
    split = numbered(11)
    labels = torch.cat([labels for _, labels in split.batches(4, order=1)])
    assert len(set(labels.tolist())) == 8
    assert same(list(split.batches(4, order=1)), list(split.batches(4, order=1)))
    assert not same(list(split.batches(4, order=1)), list(split.batches(4, order=2)))


@pytest.mark.parametrize("order", [None, 3])
def test_shares_together_are_the_whole_batch(order: int | None) -> None:
    split = numbered(11, crop=2, flip=True)
    whole = list(split.batches(4, order=order))
    parts = [list(split.batches(4, order=order, share=Share(rank, 2))) for rank in range(2)]
    for index, (images, labels) in enumerate(whole):
        shares = [part[index] for part in parts if index < len(part)]
        assert torch.equal(torch.cat([part[1] for part in shares]), labels)
        assert torch.equal(torch.cat([part[0] for part in shares]), images)


def test_augmentation_moves_and_mirrors_and_nothing_else() -> None:
    split = numbered(400, crop=2, flip=True)
    (images, labels), *_ = split.batches(400, order=0)
    moved = set()
    for image, label in zip(images[:, 0], labels, strict=True):
        shown = image - 100 * label * (image > 0)
        padded = torch.nn.functional.pad(torch.arange(36.0).view(6, 6) + 1, (2, 2, 2, 2))
        fits = [
            (down, right, flipped)
            for down in range(5)
            for right in range(5)
            for flipped in (False, True)
            if torch.equal(shown.flip(1) if flipped else shown, padded[down : down + 6, right : right + 6])
        ]
        assert len(fits) == 1
        moved.add(fits[0])
    assert len(moved) == 50  # every place, mirrored or not


def test_batches_that_cannot_be_made_are_refused() -> None:
    split = numbered(6)
    with pytest.raises(RmfxError, match="a batch of 3 images cannot be shared out equally among 2 processes"):
        next(split.batches(3, share=Share(0, 2)))
    with pytest.raises(RmfxError, match="a batch of 7 images is more than the 6 there are to train on"):
        next(split.batches(7, order=0))
    assert len(list(split.batches(7))) == 1


def test_unknown_datasets_are_refused(tmp_path: Path) -> None:
    for name in ("digit", "folder", "digits:x", "folder:"):
        with pytest.raises(RmfxError, match=f"there is no dataset '{name}': choose digits, digits32"):
            open_data(name)
    with pytest.raises(RmfxError, match="cifar10 is read from files: give the folder that holds them"):
        open_data("cifar10")
    with pytest.raises(RmfxError, match="does not hold the files of CIFAR100"):
        open_data("cifar100", root=tmp_path)
    with pytest.raises(RmfxError, match="one folder of images per class is needed there"):
        open_data(f"folder:{tmp_path}")


def test_digits_for_training_and_testing_are_disjoint() -> None:
    (train, _), (test, _) = originals(seed=3)
    assert len(train) + len(test) == 1797
    seen = {image.numpy().tobytes() for image in train}
    assert not any(image.numpy().tobytes() in seen for image in test)


def test_digits32_is_what_its_seed_says() -> None:
    first, again, other = (digits32(seed, 300, 100) for seed in (0, 0, 1))
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.labels, again.test.labels)
    assert not torch.equal(first.train.images, other.train.images)


def test_digits32_is_varied_and_uses_its_range() -> None:
    data = digits32(0, 300, 300)
    images = data.train.images.float()
    assert data.train.images.dtype == torch.uint8 and images.shape == (300, 3, 32, 32)
    assert images.mean().sub(127.5).abs() < 5 and 40 < images.std() < 70
    assert (images - images.flip(0)).abs().mean() > 20
    assert set(data.train.labels.tolist()) == set(range(10))
    assert not torch.equal(data.train.images, data.test.images)
    (normalised, _), *_ = data.train.batches(300)
    assert normalised.dtype == torch.float32 and normalised.abs().max() < 2.1


def test_cifar_is_read_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar10(tmp_path, monkeypatch)
    data = open_data("cifar10", root=tmp_path)
    assert (len(data.train), len(data.test), data.shape, data.classes) == (100, 20, (3, 32, 32), 10)
    assert np.array_equal(data.test.images.numpy().reshape(20, -1), pixels[100:])
    assert (data.train.crop, data.train.flip, data.test.crop, data.test.flip) == (4, True, 0, False)


def test_folders_are_read_alike_by_any_number_of_processes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 3)):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{index}.png")
    data = open_data(f"folder:{tmp_path}")
    assert (len(data.train), len(data.test), data.shape, data.classes) == (10, 6, (3, 224, 224), 2)
    object.__setattr__(data.train, "workers", 0)
    alone = list(data.train.batches(4, order=5))
    object.__setattr__(data.train, "workers", 2)
    assert same(alone, list(data.train.batches(4, order=5)))
    assert [len(labels) for _, labels in alone] == [4, 4]
    assert [labels.tolist() for _, labels in data.test.batches(4)] == [[0, 0, 0, 1], [1, 1]]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(workers: int, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "torn.png").write_bytes(b"\x89PNG torn")
    data = open_data(f"folder:{tmp_path}")
    object.__setattr__(data.train, "workers", workers)
    with pytest.raises(RmfxError) as caught:
        list(data.train.batches(1))
    assert str(caught.value).startswith(f"{tmp_path}/train/cat/torn.png cannot be read as an image: ")
    assert "Traceback" not in str(caught.value)
