"""Int8, residual and plain side by side: accuracy of trained networks, and speed.

Two small networks are trained on ``digits32`` for a minute or two each: a ResNet-8, whose residual inputs are never
negative, and inverted residuals with ReLU (a small MnasNet), whose residual inputs have both signs. Each is quantised
as it is, and plain with each carrier, with and without ``rmfx.balance``: by onnxruntime's static quantisation
(``rmfx.quantise``: one scale per filter and per activation), and by torch's pt2e flow with the quantiser for x86, which
is in torchao (``pip install 'rmfx[int8]'``; left out, and said so, where it is not installed).

Accuracy is that on 4,000 test images, whose standard error is 0.6 points: small differences mean nothing. ``moved``
tells more: root mean square of what the logits move on the test images, by that of the logits.

The limits are those of plain, balanced networks in onnxruntime. The PReLU of the carrier ``masked`` has no int8 form
there, so it runs in float32 and is rounded on both sides. ``shift`` is exact only within the ranges that it is
given, here those of the calibration data and a quarter more: its column float32 shows what test images make of that.

Speed is that of onnxruntime on one thread, in interleaved pairs with a 95 % interval: of the two networks, and of
torchvision's MnasNet and ResNet-18 with random weights at 224x224, batch 1. Above 1, the plain form is slower. Speed
has no limit here: it is told as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx, nn

import rmfx
from benchmarks.common import CONSOLE, Figure, finish, options, torchvision_model, tracked
from rmfx.learn.data import Data
from rmfx.learn.digits32 import digits32
from rmfx.learn.recipe import Recipe
from rmfx.learn.trainer import train
from rmfx.measure.paired import compare
from rmfx.measure.runners import session_call
from rmfx.measure.target import Target
from rmfx.models import cifar_resnet
from rmfx.models.layers import ConvNet, conv_bn, conv_bn_relu

RECIPE = Recipe(epochs=6, batch=64, learning_rate=0.1, warmup=0.5)
CALIBRATION_BATCHES = 8  # of 64 images to train on
PAIRS = 50
LOST, MOVED = 1.0, 1.25  # limits: points of accuracy lost in int8; moved by the plain network over the residual one


class InvertedResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project without activation, with ReLU: the block of MnasNet."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        inner = 3 * in_channels
        layers = [*conv_bn(in_channels, inner), nn.ReLU(), *conv_bn(inner, inner, 3, stride, inner), nn.ReLU()]
        self.branch = nn.Sequential(*layers, *conv_bn(inner, out_channels))
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.residual else self.branch(x)


def inverted() -> nn.Module:
    """A stem, five blocks, three of them with a shortcut, and a classifier."""
    sizes = ((16, 24, 1), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 48, 1))
    return ConvNet(conv_bn_relu(3, 16, 3, 2), [InvertedResidual(*size) for size in sizes], 48, 10)


TRAINED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "resnet8": (lambda: cifar_resnet(8), ("auto",)),
    "inverted residuals": (inverted, ("masked", "split", "shift")),
}
LARGE = {"mnasnet1_0": ("masked", "split", "shift"), "resnet18": ("auto",)}


@cache
def images() -> Data:
    """The data, drawn once."""
    return digits32(train_images=20_000, test_images=4_000)


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """Build and train a network; the same bits each time on one machine."""
    torch.manual_seed(0)
    network = make()
    train(network, images(), RECIPE, device="cpu")
    return network.eval()


def plain(network: nn.Module, carrier: str, data: list[Tensor]) -> fx.GraphModule:
    """The plain network; for ``shift`` with the ranges measured on ``data``, whatever bits it costs."""
    wish: dict[str, Any] = {"carrier": carrier}
    if carrier == "shift":
        wish |= {"value_ranges": rmfx.bounds_from_data(network, data), "shift_bits": math.inf, "verify": False}
    return rmfx.convert(network, data[0][:1], **wish)


def forms_of(network: nn.Module, carriers: tuple[str, ...], data: list[Tensor]) -> Iterator[tuple[str, fx.GraphModule]]:
    """The network in normal form, and plain; each as it comes, and balanced."""
    forms = {"residual": rmfx.convert(network, data[0][:1], policy=[])}
    for name, form in {**forms, **{carrier: plain(network, carrier, data) for carrier in carriers}}.items():
        yield name, form
        yield f"{name}, balanced", rmfx.balance(form, data)


def judged(answer: Callable[[Tensor], Tensor], network: nn.Module) -> dict[str, float]:
    """Accuracy in percent of ``answer``, and how far its logits are from those of ``network``, on the test images."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for x, labels in images().test.batches(250):
            found.append((answer(x), network(x), labels))
    logits, expected, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    right = (logits.argmax(1) == labels).double().mean()
    return {"accuracy": 100 * float(right), "moved": float((logits - expected).norm() / expected.norm())}


