"""Random residual networks, converted and compared in float64: wrong = 0, crashed = 0.

One seed is one network and one set of options, for ever: ``--only 17 --only 23`` looks at these again and prints them
as Python. A network that fails is shrunk and printed, too; its seed is in the result file.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context

import torch

from benchmarks.common import CONSOLE, Figure, finish, tracked
from benchmarks.random_networks.draw import seeded
from benchmarks.random_networks.judge import Order, Verdict, draw_order, judge, shrink
from benchmarks.random_networks.program import Network

PATIENCE = 300  # seconds for one network; conversions take a fraction of one as a rule


@dataclass(frozen=True)
class Row:
    """One network: its seed, its features, its verdict, the seconds it took."""

    seed: int
    features: frozenset[str]
    order: Order
    verdict: Verdict
    seconds: float

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.verdict.status}"


@dataclass
class Tally:
    """All networks so far."""

    rows: list[Row] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Networks that ended so."""
        return sum(row.verdict.status == status for row in self.rows)

    def seeds(self, status: str) -> list[int]:
        """Their seeds."""
        return sorted(row.seed for row in self.rows if row.verdict.status == status)

    def features(self) -> dict[str, dict[str, int]]:
        """For each feature: networks that have it, and what became of the sums in these."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for row in self.rows:
            for feature in row.features:
                found[feature].update(networks=1, **row.verdict.sums)
        return {name: dict(count) for name, count in sorted(found.items(), key=lambda item: -item[1]["networks"])}

    def summary(self) -> dict[str, object]:
        """What stands in the result file."""
        sums, reasons = Counter[str](), Counter[str]()
        for row in self.rows:
            sums.update(row.verdict.sums)
            reasons.update(row.verdict.reasons)
        worst = max(self.rows, key=lambda row: row.verdict.difference, default=None)
        return {
            "networks": len(self.rows),
            "statuses": dict(Counter(row.verdict.status for row in self.rows)),
            "inputs_compared": sum(row.verdict.sizes for row in self.rows),
            "sums": dict(sums),
            "reasons": dict(reasons.most_common()),
            "worst_difference": worst and {"seed": worst.seed, "difference": worst.verdict.difference},
            "failing_seeds": {status: self.seeds(status) for status in ("wrong", "crashed")},
            "features": self.features(),
            "slowest": [
                {"seed": row.seed, "seconds": round(row.seconds, 2)}
                for row in sorted(self.rows, key=lambda row: -row.seconds)[:5]
            ],
        }


def of_seed(seed: int) -> tuple[Network, Order]:
    """The network and the options of a seed."""
    return seeded(seed), draw_order(random.Random(f"options {seed}"))


def measure(seed: int) -> Row:
    """Judge the network of a seed; one that takes too long has crashed."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    network, order = of_seed(seed)
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(PATIENCE)
    try:
        verdict = judge(network, order)
    except TimeoutError:
        verdict = Verdict("crashed", f"takes more than {PATIENCE} seconds\n{traceback.format_exc()}")
    finally:
        signal.alarm(0)
    return Row(seed, network.features, order, verdict, time.perf_counter() - begin)


def _give_up(number: int, frame: object) -> None:
    raise TimeoutError


def rows(seeds: list[int], workers: int) -> Iterator[Row]:
    """The rows of all seeds, in the order in which they end."""
    if workers <= 1:
        yield from map(measure, seeds)
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        for done in as_completed([pool.submit(measure, seed) for seed in seeds]):
            yield done.result()


def show(row: Row, smaller: bool) -> None:
    """Print a network, its verdict and, where it fails, a smaller one that does."""
    network, order = of_seed(row.seed)
    CONSOLE.rule(f"seed {row.seed}: {row.verdict.status}, converted {order}")
    print(network.source())
    print(row.verdict.detail)
    if row.verdict.bad and smaller:
        network, order = shrink(network, order)
        CONSOLE.rule(f"seed {row.seed}, shrunk, converted {order}, input {network.shape}, weights {network.seed}")
        print(network.source())
        print(judge(network, order).detail)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--only", type=int, action="append", help="this seed, printed; may be repeated")
    parser.add_argument("--no-shrink", action="store_true", help="print failing networks as they are")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results/ as it is")
    options = parser.parse_args()
    seeds = options.only or list(range(options.seed, options.seed + options.networks))
    tally = Tally()
    for row in tracked(rows(seeds, min(options.workers, len(seeds))), len(seeds)):
        tally.rows.append(row)
        if row.verdict.bad:
            lines = [line.strip() for line in row.verdict.detail.split("\n") if line.strip(" ^~")]
            print(f"seed {row.seed} is {row.verdict.status}: {' | '.join(lines[-3:])}", file=sys.stderr, flush=True)
    for row in sorted(tally.rows, key=lambda row: row.seed):
        if options.only or row.verdict.bad:
            show(row, not options.no_shrink)
    summary = tally.summary()
    subject = f"{len(seeds)} networks"
    figures = [Figure(subject, status, float(tally.count(status)), 0.0) for status in ("wrong", "crashed")]
    sums = summary["sums"]
    CONSOLE.print(f"networks {summary['statuses']}, sums {sums}, worst difference {summary['worst_difference']}")
    finish("fuzz", figures, summary, write=not options.no_write and not options.only)


if __name__ == "__main__":
    main()
