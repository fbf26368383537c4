"""Every convolutional network of torchvision that converts: made plain, 30 % of its channels pruned, exported, run.

The plain network is pruned by the size of its filters, which takes any network and no data. The rest is what a user
does next: forward passes at two batch sizes, and ``rmfx.export``, which runs the file in onnxruntime and compares it
with torch. What cannot be converted, or has nothing to prune, is told and left out. Rows are appended to
``results/prune_zoo.jsonl``; what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import rmfx
from benchmarks.common import CONSOLE, RESULTS, code_version, provenance, torchvision_model, tracked
from rmfx.errors import RmfxError
from rmfx.vision import import_torchvision

ROWS = RESULTS / "prune_zoo.jsonl"
AMOUNT, IMAGE = 0.3, {"inception_v3": 128}
TRANSFORMERS = ("vit_", "swin_", "maxvit_")  # no convolutional networks
MOST = 0.75  # of all channels may be left and say something: groups go as wholes, and each layer keeps one of them
Row = dict[str, Any]


def measure(name: str, folder: Path) -> Row:
    """What became of one network; ``refused`` says why nothing did."""
    size = IMAGE.get(name, 96)
    x = torch.randn(2, 3, size, size)
    try:
        plain = rmfx.convert(torchvision_model(name, image=size), x, partial=False, verify=False)
        pruned = rmfx.prune(plain, x, amount=AMOUNT, importance="l2")
        del plain  # memory for the export of gigabytes
    except RmfxError as error:
        return {"refused": str(error)}
    with torch.no_grad():
        answers = [pruned.network(torch.randn(batch, 3, size, size)) for batch in (1, 3)]
    assert all(bool(answer.isfinite().all()) for answer in answers)
    path = rmfx.export(pruned.network, folder / "pruned.onnx", x)
    before, after, constants = (
        sum(getattr(width, side) for width in pruned.widths) for side in ("before", "after", "constants")
    )
    return {
        "channels": [before, after],
        "constants": constants,
        "parameters": pruned.parameters,
        "macs": pruned.macs,
        "lost_constants": pruned.lost,
        "bytes": path.stat().st_size,
    }


def read(path: Path) -> dict[str, Row]:
    """The last row of each network."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["network"]: row for row in map(json.loads, lines)}


def show(rows: dict[str, Row]) -> bool:
    """Print what there is; returns whether every network that can be pruned was."""
    table = Table("network", "channels left", "without constants", "parameters left", "MACs left")
    parts: dict[str, float] = {}
    for name, row in rows.items():
        if "refused" in row:
            continue
        before, after = row["channels"]
        parts[name] = (after - row.get("constants", 0)) / before
        left = [row[what][1] / row[what][0] for what in ("parameters", "macs")]
        table.add_row(name, *(f"{x:.2f}" for x in (after / before, parts[name], *left)))
    CONSOLE.print(table)
    for name, row in rows.items():
        if "refused" in row:
            CONSOLE.print(f"{name} is left out: {row['refused']}")
    missed = [name for name, part in parts.items() if part > MOST]
    CONSOLE.print(f"{len(parts)} networks pruned, exported and run; {len(missed)} kept more than {MOST:.0%}: {missed}")
    return bool(parts) and not missed


def main() -> None:
    """Run the benchmark."""
    models = import_torchvision().models
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in models.list_models(module=models) if not name.startswith(TRANSFORMERS)]
    parser.add_argument("--models", nargs="+", default=names, help="only these")
    parser.add_argument("--output", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true", help="do nothing, print what there is")
    given = parser.parse_args()
    done = read(given.output)
    todo = [] if given.table else [name for name in given.models if name not in done]
    for name in tracked(todo, len(todo)):
        with tempfile.TemporaryDirectory() as folder:
            row = {"network": name, **measure(name, Path(folder)), "provenance": provenance(), "code": code_version()}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        with given.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    sys.exit(0 if show(read(given.output)) else 1)


if __name__ == "__main__":
    main()
