"""The carriers, forced one by one: what each removes, at what price, and how exact it is in float32.

Networks whose residual inputs have both signs, so that nothing is carried directly past most activations. For each and
each carrier: residual sums removed, MACs, the relative difference to the original in float64, and the float32 error of
the converted network over that of the original (largest and root mean square, as in ``benchmarks.exactness``). The
carrier ``shift`` gets the ranges that ``rmfx.bounds_from_data`` measures on the very inputs that are compared; where it
would cost more than two bits, it is refused, and only ``shift, forced`` (in the result file, without limits) shows what
that would do.

A carrier that removes nothing of a network (ReLU6 does not split, GELU does not shift) has no figures; its row in the
result file says why. ``auto`` must remove every sum, at no more MACs than any other carrier that does.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

import rmfx
from benchmarks.common import Figure, finish, options, tracked
from benchmarks.exactness import FLOAT32_FACTOR, NOISE_FACTOR, TOLERANCE, largest, mean_square, noise_floor, run
from rmfx.hostile import randomise
from rmfx.vision import import_timm

MODELS = {  # of timm, with the activations that values are carried past
    "mnasnet_100": "ReLU",
    "mobilenetv2_100": "ReLU6",
    "efficientnet_b0": "SiLU",
    "mobilenetv3_large_100": "ReLU and Hardswish",
    "darknet53": "LeakyReLU",
    "convmixer_768_32": "ReLU",
    "convmixer_1024_20_ks9_p14": "GELU",
}
CARRIERS: dict[str, dict[str, Any]] = {
    **{name: {"carrier": name} for name in ("auto", "masked", "split", "shift")},
    "shift, forced": {"carrier": "shift", "shift_bits": math.inf},
}
UNLIMITED = "shift, forced"


def inputs() -> list[Tensor]:
    """Two float32 batches whose values the ranges for ``shift`` are measured on."""
    random = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 64, 64, generator=random) for _ in range(2)]


def build(name: str) -> nn.Module:
    """The network with hostile weights, float32, in eval mode."""
    torch.manual_seed(0)
    model = import_timm().create_model(name, pretrained=False)
    return randomise(model, torch.randn(4, 3, 64, 64), 0)


def measure(name: str, carrier: str) -> dict[str, Any]:
    """Everything about one network and one carrier."""
    batches = inputs()
    model = build(name)
    wish = dict(CARRIERS[carrier], verify=False)
    if wish["carrier"] == "shift":
        wish["value_ranges"] = rmfx.bounds_from_data(model, batches, margin=0.01)
    converted = rmfx.convert(model, batches[0], **wish)
    report = rmfx.report(converted)
    row: dict[str, Any] = {
        "sums": {status: report.count(status) for status in ("removed", "kept", "refused")},
        "carriers": dict(Counter(entry.carrier for entry in report.entries if entry.status == "removed")),
        "reasons": dict(Counter(entry.reason for entry in report.entries if entry.status == "refused").most_common(3)),
        "macs": [report.totals.macs_before, report.totals.macs_after],
    }
    if not row["sums"]["removed"]:
        return row
    single, converted_single = run(model, batches), run(converted, batches)
    del converted
    model.double()
    truth = run(model, batches)
    doubled = rmfx.convert(model, batches[0].double(), **wish)
    row["noise_floor"] = noise_floor(model, truth, batches)
    row["difference"] = largest(truth, run(doubled, batches))
    row["float32_errors"] = [(of(truth, single), of(truth, converted_single)) for of in (largest, mean_square)]
    return row


def figures(name: str, rows: dict[str, dict[str, Any]]) -> list[Figure]:
    """The figures of one network."""
    auto = rows["auto"]
    found = [Figure(f"{name}, auto", "residual sums left", auto["sums"]["refused"], 0)]
    as_many = [row["macs"][1] for row in rows.values() if row["sums"]["removed"] == auto["sums"]["removed"]]
    found.append(Figure(f"{name}, auto", "MACs over the cheapest carrier's", auto["macs"][1] / min(as_many), 1))
    for carrier, row in rows.items():
        if "difference" in row and carrier != UNLIMITED:
            subject = f"{name}, {carrier}"
            limit = max(TOLERANCE, NOISE_FACTOR * row["noise_floor"])
            found.append(Figure(subject, "relative difference, float64", row["difference"], limit))
            for what, (own, converted) in zip(("largest", "RMS"), row["float32_errors"], strict=True):
                ratio = converted / own if own else math.inf
                found.append(Figure(subject, f"float32 error, ratio of {what}", ratio, FLOAT32_FACTOR))
    return found


def main() -> None:
    """Run the benchmark."""
    arguments = options(__doc__, list(MODELS))
    found: list[Figure] = []
    samples: dict[str, Any] = {}
    for name in tracked(arguments.models, len(arguments.models)):
        samples[name] = {carrier: measure(name, carrier) for carrier in CARRIERS}
        found += figures(name, samples[name])
    finish("carriers", found, samples, write=not arguments.no_write)


if __name__ == "__main__":
    main()
