"""Datasets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rmfx.errors import RmfxError
from rmfx.learn.cifar import cifar
from rmfx.learn.data import Data
from rmfx.learn.digits import digits
from rmfx.learn.digits32 import digits32
from rmfx.learn.folder import folder


def open_data(name: str, *, root: Path | None = None, seed: int = 0) -> Data:
    """Open the dataset called ``name``.

    Args:
        name: ``"digits"``, scikit-learn's 1,797 handwritten digits of 8x8 pixels; ``"digits32"``, 48,000 images of
            32x32 pixels that are made from them (:mod:`rmfx.learn.digits32`); ``"cifar10"`` or ``"cifar100"``, from the
            files in ``root``; ``"folder:PATH"``, one folder of images per class in ``PATH/train`` and ``PATH/val``.
        root: where the files of CIFAR are.
        seed: which digits are for testing, and how ``digits32`` is drawn.

    Raises:
        RmfxError: for an unknown name, or files that are not there.
        RuntimeUnavailableError: when the package that reads them is not installed.

    >>> data = open_data("digits")
    >>> len(data.train), len(data.test), data.shape, data.classes
    (1347, 450, (1, 8, 8), 10)
    """
    kind, _, path = name.partition(":")
    if kind not in _SOURCES or bool(path) != (kind == "folder"):
        raise RmfxError(f"there is no dataset {name!r}: choose digits, digits32, cifar10, cifar100, or folder:PATH")
    return _SOURCES[kind](Path(path) if path else root, seed)


def _folder(root: Path | None) -> Data:
    assert root is not None
    return folder(root)


_SOURCES: dict[str, Callable[[Path | None, int], Data]] = {
    "digits": lambda root, seed: digits(seed),
    "digits32": lambda root, seed: digits32(seed),
    "cifar10": lambda root, seed: cifar("cifar10", root),
    "cifar100": lambda root, seed: cifar("cifar100", root),
    "folder": lambda root, seed: _folder(root),
}
