"""Table 1: parameters, MACs, speed and accuracy of RMNet and what it is compared with.

All networks are timed in the form in which they would be deployed: batch norms folded, branches that can be merged
merged; ResNet and ResNeXt keep their shortcuts, RMNet's are removed. Accuracy is that of the small-image networks,
trained here on ``--data``; the networks for ImageNet are not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from benchmarks.common import CONSOLE, Figure
from benchmarks.paper import output, published
from benchmarks.paper.counts import Counts, count, deployed
from benchmarks.paper.jobs import Job, accuracies, jobs_for, rows_of
from benchmarks.paper.networks import FULL_WIDTH, NETWORKS
from benchmarks.paper.published import Printed
from benchmarks.paper.setting import Setting, setting
from benchmarks.paper.speed import Protocol, Speed, Speeds, paper_protocol, timed
from benchmarks.paper.store import Row
from rmfx import models
from rmfx.vision import import_torchvision

EPOCHS = 5
TRAINED = tuple(published.CIFAR10)
KEEPS_SHORTCUTS = ("ResNet", "ResNeXt")
PARAMETERS_WITHIN, MACS_WITHIN = 0.004, 0.005
# Of the rows that Table 1 prints in deploy form; it prints 41x4_8 in training form, and 26x3_32 contradicts Table 4.
CHECKED = ("RMNet 41x5_16", "RMNet 50x5_32", "RMNet 50x6_32", "RMNet 101x6_16", "RMNet 152x6_32")
REFERENCES = {"small": "ResNet 34", "imagenet": "ResNet 50"}
_QUICK_TIMED = ("ResNet 50", "ResNeXt 50", "RMNet 41x4_8", "RMNet 41x5_16")


def _faded(build: Callable[[], nn.Module]) -> nn.Module:
    """The student of ResDistill at the end of its training, when its shortcuts are gone."""
    network = build()
    network.fade(0.0)  # type: ignore[operator]
    return network


def _resnext(name: str) -> nn.Module:
    return getattr(import_torchvision().models, name)(weights=None)


IMAGENET: dict[str, Callable[[], nn.Module]] = {
    "ResNet 50": models.resnet50,
    "ResDistill 50": partial(_faded, models.resdistill50),
    "RMNet 41x4_8": models.rmnet41x4_8,
    "ResNeXt 50": partial(_resnext, "resnext50_32x4d"),
    "RepVGG B1": models.repvgg_b1,
    "RMNet 41x5_16": models.rmnet41x5_16,
    "ResNet 101": models.resnet101,
    "VGG 16": models.vgg16,
    "RepVGG B2": models.repvgg_b2,
    "RMNet 50x5_32": models.rmnet50x5_32,
    "ResNet 152": models.resnet152,
    "RepVGG B3": models.repvgg_b3,
    "RMNet 50x6_32": models.rmnet50x6_32,
    "ResNeXt 101": partial(_resnext, "resnext101_32x8d"),
    "RMNet 101x6_16": models.rmnet101x6_16,
    "RMNet 152x6_32": models.rmnet152x6_32,
}


def jobs(given: Setting) -> list[Job]:
    """The trainings that this table needs."""
    return jobs_for(given, TRAINED, epochs=EPOCHS)


def small() -> dict[str, Callable[[], nn.Module]]:
    """The networks for images of 3x32x32, as they are after training."""
    built = {name: partial(NETWORKS[name].build, 3, 10, FULL_WIDTH) for name in TRAINED}
    return {**built, "ResDistill 34": partial(_faded, built["ResDistill 34"])}


def keeps(name: str) -> bool:
    """Whether a network is deployed with its shortcuts."""
    return name.startswith(KEEPS_SHORTCUTS)


GROUPS = {"small": (small(), published.CIFAR10, 32), "imagenet": (IMAGENET, published.IMAGENET, 224)}


def speeds(given: Setting, group: str) -> Speeds:
    """Those of one half of the table."""
    networks, _, size = GROUPS[group]
    protocol = paper_protocol(given.device, given.dtype, len(networks), graph=group == "small")
    if given.quick:
        protocol, size = Protocol(given.device, 4, 1, 3, given.dtype), min(size, 64)
        networks = {n: b for n, b in networks.items() if group == "small" or n in _QUICK_TIMED}
    forms = {name: partial(deployed, build, keeps(name), device=given.device) for name, build in networks.items()}
    return timed(f"table1, {group}, {size}x{size}", forms, (3, size, size), protocol, given)


def _row(
    name: str,
    paper: Printed,
    counts: Counts,
    modes: dict[str, Speed],
    reference: dict[str, Speed],
    trained: list[float],
) -> list[str | None]:
    cells: list[str | None] = [name]
    cells += [f"{counts.parameters / 1e6:.2f} ({paper.parameters})", f"{counts.macs / 1e9:.3f} ({paper.giga_macs})"]
    cells += [output.mean_and_spread(trained), f"{paper.accuracy}"]
    for mode in ("eager", "graph"):
        if mode not in modes:
            cells += [None, None]
            continue
        middle, low, high = modes[mode].over(reference[mode])
        cells += [f"{modes[mode].images_per_second:.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
    return cells


def _half(group: str, given: Setting, runs: Sequence[Row]) -> tuple[list[Figure], dict[str, object]]:
    """Print one half of the table; its figures, and its content for the file."""
    networks, printed, size = GROUPS[group]
    counts = {name: count(build, keeps(name), (3, size, size)) for name, build in networks.items()}
    measured = speeds(given, group)
    first = REFERENCES[group]
    paper_reference = printed[first].images_per_second
    rows = [
        [
            *_row(name, printed[name], counts[name], measured.get(name, {}), measured[first], accuracies(runs, name)),
            f"{printed[name].images_per_second / paper_reference:.2f}",
        ]
        for name in networks
    ]
    columns = ["network (deploy form)", "M parameters (paper)", "G MACs (paper)", f"accuracy, {given.data}", "paper %"]
    columns += ["img/s eager", f"x {first}", "img/s graph", f"x {first}", "paper x"]
    output.show(f"Table 1, {group}", columns, rows)
    figures: list[Figure] = []
    for name in filter(networks.__contains__, CHECKED):
        paper = printed[name]
        assert paper.parameters is not None
        ours = counts[name]
        figures.append(output.off(name, "parameters", ours.parameters, paper.parameters * 1e6, PARAMETERS_WITHIN))
        figures.append(output.off(name, "MACs", ours.macs, paper.giga_macs * 1e9, MACS_WITHIN))
    content: dict[str, object] = {
        name: {
            "counts": vars(counts[name]),
            "paper": vars(printed[name]),
            "accuracies": accuracies(runs, name),
            "images_per_second": {mode: speed.images_per_second for mode, speed in measured.get(name, {}).items()},
        }
        for name in networks
    }
    return figures, content


def main() -> None:
    """Run the benchmark."""
    given = setting(__doc__)
    runs = rows_of(jobs(given), given)
    figures: list[Figure] = []
    content: dict[str, object] = {}
    for group in GROUPS:
        more, content[group] = _half(group, given, runs)
        figures += more
    training_form = sum(p.numel() for p in models.rmnet41x4_8().parameters())
    CONSOLE.print(
        f"RMNet 41x4_8 before conversion: {training_form / 1e6:.2f} M parameters; the paper's row has that form"
    )
    figures.append(output.off("RMNet 41x4_8", "parameters in training form", training_form, 11.2e6, PARAMETERS_WITHIN))
    figures += output.changed_predictions(runs)
    output.save("table1", given, {"figures": output.as_dicts(figures), "networks": content})
    output.leave(figures)


if __name__ == "__main__":
    main()
