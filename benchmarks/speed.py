"""Is a planned network ever slower, and where is it faster? Paired, interleaved, in each runtime.

Parts (``--part``; all by default):

* ``zoo``: 40 networks of torchvision and timm, ``policy="auto"`` against the network as it is, and ``policy="all"``
  beside it, whatever that costs;
* ``branches``: networks with training-time branches left in, against timm's ``reparameterize_model``; hand-written DBB
  and ACNet blocks, which no such hook covers, against themselves;
* ``table2``: the paper's MobileNetV2 of MobileNetV1's shape, as planned, and plain with each carrier, against itself;
* ``backend``: ``torch.compile(backend="rmfx")`` against ``backend="inductor"``, and beside it against that with frozen
  weights, which sees no change of them any more;
* ``planning``: the time to plan without measuring, over that to convert.

Every measurement is a row of ``results/speed.jsonl``, with its samples and the machine, appended when it is done; what
is there is not measured again. ``--table`` prints what there is.

One instance of a network may lie better in memory than another one of the very same network, and be 20 % faster for as
long as it lives. So with ``--confirm`` every row that misses its limit is measured again with five fresh instances of
both sides, whose pairs are taken together; the new row stands behind the old one in the file, and counts.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

import rmfx
from benchmarks.common import CONSOLE, RESULTS, Figure, code_version, provenance, tracked
from benchmarks.speed_networks import BACKEND, BRANCHED, HAND_WRITTEN, ZOO, build
from rmfx import models
from rmfx.measure.paired import Call, Comparison, compare
from rmfx.measure.runners import runner
from rmfx.measure.target import RUNTIMES, Target
from rmfx.vision import import_timm

ROWS = RESULTS / "speed.jsonl"
PARTS = ("table2", "branches", "zoo", "planning", "backend")
SLOWER, LEAST_SPEED, TABLE_2, BACKEND_LIMIT, PLANNING_LIMIT = 1.03, 0.98, 1.6, 1.02, 2.0
MEAN = {"eager": 0.95, "inductor": 1.01, "onnxruntime": 1.01, "onnxruntime-int8": 1.01}  # geometric means of the zoo
PAIRS, SECONDS, INSTANCES = 25, 3.0, 5
Row = dict[str, Any]
Make = Callable[[], Call]  # a fresh instance


@dataclass(frozen=True)
class Job:
    """One network on one target at one batch size."""

    part: str
    network: str
    target: str
    batch: int

    def on(self, threads: int) -> Target:
        """The target."""
        return replace(Target.of(self.target), threads=threads)

    def __str__(self) -> str:
        return f"{self.part} {self.network} {self.target} x{self.batch}"


def jobs(parts: Sequence[str], targets: Sequence[str]) -> list[Job]:
    """Everything there is to measure, cheap targets first."""
    found: list[Job] = []
    for target in targets:
        if "table2" in parts:
            found += [Job("table2", "mobilenet_v1_shaped", target, batch) for batch in (1, 8, 128)]
        if "branches" in parts:
            found += [Job("branches", name, target, 1) for name in (*BRANCHED, *HAND_WRITTEN)]
    if "zoo" in parts:
        found += [Job("zoo", name, target, batch) for target in targets for batch in (1, 8) for name in ZOO]
    found += [Job("planning", name, "eager:cpu", 1) for name in ZOO if "planning" in parts]
    found += [Job("backend", name, "inductor:cpu", 1) for name in BACKEND if "backend" in parts]
    return found


def measure(job: Job, threads: int, size: int, instances: int) -> Row:
    """The row of a job."""
    measured = MEASURES[job.part](job, job.on(threads), size, instances)
    return {
        **vars(job),
        "threads": threads,
        "size": size,
        "instances": instances,
        **measured,
        "provenance": provenance(),
        "code": code_version(),
    }


def _zoo(job: Job, target: Target, size: int, instances: int) -> Row:
    model, x = build(job.network), torch.randn(job.batch, 3, size, size)
    return _against_itself(model, x, target, instances, with_all=target.runtime != "inductor")


def _table2(job: Job, target: Target, size: int, instances: int) -> Row:
    torch.manual_seed(0)
    model, x = models.mobilenet_v1_shaped().eval(), torch.randn(job.batch, 3, 32, 32)
    row = _against_itself(model, x, target, instances, with_all=False)
    for carrier in ("masked", "split"):  # plain and fused, but without a plan
        plain = rmfx.convert(model, x, carrier=carrier, fuse="always", verify=False)
        row[carrier] = _compared(carrier, _fresh(model, x, target), _fresh(plain, x, target), instances)
    return row


def _branches(job: Job, target: Target, size: int, instances: int) -> Row:
    if job.network in HAND_WRITTEN:
        x = torch.randn(job.batch, 64, 28, 28)
        return _against_itself(build(job.network), x, target, instances, with_all=False)
    model, x = build(job.network), torch.randn(job.batch, 3, size, size)
    reparameterised = import_timm().models.reparameterize_model(copy.deepcopy(model))
    plan, planned = _planned(model, x, target)
    made = [_fresh(network, x, target) for network in (model, reparameterised, planned)]
    as_it_is = _compared("as it is", made[0], made[2], instances)
    return {"auto": _compared("auto", made[1], made[2], instances), "as_it_is": as_it_is, **_about(plan)}


def _against_itself(model: nn.Module, x: Tensor, target: Target, instances: int, *, with_all: bool) -> Row:
    original = _fresh(model, x, target)
    plan, planned = _planned(model, x, target)
    row = {"auto": _compared("auto", original, _fresh(planned, x, target), instances), **_about(plan)}
    if with_all:
        plain = rmfx.convert(model, x[:1], verify=False)
        totals = rmfx.report(plain).totals
        assert totals.macs_before and totals.macs_after
        row["all"] = _compared("all", original, _fresh(plain, x, target), instances)
        row["macs_of_all"] = totals.macs_after / totals.macs_before
    return row


def _fresh(model: nn.Module, x: Tensor, target: Target) -> Make:
    return lambda: runner(copy.deepcopy(model), (x,), target)


def _planned(model: nn.Module, x: Tensor, target: Target) -> tuple[rmfx.Plan, nn.Module]:
    plan = rmfx.make_plan(model, x, target=target)
    return plan, rmfx.apply_plan(plan, model, x, verify=True)


def _about(plan: rmfx.Plan) -> Row:
    counts = {name: plan.count(name) for name in sorted({choice.rule for choice in plan.choices})}
    return {"original": plan.original, "channels_last": plan.channels_last, "applied": counts, "notes": plan.notes}


def _compared(label: str, first: Make, second: Make, instances: int) -> Row:
    found = [compare(label, first(), second(), pairs=PAIRS, seconds=SECONDS) for _ in range(instances)]
    firsts, seconds = ([x for one in found for x in getattr(one, side)] for side in ("first", "second"))
    return Comparison(label, tuple(firsts), tuple(seconds)).to_dict()


def _backend(job: Job, target: Target, size: int, instances: int) -> Row:
    model, x = build(job.network), torch.randn(job.batch, 3, size, size)

    def made(backend: str) -> Call:
        compiled = torch.compile(copy.deepcopy(model), backend=backend, isolate_recompiles=True, dynamic=False)
        return _in_inference(compiled, x)

    first, ours = partial(made, "inductor"), partial(made, "rmfx")
    frozen = _compared("frozen", _fresh(model, x, target), ours, instances)  # its weights are no inputs: less to check
    return {"auto": _compared("backend", first, ours, instances), "frozen": frozen}


def _in_inference(model: Callable[[Tensor], Any], x: Tensor) -> Call:
    def call() -> object:
        with torch.no_grad():
            return model(x)

    return call


def _planning(job: Job, target: Target, size: int, instances: int) -> Row:
    model, x = build(job.network), torch.randn(1, 3, size, size)
    planning: Call = lambda: rmfx.make_plan(model, x, target=target, measure=False)  # noqa: E731
    converting: Call = lambda: rmfx.convert(model, x)  # noqa: E731
    return {"auto": compare("planning", converting, planning, pairs=3).to_dict()}


MEASURES: dict[str, Callable[[Job, Target, int, int], Row]] = {
    "zoo": _zoo,
    "table2": _table2,
    "branches": _branches,
    "backend": _backend,
    "planning": _planning,
}


def read(path: Path) -> dict[Job, Row]:
    """The last row of each job."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {Job(row["part"], row["network"], row["target"], row["batch"]): row for row in rows}


