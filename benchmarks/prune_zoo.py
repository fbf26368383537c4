"""Every convolutional network of torchvision that converts: made plain, 30 % of its channels pruned, exported, run.

The plain network is pruned by the size of its filters, which takes any network and no data. The rest is what a user
does next: forward passes at two batch sizes, and ``rmfx.export``, which runs the file in onnxruntime and compares it
with torch. What cannot be converted, or has nothing to prune, is told and left out.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import rmfx
from benchmarks.common import CONSOLE, Figure, finish, options, torchvision_model, tracked
from rmfx.errors import RmfxError
from rmfx.vision import import_torchvision

AMOUNT, IMAGE = 0.3, {"inception_v3": 128}
LEAST = 0.25  # of all channels gone: whole groups, and one channel of each layer, stay


def measure(name: str, folder: Path) -> dict[str, object] | None:
    """What became of one network; ``None`` where there is nothing to prune."""
    size = IMAGE.get(name, 96)
    model = torchvision_model(name, image=size)
    x = torch.randn(2, 3, size, size)
    try:
        plain = rmfx.convert(model, x, partial=False, verify=False)
        pruned = rmfx.prune(plain, x, amount=AMOUNT, importance="l2")
    except RmfxError as error:
        CONSOLE.print(f"{name} is left out: {error}")
        return None
    with torch.no_grad():
        answers = [pruned.network(torch.randn(batch, 3, size, size)) for batch in (1, 3)]
    assert all(bool(answer.isfinite().all()) for answer in answers)
    path = rmfx.export(pruned.network, folder / "pruned.onnx", x)
    before, after = (sum(getattr(width, side) for width in pruned.widths) for side in ("before", "after"))
    return {
        "channels": [before, after],
        "parameters": pruned.parameters,
        "macs": pruned.macs,
        "lost_constants": pruned.lost,
        "bytes": path.stat().st_size,
    }


def main() -> None:
    """Run the benchmark."""
    models = import_torchvision().models
    arguments = options(__doc__, models.list_models(module=models))
    samples: dict[str, object] = {}
    figures: list[Figure] = []
    for name in tracked(arguments.models, len(arguments.models)):
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, Path(folder))
        if row is None:
            continue
        samples[name] = row
        before, after = row["channels"]  # type: ignore[misc]
        figures.append(Figure(name, "part of the channels left", after / before, 1 - LEAST))
    finish("prune_zoo", figures, samples, write=not arguments.no_write)


if __name__ == "__main__":
    main()
