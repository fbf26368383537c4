"""Table 4: the layers of RMNet 26x3_32 after conversion, line by line.

Table 1 gives this network 8.8 M parameters and 0.51 G MACs, which contradicts the layers that Table 4 prints; both are
shown beside what is counted here.
"""

from __future__ import annotations

from itertools import zip_longest

import torch

import rmfx
from benchmarks.common import CONSOLE, macs
from benchmarks.paper import output, published
from benchmarks.paper.setting import setting
from rmfx.models import rmnet26x3_32


def main() -> None:
    """Run the benchmark."""
    given = setting(__doc__)
    network = rmnet26x3_32().eval()
    plain = rmfx.convert(network, torch.zeros(1, 3, 32, 32))
    layers = [repr(layer) for layer in rmfx.to_sequential(plain, strict=True)]
    paper = published.TABLE_4
    rows = [
        (index, ours, "equal" if ours == theirs else theirs)
        for index, (ours, theirs) in enumerate(zip(layers, paper, strict=False))
    ]
    output.show("Table 4: RMNet 26x3_32, converted", ("", "layer", "paper"), rows)
    counts = {
        form: {"parameters": sum(p.numel() for p in model.parameters()), "macs": macs(model, 32)}
        for form, model in (("training", network), ("converted", plain))
    }
    for form, count in counts.items():
        CONSOLE.print(f"{form}: {count['parameters'] / 1e6:.2f} M parameters, {count['macs'] / 1e9:.3f} G MACs")
    CONSOLE.print(
        "the paper's Table 1 prints 8.8 M and 0.51 G for it; the layers of its Table 4 have 12.05 M and 0.647 G"
    )
    different = sum(a != b for a, b in zip_longest(layers, paper))
    figures = [
        output.Figure("RMNet 26x3_32", "layers that differ from the paper's", different, 0),
        output.off(
            "RMNet 26x3_32", "parameters of Table 4's layers", counts["converted"]["parameters"], 12.05e6, 0.001
        ),
        output.off("RMNet 26x3_32", "MACs of Table 4's layers", counts["converted"]["macs"], 0.647e9, 0.001),
    ]
    output.save("table4", given, {"figures": output.as_dicts(figures), "layers": layers, "counts": counts})
    output.leave(figures)


if __name__ == "__main__":
    main()