def figures(rows: dict[Job, Row]) -> Iterator[Figure]:
    """What was to be reached."""
    for job, row in rows.items():
        ratio, (low, _) = row["auto"]["ratio"], row["auto"]["interval"]
        if job.part == "zoo":
            yield Figure(str(job), "lower bound of auto / original", low, SLOWER)
        elif job.part == "branches":
            limit = 1.0 if job.network in HAND_WRITTEN else 1 / LEAST_SPEED
            yield Figure(str(job), "auto / reparameterised" if limit > 1 else "auto / original", ratio, limit)
        elif job.part == "backend":
            yield Figure(str(job), "rmfx / inductor", ratio, BACKEND_LIMIT)
        elif job.part == "planning":
            yield Figure(str(job), "planning / converting", ratio, PLANNING_LIMIT)
    for target in sorted({job.target for job in rows}):
        zoo = [row["auto"]["ratio"] for job, row in rows.items() if (job.part, job.target) == ("zoo", target)]
        shaped = [row["auto"]["ratio"] for job, row in rows.items() if (job.part, job.target) == ("table2", target)]
        if zoo:
            yield Figure(f"zoo {target}", f"geometric mean of {len(zoo)}", _mean(zoo), MEAN[target.split(":")[0]])
        if shaped and not target.startswith("inductor"):
            yield Figure(f"table2 {target}", "geometric mean of auto / original", _mean(shaped), 1 / TABLE_2)


