"""What is measured in every epoch, and the files that it is written to."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rmfx.errors import RmfxError
from rmfx.files.atomic import replacing


@dataclass(frozen=True)
class Epoch:
    """One epoch of training; number 0 is a network before it, as fine-tuning begins.

    Attributes:
        epoch: counted from 1.
        learning_rate: of its last step.
        loss, accuracy: of the training images as they were learnt, while the network changed; None in epoch 0.
        test_loss, test_accuracy: mean cross entropy and accuracy of the test images, after the epoch.
        ema_test_accuracy: that of the averaged weights, if there are any.
        seconds: that it took.
    """

    epoch: int
    learning_rate: float
    loss: float | None
    accuracy: float | None
    test_loss: float
    test_accuracy: float
    ema_test_accuracy: float | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The record as a JSON-able dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        trained = "" if self.loss is None else f"loss {self.loss:.4f}, accuracy {self.accuracy:.2%}, "
        averaged = "" if self.ema_test_accuracy is None else f", averaged weights {self.ema_test_accuracy:.2%}"
        return f"epoch {self.epoch}: {trained}test accuracy {self.test_accuracy:.2%}{averaged}, {self.seconds:.1f} s"


History = tuple[Epoch, ...]


class Journal:
    """Writes ``metrics.jsonl``, one JSON object per epoch, and TensorBoard's files where tensorboard is installed.

    Args:
        folder: must exist.
        known: epochs of a training that is gone on with; what files say about later ones is replaced.
    """

    def __init__(self, folder: Path, known: Sequence[Epoch] = ()) -> None:
        self._file = folder / "metrics.jsonl"
        self._board = folder / "tensorboard"
        self._epochs = list(known)
        self._write()

    def add(self, epoch: Epoch) -> None:
        """Write one more epoch.

        Raises:
            RmfxError: when the file cannot be written.
        """
        self._epochs.append(epoch)
        self._write()
        if importlib.util.find_spec("tensorboard") is None:
            return
        board = importlib.import_module("torch.utils.tensorboard")
        with closing(board.SummaryWriter(str(self._board), purge_step=epoch.epoch)) as writer:
            for name, value in epoch.to_dict().items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(name, value, epoch.epoch)

    def _write(self) -> None:
        with replacing(self._file, RmfxError) as scratch:
            scratch.write_text("".join(json.dumps(epoch.to_dict()) + "\n" for epoch in self._epochs))
