"""MACs at 224x224 of converted over original torchvision networks.

Counted by ``torch.utils.flop_counter`` (halved: it counts two operations per multiply-accumulate) on the meta
device, so that neither rmfx's own cost model nor any weight plays a part.
"""

from __future__ import annotations

import rmfx
from benchmarks.common import Figure, finish, macs, options, torchvision_model, tracked

LIMITS = {
    "resnet18": 1.80,
    "resnet50": 3.95,
    "resnext50_32x4d": 2.45,
    "regnet_x_400mf": 1.87,
    "mobilenet_v2": 1.10,
    "mnasnet1_0": 1.13,
}


def main() -> None:
    """Run the benchmark."""
    arguments = options(__doc__, list(LIMITS))
    figures, samples = [], {}
    for name in tracked(arguments.models, len(arguments.models)):
        model = torchvision_model(name)
        converted = rmfx.convert(model, verify=False)
        params = [sum(p.numel() for p in m.parameters()) for m in (model, converted)]
        before, after = macs(model), macs(converted)
        figures.append(Figure(name, "MACs, converted / original", after / before, LIMITS[name]))
        samples[name] = {"macs": [before, after], "parameters": params}
    finish("macs", figures, samples, write=not arguments.no_write)


if __name__ == "__main__":
    main()
