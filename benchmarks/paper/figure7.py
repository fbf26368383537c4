"""Figure 7: speed-up of RMNet over the ResNet that it is converted from.

One thing varies at a time, from a middle network: the batch, the width of the first stage, the multiple T, and the
channels per group. "ResNet" is the same network before conversion, in two forms: with its shortcuts and folded batch
norms, which is the fair comparison, and as it was trained, with batch norms and the stem's branches. Above 1, removing
the shortcuts made it faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from benchmarks.paper import output
from benchmarks.paper.counts import count, deployed
from benchmarks.paper.setting import Setting, setting
from benchmarks.paper.speed import Protocol, Speeds, timed
from rmfx.models import rmnet


@dataclass(frozen=True)
class Point:
    """A network and a batch size."""

    batch: int = 32
    width: int = 64
    multiple: int = 4
    per_group: int = 16

    def build(self) -> nn.Module:
        """The network in training form: RMNet 50 in this width."""
        widths = tuple(self.width * 2**stage for stage in range(4))
        return rmnet((3, 4, 6, 3), self.multiple, self.per_group, widths=widths)


SWEEPS = {
    "batch": (1, 4, 16, 32, 64),
    "width": (32, 64, 96),
    "multiple": (2, 4, 6),
    "per_group": (8, 16, 32, 64),
}
QUICK_SWEEPS = {"batch": (1, 4), "width": (32, 64), "multiple": (2, 4), "per_group": (8, 32)}
TITLES = {
    "batch": "batch size",
    "width": "basic width",
    "multiple": "multiply times (T)",
    "per_group": "channels per group",
}
FORMS = ("plain", "folded", "trained")


def _networks(point: Point, device: str) -> dict[str, Callable[[], nn.Module]]:
    return {
        "plain": partial(deployed, point.build, device=device),
        "folded": partial(deployed, point.build, True, device=device),
        "trained": point.build,
    }


def _modes(device: str) -> tuple[str, ...]:
    return ("eager", "graph") if device == "cuda" else ("eager",)


def points(given: Setting) -> tuple[Point, list[tuple[str, int, Point]]]:
    """The middle, and every point of every sweep with what it varies."""
    middle = Point(batch=2, width=32) if given.quick else Point()
    sweeps = QUICK_SWEEPS if given.quick else SWEEPS
    return middle, [(name, value, replace(middle, **{name: value})) for name, vs in sweeps.items() for value in vs]


def speeds(given: Setting, point: Point) -> Speeds:
    """Those of the network of one point, in its three forms."""
    warm_up, rounds, size = (1, 3, 32) if given.quick else (10, 30, 224)
    protocol = Protocol(given.device, point.batch, warm_up, rounds, given.dtype, _modes(given.device))
    return timed(f"figure7, {point}, {size}x{size}", _networks(point, given.device), (3, size, size), protocol, given)


def main() -> None:
    """Run the benchmark."""
    given = setting(__doc__)
    middle, swept = points(given)
    rows: list[list[object]] = []
    samples: list[dict[str, Any]] = []
    for parameter, value, point in swept:
        measured = speeds(given, point)
        macs = [count(point.build, keeps, (3, 224, 224)).macs for keeps in (False, True)]
        for mode, plain in measured["plain"].items():
            over = {form: plain.over(measured[form][mode]) for form in FORMS[1:]}
            shown = [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in over.values()]
            rows.append([TITLES[parameter], value, mode, f"{macs[0] / macs[1]:.2f}", *shown])
            images_per_second = {form: measured[form][mode].images_per_second for form in FORMS}
            sample = {"parameter": parameter, "value": value, "mode": mode, "macs": macs}
            samples.append({**sample, "over": over, "images_per_second": images_per_second})
    columns = ("varied", "value", "mode", "MACs ratio", "speed-up over ResNet, BN folded", "over ResNet as trained")
    output.show(f"Figure 7: RMNet over ResNet, around {middle}", columns, rows)
    _draw(given, samples)
    output.save("figure7", given, {"middle": vars(middle), "points": samples})
    output.leave([])


def _draw(given: Setting, samples: list[dict[str, Any]]) -> None:
    sweeps = list(dict.fromkeys(sample["parameter"] for sample in samples))
    with output.drawing("figure7", given, columns=len(sweeps), rows=2) as axes:
        for column, parameter in enumerate(sweeps):
            upper, lower = axes[0][column], axes[1][column]
            for mode, line in (("eager", "-"), ("graph", "--")):
                chosen = [s for s in samples if s["parameter"] == parameter and s["mode"] == mode]
                if chosen:
                    _curves(upper, lower, chosen, line)
            upper.axhline(1, color="0.5", linewidth=0.8)
            lower.set(xlabel=TITLES[parameter], yscale="log")
            values = sorted({s["value"] for s in samples if s["parameter"] == parameter})
            for axis in (upper, lower):
                axis.set_xscale("log", base=2)
                axis.set_xticks(values, labels=list(map(str, values)))
        axes[0][0].set(ylabel="speed-up of RMNet over ResNet")
        axes[1][0].set(ylabel="images per second")
        for row in (0, 1):
            axes[row][0].legend(frameon=False, fontsize=7)


def _curves(upper: Any, lower: Any, samples: list[dict[str, Any]], line: str) -> None:
    """Speed-ups above, with quartiles, and images per second of both below, over the parameter's values."""
    values, mode = [s["value"] for s in samples], samples[0]["mode"]
    for form, color in (("folded", "tab:blue"), ("trained", "tab:orange")):
        middles, lows, highs = zip(*(s["over"][form] for s in samples), strict=True)
        label = f"over ResNet, {'BN folded' if form == 'folded' else 'as trained'}, {mode}"
        upper.plot(values, middles, line, color=color, marker=".", label=label)
        upper.fill_between(values, lows, highs, color=color, alpha=0.15)
    for form, title, color in (("plain", "RMNet", "tab:green"), ("folded", "ResNet, BN folded", "tab:blue")):
        lower.plot(
            values,
            [s["images_per_second"][form] for s in samples],
            line,
            color=color,
            marker=".",
            label=f"{title}, {mode}",
        )


if __name__ == "__main__":
    main()