def in_pt2e(form: fx.GraphModule, data: list[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """``form`` quantised by torch's own flow; ``None`` where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return None
    flow = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantiser = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    exported = torch.export.export(form, (data[0],), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    prepared = flow.prepare_pt2e(exported, quantiser)
    with torch.no_grad():
        for batch in data:
            prepared(batch)
    return flow.convert_pt2e(prepared)  # type: ignore[no-any-return]


def accuracies(network: nn.Module, carriers: tuple[str, ...], folder: Path) -> dict[str, dict[str, Any]]:
    """Of each form in float32 and in int8; leaves the files in ``folder``."""
    calibration = [x for x, _ in images().train.batches(64, order=0)][:CALIBRATION_BATCHES]
    rows: dict[str, dict[str, Any]] = {}
    for name, form in forms_of(network, carriers, calibration):
        file = rmfx.export(form, folder / f"{name}.onnx", calibration[0][:1])
        quantised = rmfx.quantise(file, folder / f"{name} int8.onnx", calibration)
        rows[name] = {"bytes": [quantised.bytes_before, quantised.bytes_after]}
        for how, path in (("float32", file), ("onnxruntime", quantised.path)):
            with rmfx.Session(path, threads=1) as session:
                rows[name][how] = judged(lambda x: session.run(x)[0], network)
        converted = in_pt2e(form, calibration)
        rows[name]["pt2e"] = None if converted is None else judged(converted, network)
    return rows


def speeds(names: list[str], x: Tensor, folder: Path) -> dict[str, dict[str, Any]]:
    """Latency of each form over that of the residual one, in float32 and in int8, from the files in ``folder``."""
    target = Target("onnxruntime", threads=1)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        for kind in ("", " int8"):
            first, second = (session_call(folder / f"{form}{kind}.onnx", (x,), target) for form in ("residual", name))
            measured = compare(f"{name}{kind}", first, second, pairs=PAIRS)
            rows[f"{name}{kind}"] = {key: value for key, value in measured.to_dict().items() if key != "samples_ms"}
    return rows


def large(name: str, carriers: tuple[str, ...], folder: Path) -> dict[str, dict[str, Any]]:
    """Speeds of a network of torchvision at 224x224; its weights are random, so nothing is said of its accuracy."""
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    network = torchvision_model(name)
    forms = {"residual": network, **{carrier: plain(network, carrier, [x]) for carrier in carriers}}
    for form, module in forms.items():
        file = rmfx.export(module, folder / f"{form}.onnx", x, check=False)
        rmfx.quantise(file, folder / f"{form} int8.onnx", [x])
    return speeds([*carriers], x, folder)


def figures_of(subject: str, rows: dict[str, dict[str, Any]]) -> Iterator[Figure]:
    """What has a limit: plain networks, balanced, in onnxruntime."""
    for name, row in rows.items():
        if name.endswith(", balanced") and not name.startswith("residual"):
            lost = row["float32"]["accuracy"] - row["onnxruntime"]["accuracy"]
            moved = row["onnxruntime"]["moved"] / rows["residual"]["onnxruntime"]["moved"]
            yield Figure(subject, f"{name}: points of accuracy lost", lost, LOST)
            yield Figure(subject, f"{name}: logits moved, by those of the residual one", moved, MOVED)


def show(samples: dict[str, dict[str, Any]]) -> None:
    """Print all accuracies and all speeds."""
    table = Table("network", "form", *(f"{how}: accuracy, moved" for how in ("float32", "onnxruntime", "pt2e")))
    speed = Table("network", "form", "residual", "plain", "plain / residual", "95 %")
    for subject, sample in samples.items():
        for name, row in sample.get("accuracy", {}).items():
            cells = (row[how] for how in ("float32", "onnxruntime", "pt2e"))
            shown = ("-" if cell is None else f"{cell['accuracy']:.2f} %, {cell['moved']:.2%}" for cell in cells)
            table.add_row(subject, name, *shown)
        for name, row in sample["speed"].items():
            low, high = row["interval"]
            latencies = (f"{row[key]:.3f} ms" for key in ("first_ms", "second_ms"))
            speed.add_row(subject, name, *latencies, f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}")
    CONSOLE.print(table)
    CONSOLE.print(speed)


def main() -> None:
    """Train, quantise, measure."""
    arguments = options(__doc__, [*TRAINED, *LARGE])
    if importlib.util.find_spec("torchao") is None:
        CONSOLE.print("torchao is not installed: pt2e is left out")
    samples: dict[str, dict[str, Any]] = {}
    for name in tracked(arguments.models, len(arguments.models)):
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            if name in LARGE:
                samples[name] = {"speed": large(name, LARGE[name], folder)}
                continue
            make, carriers = TRAINED[name]
            rows = accuracies(trained(make), carriers, folder)
            samples[name] = {"accuracy": rows, "speed": speeds([*carriers], torch.zeros(1, *images().shape), folder)}
    show(samples)
    figures = [figure for name, sample in samples.items() for figure in figures_of(name, sample.get("accuracy", {}))]
    finish("int8", figures, samples, write=not arguments.no_write)


if __name__ == "__main__":
    main()
