"""Files in the form in which CIFAR-10 is published, with other pixels."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Write six batches of 20 images into ``root``: their pixels, ``[120, 3072]``, the last 20 for the test.

    The published files have published checksums; these are others, so only that comparison is left out.
    """
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (120, 3072), dtype=np.uint8)
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = pixels[20 * index : 20 * index + 20]
        (folder / name).write_bytes(pickle.dumps({"data": part, "labels": [int(p[0]) % 10 for p in part]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    return pixels
