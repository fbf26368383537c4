"""Runs many networks, each in a process of its own, so that a crash, a kill or a timeout is a row like any other.

The processes are forked from a server that has imported everything, which saves three seconds for each.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from benchmarks.coverage.row import Order, Row, measure

SERVER = multiprocessing.get_context("forkserver")
BLAMELESS = ("right", "counted", "later")


@dataclass(frozen=True)
class Plan:
    """What a sweep may use.

    Attributes:
        workers: processes at a time.
        memory: bytes, for all of them together.
        timeout: seconds for one network.
        execute: run the networks, instead of counting only.
        size: of the inputs, to be tried first.
    """

    workers: int
    memory: int
    timeout: float
    execute: bool
    size: int | None = None


@dataclass(frozen=True)
class _Job:
    order: Order
    process: BaseProcess
    receiver: Connection
    deadline: float


def sweep(names: Sequence[str], plan: Plan, done: Callable[[Row], None]) -> None:
    """Measure ``names`` side by side, then those that need more memory than a share, one at a time.

    Args:
        done: is given each row as soon as there is one.
    """
    # Set before the server starts: BLAS reads it when it is loaded.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    SERVER.set_forkserver_preload(["benchmarks.coverage.preload"])
    alone = replace(plan, workers=1)
    later: list[str] = []
    for row in _rows(names, plan, last=plan.workers == 1):
        if row["status"] == "later":
            later.append(row["model"])
        else:
            done(row)
    for row in _rows(later, alone, last=True):
        done(row)


def _rows(names: Sequence[str], plan: Plan, last: bool) -> Iterator[Row]:
    waiting = list(reversed(names))
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < plan.workers:
                running.append(
                    _start(Order(waiting.pop(), plan.memory // plan.workers, plan.execute, last, True), plan)
                )
            wait([job.receiver for job in running], timeout=0.5)
            for job in list(running):
                row = _row_of(job)
                if row is not None:
                    running.remove(job)
                    yield row
    finally:
        for job in running:
            job.process.kill()


def _start(order: Order, plan: Plan) -> _Job:
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_work, args=(order, sender), daemon=True)
    process.start()
    sender.close()
    return _Job(order, process, receiver, time.monotonic() + plan.timeout)


def _work(order: Order, sender: Connection) -> None:
    """Runs in the process of one network."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        sender.send(measure(order))


def _row_of(job: _Job) -> Row | None:
    """The row of a job that has ended in whatever way, else ``None``."""
    row: Row | None = None
    if job.receiver.poll():
        with contextlib.suppress(EOFError):
            row = job.receiver.recv()
    elif job.process.is_alive() and time.monotonic() < job.deadline:
        return None
    timed_out = row is None and time.monotonic() >= job.deadline
    if timed_out:
        job.process.kill()
    job.process.join()
    job.receiver.close()
    if row is not None:
        return row
    how = "timeout" if timed_out else "crashed"
    source = job.order.name.partition(":")[0]
    what = "took too long" if timed_out else f"the process ended with exit code {job.process.exitcode}"
    return {"model": job.order.name, "source": source, "status": how, "error": what}
