"""Stages: layers that move positions alike on every channel, and are not linear or cost more as a convolution.

A tensor beside one can only be carried where it goes through the very same layer.
"""

from __future__ import annotations

from torch import fx, nn

from rmfx.graph.facts import module_of

STAGES = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.Upsample,
    nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d,
)


def is_stage(node: fx.Node) -> bool:
    """Whether the node calls a layer that acts alike on every channel and on more than one position."""
    module = module_of(node)
    return type(module) in STAGES and not getattr(module, "return_indices", False)
