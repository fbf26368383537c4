"""Figure 5: accuracy against depth, RMNet and RepVGG.

Networks of the same number of layers, stage depths and widths, trained by one recipe. The paper's widths are 64 to 512;
here the first stage has 16 channels, so that the deepest networks train in minutes.
"""

from __future__ import annotations

import statistics

from benchmarks.paper import output
from benchmarks.paper.jobs import Job, accuracies, jobs_for, rows_of
from benchmarks.paper.networks import FIGURE5_DEPTHS
from benchmarks.paper.setting import Setting, setting

EPOCHS = 8
FAMILIES = ("RMNet", "RepVGG")
QUICK_DEPTHS = FIGURE5_DEPTHS[:2]
# CIFAR-100, as the paper's text gives them.
PAPER = {"RMNet 133": 79.57, "RepVGG 133": 41.38}


def depths(given: Setting) -> tuple[int, ...]:
    """Those that are trained."""
    return QUICK_DEPTHS if given.quick else FIGURE5_DEPTHS


def jobs(given: Setting) -> list[Job]:
    """The trainings that this figure needs."""
    names = [f"{family} {depth}" for family in FAMILIES for depth in depths(given)]
    return jobs_for(given, names, epochs=EPOCHS)


def main() -> None:
    """Run the benchmark."""
    given = setting(__doc__)
    runs = rows_of(jobs(given), given)
    reached = {family: {depth: accuracies(runs, f"{family} {depth}") for depth in depths(given)} for family in FAMILIES}
    rows = [
        [depth, *(output.mean_and_spread(reached[family][depth]) for family in FAMILIES)] for depth in depths(given)
    ]
    output.show(f"Figure 5: accuracy on {given.data} against depth", ("layers", *FAMILIES), rows)
    figures = output.changed_predictions(runs)
    with output.drawing("figure5", given) as axes:
        axis = axes[0][0]
        for family, marker in zip(FAMILIES, "os", strict=True):
            means = {depth: 100 * statistics.mean(values) for depth, values in reached[family].items() if values}
            axis.plot(list(means), list(means.values()), marker=marker, label=family)
            for depth, values in reached[family].items():
                axis.scatter([depth] * len(values), [100 * v for v in values], s=8, color="0.4", zorder=3)
        axis.set(xlabel="layers", ylabel=f"test accuracy on {given.data}, %")
        axis.legend(frameon=False)
    output.save("figure5", given, {"figures": output.as_dicts(figures), "accuracies": reached, "paper": PAPER})
    output.leave(figures)


if __name__ == "__main__":
    main()
