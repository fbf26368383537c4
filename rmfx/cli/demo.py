"""``rmfx demo``: the main job on real data, with nothing downloaded."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from rmfx import demo as library
from rmfx.cli import console, options
from rmfx.measure.paired import Comparison

_WHY = """\
The plain network does more arithmetic: a carried copy of each block's input passes through its convolutions.
torch runs one layer after the other, so it gains from the folded batch norms and the sums that are gone.
onnxruntime on a CPU folds batch norms itself and computes conv + add + ReLU in one kernel: there a shortcut costs
almost nothing, and removing it buys no speed. What plainness buys: every tensor has one reader, so an FPGA or NPU
pipeline needs no buffer to hold a shortcut; channels can be pruned without keeping two branches aligned; no Add is
left to quantise."""


def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Keep the ONNX files in this folder.")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training images.")] = library.EPOCHS,
    seed: options.SeedOption = 0,
    json: options.JsonOption = False,
) -> None:
    """Train a small residual network on handwritten digits, convert it, and show that nothing changed.

    Then export both networks to ONNX, run them in onnxruntime, and time them. Leaves with code 1 if a single
    prediction changes.
    """
    with contextlib.ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not folder.is_dir():
            raise typer.BadParameter(f"{folder}: the folder does not exist")
        with contextlib.redirect_stdout(sys.stderr), console.StepBars() as bars:
            result = library.run(folder, seed=seed, epochs=epochs, on_step=bars)
        if json:
            console.out_json(result.to_dict())
            return
        _show(result)
        if output is not None:
            console.out(f"\nwrote {result.onnx_original} and {result.onnx_plain}")


def _show(result: library.DemoResult) -> None:
    of_all = f"of {result.test_images}"
    console.out(f"accuracy on {result.test_images} test images: {result.accuracy:.2%}")
    console.out(f"same prediction without residual connections, in torch: {result.same_in_torch} {of_all}")
    console.out(f"same prediction, plain ONNX file in onnxruntime: {result.same_in_onnxruntime} {of_all}")
    console.out(f"largest relative difference in float64: {result.float64_difference:.1e}\n")
    console.show_report(result.report)
    console.out("\nlatency of one image, measured in interleaved pairs; ratio is plain / original:")
    for comparison in result.latencies:
        console.out(f"  {comparison}")
    console.out(f"\n{_verdict(result.latencies)}\n{_WHY}")


def _verdict(latencies: tuple[Comparison, ...]) -> str:
    """Say which way each measurement went; a ratio whose interval straddles 1 is no difference.

    >>> _verdict((Comparison("torch", (1.0, 1.0), (2.0, 2.1)),))
    'Here the plain network is slower in torch.'
    """
    said = [f"{comparison.verdict} in {comparison.label}" for comparison in latencies]
    return f"Here the plain network is {', '.join(said)}."
