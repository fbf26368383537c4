"""timm's un-reparameterised networks: rmfx merges every parallel branch, without knowing their classes.

Against timm's own ``reparameterize_model`` on the same weights: convs left on a parallel branch (a conv whose
input has a second reader, or whose output is summed with another tensor), MACs at 224x224, and the outputs in
float64.
"""

from __future__ import annotations

import copy
import operator

import torch
from torch import fx, nn

import rmfx
from benchmarks.common import Figure, finish, macs, options, tracked
from rmfx.check.plain import count_joins
from rmfx.hostile import randomise
from rmfx.vision import import_timm

MODELS = ("repvgg_a2", "mobileone_s1")
TOLERANCE = 1e-12
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def convs(model: nn.Module) -> int:
    """How many convolutions the network holds."""
    return sum(isinstance(module, CONVS) for module in model.modules())


def parallel_convs(model: fx.GraphModule) -> int:
    """Convs that run beside something else: a second reader of their input, or a sum behind them."""
    calls = [n for n in model.graph.nodes if n.op == "call_module" and isinstance(model.get_submodule(n.target), CONVS)]
    return sum(len(n.args[0].users) > 1 or any(_joins(user) for user in n.users) for n in calls)


def _joins(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (operator.add, torch.add, torch.cat)


def measure(name: str) -> tuple[list[Figure], dict[str, object]]:
    """Convert one network and compare with timm's own answer."""
    timm = import_timm()
    torch.manual_seed(0)
    model = randomise(timm.create_model(name).double(), torch.randn(4, 3, 64, 64).double())
    x = torch.randn(2, 3, 65, 65, dtype=torch.float64) * 8
    converted = rmfx.convert(model, verify=False)
    theirs = timm.utils.reparameterize_model(copy.deepcopy(model))
    with torch.no_grad():
        want, got, reference = model(x), converted(x), theirs(x)
    counts = [convs(m) for m in (model, theirs, converted)]
    ours = float((want - got).abs().max() / want.abs().max())
    timms = float((want - reference).abs().max() / want.abs().max())
    left, joins = parallel_convs(converted), len(count_joins(converted, x))
    muls = [macs(m) for m in (model, theirs, converted)]
    figures = [
        Figure(name, "convs left on a parallel branch", left, 0),
        Figure(name, "joins left in the exported graph", joins, 0),
        Figure(name, "convs, difference to timm's", abs(counts[2] - counts[1]), 0),
        Figure(name, "MACs, difference to timm's", abs(muls[2] - muls[1]), 0),
        Figure(name, "relative difference, float64", ours, TOLERANCE),
    ]
    columns = ("original", "timm", "rmfx")
    samples = {
        "convs": dict(zip(columns, counts, strict=True)),
        "macs": dict(zip(columns, muls, strict=True)),
        "relative_difference_float64": {"timm": timms, "rmfx": ours},
    }
    return figures, samples


def main() -> None:
    """Run the benchmark."""
    arguments = options(__doc__, MODELS)
    figures: list[Figure] = []
    samples: dict[str, object] = {}
    for name in tracked(arguments.models, len(arguments.models)):
        rows, samples[name] = measure(name)
        figures += rows
    finish("branches", figures, samples, write=not arguments.no_write)


if __name__ == "__main__":
    main()
