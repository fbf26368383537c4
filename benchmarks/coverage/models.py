"""Which networks there are, how each is built, and at which input sizes it may be tried."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.coverage.weights import uninitialised
from rmfx.algebra.exact import default_dtype
from rmfx.vision import import_timm, import_torchvision

BATCH = 2
FREE_SIZES = (96, 64, 128)  # for networks that take any size: multiples of 32, where no pool hangs over the border
FIXED_SIZES = (64, 56, 96, 112, 128, 192)  # for networks built for one size, where it can be chosen
SOURCES = ("torchvision", "timm")


@dataclass(frozen=True)
class Attempt:
    """One way of building a network: keyword arguments and the shape of its input."""

    shape: tuple[int, ...]
    options: tuple[tuple[str, object], ...] = ()


def all_names() -> list[str]:
    """``torchvision:NAME`` of every classification and segmentation network, ``timm:NAME`` of every model."""
    models = import_torchvision().models
    kinds = [models, models.segmentation]
    vision = sorted(name for kind in kinds for name in models.list_models(kind))
    return [f"torchvision:{name}" for name in vision] + [f"timm:{name}" for name in import_timm().list_models()]


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of ``names`` that one of ``patterns`` matches, with or without the source in front.

    >>> matching(["timm:resnet18", "torchvision:resnet18", "timm:vgg11"], ["resnet*", "timm:v*"])
    ['timm:resnet18', 'torchvision:resnet18', 'timm:vgg11']
    """
    return [
        name
        for name in names
        if any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(name.partition(":")[2], p) for p in patterns)
    ]


def attempts(name: str, size: int | None = None) -> Iterator[Attempt]:
    """Ways to build ``name``, in order of preference: small inputs first, the published size last.

    Args:
        name: of the network.
        size: tried before all others, where the network takes any.
    """
    source, _, network = name.partition(":")
    free = FREE_SIZES if size is None else (size, *FREE_SIZES)
    if source == "torchvision":
        own = 299 if network == "inception_v3" else 224
        sizes = () if network.startswith(("vit_", "maxvit")) else free
        if network.startswith("vit_"):
            patch = int(network.rpartition("_")[2])
            yield Attempt((BATCH, 3, 4 * patch, 4 * patch), (("image_size", 4 * patch),))
        elif network.startswith("maxvit"):
            yield Attempt((BATCH, 3, 64, 64), (("input_size", (64, 64)), ("partition_size", 2)))
        for pixels in (*sizes, own):
            yield Attempt((BATCH, 3, pixels, pixels))
        return
    config = import_timm().models.get_pretrained_cfg(network)
    channels, *own = config.input_size
    if config.fixed_input_size:
        for pixels in FIXED_SIZES:
            if pixels < own[0]:
                yield Attempt((BATCH, channels, pixels, pixels), (("img_size", pixels),))
    else:
        for pixels in free:
            if pixels < own[0]:
                yield Attempt((BATCH, channels, pixels, pixels))
    yield Attempt((1, channels, *own))


def build(name: str, attempt: Attempt, seed: int = 0) -> tuple[nn.Module, set[int]]:
    """The network in eval mode and float64, with the addresses of what is not initialised yet."""
    source, _, network = name.partition(":")
    options = dict(attempt.options)
    with default_dtype(torch.float64), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if source == "torchvision":
            get = import_torchvision().models.get_model
            model, skipped = uninitialised(lambda: get(network, weights=None, **_undownloaded(network), **options))
        else:
            timm = import_timm()
            model, skipped = uninitialised(lambda: timm.create_model(network, pretrained=False, **options))
    return model.double(), skipped  # buffers may be made in float32 all the same


def _undownloaded(network: str) -> dict[str, object]:
    """What keeps torchvision from downloading weights of a backbone, and from drawing numbers with scipy."""
    if network.startswith(("deeplabv3", "fcn", "lraspp")):
        return {"weights_backbone": None}
    return {"init_weights": False} if network in ("googlenet", "inception_v3") else {}