def _misses(job: Job, row: Row) -> bool:
    """Whether the row misses a limit of its own."""
    return any(not figure.reached for figure in figures({job: row}) if "mean" not in figure.quantity)


def _mean(ratios: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def show(rows: dict[Job, Row]) -> list[Figure]:
    """Print every row, then the figures; returns those that are missed."""
    table = Table("measured", "first, ms", "second, ms", "ratio", "95 %", "all / original", "MACs of all", "applied")
    for job, row in rows.items():
        found, everything = row["auto"], row.get("all")
        low, high = found["interval"]
        cells = [str(job), f"{found['first_ms']:.2f}", f"{found['second_ms']:.2f}", f"{found['ratio']:.3f}"]
        cells += [f"{low:.3f} to {high:.3f}", f"{everything['ratio']:.2f}" if everything else ""]
        cells += [f"{row['macs_of_all']:.2f}" if everything else "", _words(row)]
        table.add_row(*cells)
    CONSOLE.print(table)
    found = list(figures(rows))
    missed = [figure for figure in found if not figure.reached]
    for figure in found:
        if "mean" in figure.quantity:
            CONSOLE.print(f"{figure.subject}: {figure.quantity} {figure.value:.3f}, limit {figure.limit:.3f}")
    CONSOLE.print(f"{len(found) - len(missed)} of {len(found)} figures reached")
    for figure in missed:
        CONSOLE.print(f"[red]missed[/] {figure.subject}: {figure.quantity} is {figure.value:.4g} > {figure.limit:.4g}")
    return missed


def _words(row: Row) -> str:
    if row.get("original"):
        return "nothing"
    applied = [f"{count} {name}" for name, count in row.get("applied", {}).items() if count]
    others = [f"{carrier} {row[carrier]['ratio']:.2f}" for carrier in ("masked", "split", "frozen") if carrier in row]
    return ", ".join([*applied, *(["channels last"] if row.get("channels_last") else []), *others])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runtime", nargs="+", choices=RUNTIMES, default=["eager", "onnxruntime", "inductor"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", help="only these networks")
    parser.add_argument("--threads", type=int, default=1, help="of each runtime (default: 1)")
    parser.add_argument("--size", type=int, default=160, help="of images (default: 160)")
    parser.add_argument("--output", type=Path, default=ROWS)
    parser.add_argument("--again", action="store_true", help="measure also what there is a row for")
    parser.add_argument("--confirm", action="store_true", help="measure rows that miss again, on fresh instances")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what there is")
    given = parser.parse_args()
    done = read(given.output)
    if not given.table:
        wanted = jobs(given.part, [f"{runtime}:{given.device}" for runtime in given.runtime])
        chosen = [job for job in wanted if not given.models or job.network in given.models]
        missed = [job for job, row in done.items() if row.get("instances", 1) == 1 and _misses(job, row)]
        todo = [job for job in chosen if (job in missed if given.confirm else given.again or job not in done)]
        for job in tracked(todo, len(todo)):
            row = measure(job, given.threads, given.size, INSTANCES if given.confirm else 1)
            given.output.parent.mkdir(parents=True, exist_ok=True)
            with given.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            torch._dynamo.reset()
            gc.collect()
        done = read(given.output)
    sys.exit(1 if show(done) or not done else 0)


if __name__ == "__main__":
    main()
