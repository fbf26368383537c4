"""Figure 9: fine-tuning a converted ResNet, with its batch norms and with them folded.

ResNet 18 and 34 are trained, converted, and trained on: once as ``rmfx.convert(keep_bn=True)`` with calibrated norms
gives them, once with the norms folded into the convs. Epoch 0 is the accuracy after conversion, before fine-tuning.
"""

from __future__ import annotations

from benchmarks.common import Figure
from benchmarks.paper import output
from benchmarks.paper.jobs import Job, jobs_for, rows_of
from benchmarks.paper.setting import Setting, setting
from benchmarks.paper.table1 import EPOCHS

TRAINED = ("ResNet 18", "ResNet 34")
VARIANTS = {"with_bn": "with BN", "without_bn": "BN folded"}


def jobs(given: Setting) -> list[Job]:
    """The trainings that this figure needs."""
    trained = TRAINED[:1] if given.quick else TRAINED
    return jobs_for(given, trained, epochs=EPOCHS)


def main() -> None:
    """Run the benchmark."""
    given = setting(__doc__)
    runs = [run for run in rows_of(jobs(given), given) if "finetuned" in run]
    rows = []
    figures: list[Figure] = []
    for run in runs:
        name = f"{run['job']['network']}, seed {run['job']['recipe']['seed']}"
        for variant, title in VARIANTS.items():
            curve = [record["test_accuracy"] for record in run["finetuned"][variant]]
            rows.append([f"{name}, {title}", f"{run['accuracy']:.2%}", *(f"{value:.2%}" for value in curve)])
            start = run["starts"][variant]  # in float32; the curve is in the precision of the training
            changed, quantity = start["images"] - start["same"], f"predictions changed by conversion, {title}"
            figures.append(Figure(name, quantity, changed, start["images"] / 1000))
    epochs = len(runs[0]["finetuned"]["with_bn"])
    columns = ("network", "trained", *(f"epoch {epoch}" for epoch in range(epochs)))
    output.show(f"Figure 9: test accuracy on {given.data} while fine-tuning", columns, rows)
    with output.drawing("figure9", given, columns=len(runs)) as axes:
        for axis, run in zip(axes[0], runs, strict=True):
            for (variant, title), marker in zip(VARIANTS.items(), "os", strict=True):
                curve = [100 * record["test_accuracy"] for record in run["finetuned"][variant]]
                axis.plot(range(len(curve)), curve, marker=marker, label=title)
            axis.axhline(100 * run["accuracy"], color="0.5", linewidth=0.8, linestyle="--")
            axis.set(
                title=run["job"]["network"], xlabel="epoch of fine-tuning", ylabel=f"test accuracy, {given.data}, %"
            )
            axis.set_xticks(range(epochs))
            axis.legend(frameon=False)
    curves = {run["job"]["network"]: {"trained": run["accuracy"], **run["finetuned"]} for run in runs}
    output.save("figure9", given, {"figures": output.as_dicts(figures), "curves": curves})
    output.leave(figures)


if __name__ == "__main__":
    main()
