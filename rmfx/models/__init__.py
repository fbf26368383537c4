"""The paper's networks, in training form: build one, train it, convert it."""

from rmfx.models.rmnet import (
    rmnet,
    rmnet26x3_32,
    rmnet41x4_8,
    rmnet41x5_16,
    rmnet50x5_32,
    rmnet50x6_32,
    rmnet101x6_16,
    rmnet152x6_32,
)

__all__ = [
    "rmnet",
    "rmnet26x3_32",
    "rmnet41x4_8",
    "rmnet41x5_16",
    "rmnet50x5_32",
    "rmnet50x6_32",
    "rmnet101x6_16",
    "rmnet152x6_32",
]
