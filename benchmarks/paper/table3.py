"""Table 3: RepVGG against ResNet at equal depth and width.

Parameters, MACs and speed at 224x224 in deploy form: ResNet with folded batch norms and its shortcuts, RepVGG merged.
The accuracy is that of the same networks with a stem for small images, trained here on ``--data``. "ResNet, plain" is
ResNet without its shortcuts, which the paper's table does not have: exactly equal, hence as accurate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from benchmarks.common import Figure
from benchmarks.paper import output, published
from benchmarks.paper.counts import count, deployed
from benchmarks.paper.jobs import Job, accuracies, jobs_for, rows_of
from benchmarks.paper.setting import Setting, setting
from benchmarks.paper.speed import Protocol, Speeds, paper_protocol, timed
from benchmarks.paper.table1 import EPOCHS, keeps
from rmfx import models

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet 18": models.resnet18,
    "RepVGG 18": models.repvgg18,
    "ResNet 34": models.resnet34,
    "RepVGG 34": models.repvgg34,
}
WITHIN = 0.01


def jobs(given: Setting) -> list[Job]:
    """The trainings that this table needs."""
    return jobs_for(given, tuple(NETWORKS), epochs=EPOCHS)


def speeds(given: Setting) -> Speeds:
    """Those of the table, and of ResNet without shortcuts."""
    forms = {name: partial(deployed, build, keeps(name), device=given.device) for name, build in NETWORKS.items()}
    forms |= {f"{n}, plain": partial(deployed, NETWORKS[n], device=given.device) for n in NETWORKS if keeps(n)}
    protocol, size = paper_protocol(given.device, given.dtype, len(forms), graph=False), 224
    if given.quick:
        protocol, size = Protocol(given.device, 2, 1, 3, given.dtype), 64
    return timed(f"table3, {size}x{size}", forms, (3, size, size), protocol, given)


def main() -> None:
    """Run the benchmark."""
    given = setting(__doc__)
    runs = rows_of(jobs(given), given)
    counts = {name: count(build, keeps(name), (3, 224, 224)) for name, build in NETWORKS.items()}
    measured = speeds(given)
    rows = []
    for name, modes in measured.items():
        base = name.removesuffix(", plain")
        counted = counts[name] if name in counts else count(NETWORKS[base], False, (3, 224, 224))
        paper = published.TABLE_3.get(name)
        trained = accuracies(runs, base)
        rows.append(
            [
                name,
                f"{counted.parameters / 1e6:.2f} ({paper.parameters if paper else '-'})",
                f"{counted.macs / 1e9:.3f} ({paper.giga_macs if paper else '-'})",
                output.mean_and_spread(trained),
                paper.accuracy if paper else None,
                *(f"{modes[mode].images_per_second:.0f}" if mode in modes else None for mode in ("eager", "graph")),
                f"{paper.images_per_second:.0f}" if paper else None,
            ]
        )
    columns = ("network", "M parameters (paper)", "G MACs (paper)", f"accuracy, {given.data}", "paper % (ImageNet)")
    output.show("Table 3", (*columns, "img/s eager", "img/s graph", "paper img/s"), rows)
    figures: list[Figure] = []
    for name, counted in counts.items():
        paper = published.TABLE_3[name]
        assert paper.parameters is not None
        figures.append(output.off(name, "parameters", counted.parameters, paper.parameters * 1e6, WITHIN))
        figures.append(output.off(name, "MACs", counted.macs, paper.giga_macs * 1e9, WITHIN))
    figures += output.changed_predictions(runs)
    networks = {
        name: {
            "accuracies": accuracies(runs, name.removesuffix(", plain")),
            "images_per_second": {mode: speed.images_per_second for mode, speed in modes.items()},
            **({"counts": vars(counts[name])} if name in counts else {}),
        }
        for name, modes in measured.items()
    }
    output.save("table3", given, {"figures": output.as_dicts(figures), "networks": networks})
    output.leave(figures)


if __name__ == "__main__":
    main()
