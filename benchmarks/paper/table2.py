"""Table 2: a MobileNetV2 that becomes a MobileNetV1.

The MobileNetV2 has project layers so wide that, after its partial residual connections are removed and consecutive
pointwise convs are fused, the layers are those of MobileNetV1, with masked activations. It is trained, converted
("RMNetV1"), and compared with a MobileNetV1 trained from scratch. MACs of a 32x32 image with ten classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import zip_longest

from torch import nn

import rmfx
from benchmarks.common import Figure
from benchmarks.paper import output, published
from benchmarks.paper.counts import Counts, count, deployed
from benchmarks.paper.jobs import Job, accuracies, jobs_for, rows_of
from benchmarks.paper.setting import Setting, setting
from benchmarks.paper.speed import Protocol, Speeds, paper_protocol, timed
from rmfx import models

EPOCHS = 8
TRAINED = ("MobileNetV2", "MobileNetV1")
MACS_WITHIN, MOST_MACS, LEAST_MACS = 0.02, 47.2e6, 45.9e6
_SHAPE = (3, 32, 32)


def jobs(given: Setting) -> list[Job]:
    """The trainings that this table needs."""
    return jobs_for(given, TRAINED, epochs=EPOCHS)


def conv_shapes(network: nn.Module) -> list[tuple[object, ...]]:
    """Channels, kernel, stride and groups of every conv, in order."""
    convs = [layer for layer in rmfx.to_sequential(network) if isinstance(layer, nn.Conv2d)]
    return [(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.groups) for c in convs]


def forms(device: str) -> dict[str, Callable[[], nn.Module]]:
    """The three networks as they are deployed."""
    return {
        "MobileNetV2": partial(deployed, models.mobilenet_v1_shaped, True, fuse="never", device=device),
        "RMNetV1": partial(deployed, models.mobilenet_v1_shaped, fuse="always", device=device),
        "MobileNetV1": partial(deployed, models.mobilenet_v1_cifar, device=device),
    }


def speeds(given: Setting) -> Speeds:
    """Those of the table."""
    networks = forms(given.device)
    protocol = paper_protocol(given.device, given.dtype, len(networks), graph=True)
    if given.quick:
        protocol = Protocol(given.device, 16, 2, 5, given.dtype)
    return timed("table2", networks, _SHAPE, protocol, given)


def main() -> None:
    """Run the benchmark."""
    given = setting(__doc__)
    runs = rows_of(jobs(given), given)
    counts: dict[str, Counts] = {
        "MobileNetV2": count(models.mobilenet_v1_shaped, True, _SHAPE, fuse="never"),
        "RMNetV1": count(models.mobilenet_v1_shaped, False, _SHAPE, fuse="always"),
        "MobileNetV1": count(models.mobilenet_v1_cifar, False, _SHAPE),
    }
    measured = speeds(given)
    trained = {name: accuracies(runs, name) for name in TRAINED}
    trained["RMNetV1"] = [
        run["converted"]["accuracy"] for run in runs if run["job"]["network"] == "MobileNetV2" and "converted" in run
    ]
    rows = []
    for name, modes in measured.items():
        paper = published.TABLE_2[name]
        cells = [
            name,
            f"{counts[name].parameters / 1e6:.2f}",
            f"{counts[name].macs / 1e6:.1f} ({1e3 * paper.giga_macs:.1f})",
        ]
        cells += [output.mean_and_spread(trained[name]) or "-", f"{paper.accuracy}"]
        for mode in ("eager", "graph"):
            speed, reference = modes.get(mode), measured["MobileNetV2"].get(mode)
            shown = (
                "-"
                if speed is None or reference is None
                else f"{speed.images_per_second:.0f}, x {speed.over(reference)[0]:.2f}"
            )
            cells.append(shown)
        paper_speed = paper.images_per_second
        rows.append(
            [*cells, f"{paper_speed:.0f}, x {paper_speed / published.TABLE_2['MobileNetV2'].images_per_second:.2f}"]
        )
    columns = ("network", "M parameters", "M MACs (paper)", f"accuracy, {given.data}", "paper % (CIFAR-10)")
    output.show("Table 2", (*columns, "img/s eager", "img/s graph", "paper img/s"), rows)
    plain = forms("cpu")
    ours, theirs = (conv_shapes(plain[name]()) for name in ("RMNetV1", "MobileNetV1"))
    different = sum(a != b for a, b in zip_longest(ours, theirs))
    figures = [
        output.off("MobileNetV2", "MACs", counts["MobileNetV2"].macs, 83.4e6, MACS_WITHIN),
        Figure("RMNetV1", "M MACs", counts["RMNetV1"].macs / 1e6, MOST_MACS / 1e6),
        Figure("RMNetV1", "M MACs below 45.9", (LEAST_MACS - counts["RMNetV1"].macs) / 1e6, 0),
        Figure("RMNetV1", "convs whose shape is not MobileNetV1's", different, 0),
        *output.changed_predictions(runs),
    ]
    networks = {
        name: {
            "counts": vars(counts[name]),
            "accuracies": trained[name],
            "images_per_second": {mode: speed.images_per_second for mode, speed in modes.items()},
        }
        for name, modes in measured.items()
    }
    output.save("table2", given, {"figures": output.as_dicts(figures), "networks": networks})
    output.leave(figures)


if __name__ == "__main__":
    main()
