"""What a script of this folder is told on its command line."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import RESULTS
from benchmarks.paper.networks import FULL_WIDTH

QUICK_WIDTH = 16
QUICK_FOLDER = RESULTS.parents[1] / "build" / "paper"


@dataclass(frozen=True)
class Setting:
    """One run of one script.

    Attributes:
        data: name of the dataset that networks are trained on (:func:`rmfx.learn.open_data`).
        root: folder of its files, for CIFAR.
        quick: seconds instead of hours: one epoch of narrow networks, small batches, small images. Shows that the
            script runs; its numbers mean little, and go to ``build/paper`` unless another folder is named.
        device: ``"cuda"`` or ``"cpu"``.
        dtype: of the networks that are timed.
        epochs: of every training, instead of the script's own number.
        batch: images per step.
        images: how many of the training images are used; None: all.
        width: of the first stage of the trained networks, 64 in the paper.
        bf16: whether trainings compute in mixed precision.
        seeds: how many trainings of each network, seeds 0, 1, ...
        jobs: trainings at a time.
        folder: where results go.
        write: whether they do.
    """

    data: str
    root: Path | None
    quick: bool
    device: str
    dtype: torch.dtype
    epochs: int | None
    batch: int
    images: int | None
    width: int
    bf16: bool
    seeds: int
    jobs: int
    folder: Path
    write: bool


def setting(
    doc: str | None, arguments: list[str] | None = None, *, also: argparse.ArgumentParser | None = None
) -> Setting:
    """Parse the command line of a script whose docstring is ``doc``; ``--help`` tells the options of ``also``."""
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[] if also is None else [also],
    )
    parser.add_argument("--data", default="digits32", help="digits, digits32, cifar10, cifar100, folder:PATH")
    parser.add_argument("--root", type=Path, help="folder with the files of CIFAR")
    parser.add_argument("--quick", action="store_true", help="under two minutes: shows that everything runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--epochs", type=int, help="of every training (default: the script's own)")
    parser.add_argument("--batch", type=int, default=128, help="of every training (default: 128)")
    parser.add_argument("--images", type=int, help="train on the first so many images (default: all)")
    parser.add_argument("--width", type=int, help="first stage of trained networks (default: 64; quick: 16)")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision (default: on CUDA)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each network (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    parser.add_argument("--folder", type=Path, help="for results (default: benchmarks/results/paper)")
    parser.add_argument("--no-write", action="store_true", help="write no results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    folder = given.folder or (QUICK_FOLDER if given.quick else RESULTS / "paper")
    return Setting(
        data=given.data,
        root=given.root,
        quick=given.quick,
        device=given.device,
        dtype=getattr(torch, given.dtype),
        epochs=given.epochs,
        batch=given.batch,
        images=given.images,
        width=given.width or (QUICK_WIDTH if given.quick else FULL_WIDTH),
        bf16=given.bf16 or given.device == "cuda",
        seeds=given.seeds,
        jobs=given.jobs,
        folder=folder,
        write=not given.no_write,
    )
