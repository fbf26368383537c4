"""The main job on real data, with nothing downloaded: train, convert, compare, export, run, time.

A small residual network learns scikit-learn's handwritten digits (1797 images of 8x8 pixels) in seconds. Its
plain form must then give every test image the same class, in torch and in onnxruntime.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rmfx
from rmfx.deploy import runtime
from rmfx.errors import VerificationError
from rmfx.learn.digits import originals
from rmfx.measure.paired import Comparison, compare
from rmfx.report import Report

EPOCHS = 12
_BATCH = 32
_LEARNING_RATE = 4e-3

OnStep = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)
_Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 1, 8, 8]`` in float32, about -1 to 1, and their classes ``[N]`` in int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured; every count of equal predictions is out of ``test_images``."""

    test_images: int
    accuracy: float
    same_in_torch: int
    same_in_onnxruntime: int
    float64_difference: float  # of logits when converted in float64: the largest, relative to the largest logit
    report: Report
    latencies: tuple[Comparison, ...]
    onnx_original: str
    onnx_plain: str

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-able dictionaries and lists."""
        measured = [comparison.to_dict() for comparison in self.latencies]
        return {**vars(self), "report": self.report.to_dict(), "latencies": measured}


class BasicBlock(nn.Module):
    """Two 3x3 convs with BN beside a shortcut, added, then ReLU; a 1x1 conv is the shortcut where the shape changes.

    Maps ``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        projection = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class DigitNet(nn.Module):
    """Four residual blocks, two of them with projection shortcuts, for ``[N, 1, 8, 8]`` images of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(
            BasicBlock(16, 16), BasicBlock(16, 32, 2), BasicBlock(32, 32), BasicBlock(32, 64, 2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.blocks(self.stem(x)))))


def load_digits(seed: int = 0) -> Digits:
    """scikit-learn's digits, shuffled with ``seed``; every fourth image is for testing.

    Raises:
        RuntimeUnavailableError: when scikit-learn is not installed.
    """
    (train_images, train_labels), (test_images, test_labels) = originals(seed)
    return Digits(train_images, train_labels, test_images, test_labels)


def train(digits: Digits, *, seed: int = 0, epochs: int = EPOCHS, on_step: OnStep | None = None) -> DigitNet:
    """Train a :class:`DigitNet` with Adam on the CPU and return it in eval mode.

    Args:
        digits: the images.
        seed: of the weights and of the order of the images; the global generator is left as it was.
        epochs: passes over the training images.
        on_step: called after each epoch.
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        network = DigitNet()
        optimiser = torch.optim.Adam(network.parameters(), _LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
        for epoch in range(epochs):
            for chosen in torch.randperm(len(digits.train_labels)).split(_BATCH):
                loss = F.cross_entropy(network(digits.train_images[chosen]), digits.train_labels[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            schedule.step()
            if on_step is not None:
                on_step("training", epoch + 1, epochs)
    return network.eval()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Images of 8x8 pixels are too small to share: more threads only wait for one another, on a busy machine long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(
    folder: Path, *, seed: int = 0, epochs: int = EPOCHS, pairs: int = 50, on_step: OnStep | None = None
) -> DemoResult:
    """Run the whole demo.

    Args:
        folder: where ``digits.onnx`` and ``digits_plain.onnx`` are written; must exist.
        seed, epochs: of the training.
        pairs: how often each model is timed in each runtime.
        on_step: told what is being done, for progress bars.

    Raises:
        VerificationError: when a single test image changes its class.
        RuntimeUnavailableError: when scikit-learn or onnxruntime is not installed.
    """
    runtime.require()
    tell = on_step or (lambda what, done, total: None)
    digits = load_digits(seed)
    network = train(digits, seed=seed, epochs=epochs, on_step=on_step)
    images, files = digits.test_images, (folder / "digits.onnx", folder / "digits_plain.onnx")
    tell("converting and exporting", 0, 3)
    plain = rmfx.convert(network, images[:1])
    for done, (model, file) in enumerate(zip((network, plain), files, strict=True), start=1):
        tell("converting and exporting", done, 3)
        rmfx.export(model, file, images[:1])
    tell("converting and exporting", 3, 3)
    sessions = [_open_session(file) for file in files]
    with torch.no_grad():
        expected = network(images)
        return DemoResult(
            test_images=len(images),
            accuracy=float((expected.argmax(1) == digits.test_labels).double().mean()),
            same_in_torch=_check_same("torch", expected, plain(images)),
            same_in_onnxruntime=_check_same("onnxruntime", expected, sessions[1](images)),
            float64_difference=_float64_difference(network, images),
            report=rmfx.report(plain),
            latencies=tuple(_measure((network, plain), sessions, images[:1], pairs, tell)),
            onnx_original=str(files[0]),
            onnx_plain=str(files[1]),
        )


def _measure(
    models: Sequence[_Network], sessions: Sequence[_Network], image: Tensor, pairs: int, tell: OnStep
) -> Iterator[Comparison]:
    for done, (where, (original, plain)) in enumerate((("torch", models), ("onnxruntime", sessions))):
        tell("timing", done, 2)
        yield compare(where, partial(original, image), partial(plain, image), pairs=pairs)
    tell("timing", 2, 2)


def _check_same(where: str, expected: Tensor, logits: Tensor) -> int:
    changed = int((expected.argmax(1) != logits.argmax(1)).sum())
    if changed:
        raise VerificationError(
            f"{changed} of {len(expected)} test images change their class in the plain network run by {where}: "
            "this is a bug in rmfx, please report it with the output of `rmfx doctor`"
        )
    return len(expected)


def _float64_difference(network: nn.Module, images: Tensor) -> float:
    """Convert in float64: the float32 weights of the plain network are themselves rounded to about 1e-7."""
    exact, exact_images = copy.deepcopy(network).double(), images.double()
    expected, actual = exact(exact_images), rmfx.convert(exact, exact_images[:1])(exact_images)
    return float((expected - actual).abs().max() / expected.abs().max())


def _open_session(file: Path) -> _Network:
    session = runtime.session(file)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])
