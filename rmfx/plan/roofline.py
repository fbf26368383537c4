"""Estimates of time from shapes: each kernel takes as long as its arithmetic or its memory traffic, and a launch.

A *kernel* is what the runtime executes in one go: a layer together with what the runtime fuses into it. The profiles
are rough figures of today's machines; only ratios between forms of the same place are ever used.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import fx, nn

from rmfx.algebra.pointwise import is_pointwise
from rmfx.graph.cost import layer_parameters, positions_of
from rmfx.graph.facts import is_plain, is_sum, module_of, shape_of
from rmfx.graph.linear import affine_of, dims_of, mixes
from rmfx.measure.target import Target
from rmfx.modules import ChannelSlice


@dataclass(frozen=True)
class Profile:
    """How fast a runtime on a kind of device is, roughly.

    Attributes:
        macs: multiply-accumulates per second of a dense convolution.
        grouped: the share of it that grouped convolutions reach.
        depthwise: the share that depthwise ones reach.
        bandwidth: bytes per second.
        launch: seconds per kernel.
        fuses: activations that are computed within the convolution before them; ``None`` for all.
        fuses_sums: whether a sum is computed within the convolution before it.
        breaks: whether an activation that is not fused also costs a change of memory layout, forth and back.
        copies_slices: whether a slice of channels is copied.
        number: bytes of a weight and of an activation.
    """

    macs: float
    grouped: float
    depthwise: float
    bandwidth: float
    launch: float
    fuses: tuple[type[nn.Module], ...] | None
    fuses_sums: bool
    breaks: bool = False
    copies_slices: bool = True
    number: int = 4


_ORT_FUSES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh)
_PROFILES = {
    ("eager", "cpu"): Profile(80e9, 0.6, 0.12, 20e9, 8e-6, (), False, copies_slices=False),
    ("inductor", "cpu"): Profile(100e9, 0.6, 0.12, 20e9, 2e-6, None, True),
    ("onnxruntime", "cpu"): Profile(60e9, 0.6, 0.25, 20e9, 2e-6, _ORT_FUSES, True, breaks=True),
    ("onnxruntime-int8", "cpu"): Profile(
        150e9, 0.4, 0.1, 10e9, 3e-6, (nn.ReLU, nn.ReLU6), False, breaks=True, number=1
    ),
    ("eager", "cuda"): Profile(20e12, 0.3, 0.05, 2e12, 6e-6, (), False, copies_slices=False),
    ("inductor", "cuda"): Profile(20e12, 0.3, 0.05, 2e12, 3e-6, (), False),
    ("onnxruntime", "cuda"): Profile(20e12, 0.3, 0.05, 2e12, 3e-6, (nn.ReLU,), False),
}


@dataclass(frozen=True)
class Cost:
    """What a network or a part of it costs, for the shapes that its nodes know.

    Attributes:
        macs: multiply-accumulates.
        parameters: numbers in layers.
        activation_bytes: read and written by kernels, without weights.
        kernels: number of launches.
        seconds: the estimate.
    """

    macs: int = 0
    parameters: int = 0
    activation_bytes: int = 0
    kernels: int = 0
    seconds: float = 0.0

    def at_most(self, other: Cost) -> bool:
        """Whether this is no more than ``other`` in every respect: then nothing needs to be measured.

        >>> Cost(macs=1, kernels=1).at_most(Cost(macs=2, kernels=1)), Cost(kernels=2).at_most(Cost(macs=1, kernels=1))
        (True, False)
        """
        return all(getattr(self, name) <= getattr(other, name) for name in self.__dataclass_fields__)

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def profile_of(target: Target) -> Profile:
    """The rough figures for ``target``."""
    return _PROFILES[target.runtime, target.device.split(":")[0]]


def cost(nodes: Iterable[fx.Node], target: Target) -> Cost:
    """The cost of ``nodes`` of a graph in normal form on ``target``.

    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 2, 1)))
    >>> for node in gm.graph.nodes:
    ...     node.meta["shape"] = torch.Size([1, 1 if node.op == "placeholder" else 2, 4, 4])
    >>> cost(gm.graph.nodes, Target()).macs
    32
    """
    profile = profile_of(target)
    total = Cost()
    for node in nodes:
        if node.op in ("placeholder", "output", "get_attr") or is_plain(node):
            continue
        total += _kernel(node, profile)
    return total


def _kernel(node: fx.Node, profile: Profile) -> Cost:
    module = module_of(node)
    parameters = layer_parameters(node)
    if isinstance(module, ChannelSlice | nn.Flatten | nn.Identity) and not profile.copies_slices:
        return Cost(parameters=parameters)
    written = _bytes(node, profile)
    if _is_fused(node, profile):
        extra = written if is_sum(node) else 0  # the other operand is read; writing replaces the convolution's
        return Cost(0, parameters, extra, 0, extra / profile.bandwidth)
    read = sum(_bytes(source, profile) for source in node.all_input_nodes)
    moved = read + written
    if not mixes(node):
        times = (
            3 if profile.breaks and module is not None and is_pointwise(module) and not _fusible(module, profile) else 1
        )
        return Cost(0, parameters, moved, 1, times * moved / profile.bandwidth + profile.launch)
    macs, rate = _arithmetic(node, profile)
    seconds = max(macs / rate, (moved + profile.number * parameters) / profile.bandwidth)
    return Cost(macs, parameters, moved, 1, seconds + profile.launch)


def _arithmetic(node: fx.Node, profile: Profile) -> tuple[int, float]:
    """Multiply-accumulates of a convolution or linear layer, and how many are done per second."""
    dims = dims_of(node)
    assert dims is not None
    affine = affine_of(node, dims)
    shape = shape_of(node)
    batch = shape[0] if shape is not None else 1
    macs = affine.macs_per_position * (positions_of(node, dims) or 1) * batch
    if affine.groups == 1:
        return macs, profile.macs
    per_group = affine.in_channels // affine.groups
    return macs, profile.macs * (profile.depthwise if per_group < 4 else profile.grouped)


def _is_fused(node: fx.Node, profile: Profile) -> bool:
    """Whether the runtime computes ``node`` within a convolution before it."""
    producers = [source for source in node.all_input_nodes if mixes(source) and len(source.users) == 1]
    if is_sum(node) or node.target is operator.sub:
        return profile.fuses_sums and bool(producers)
    module = module_of(node)
    if module is None or not is_pointwise(module) or not _fusible(module, profile):
        return False
    source = node.all_input_nodes[0]
    return len(source.users) == 1 and (mixes(source) or (is_sum(source) and _is_fused(source, profile)))


def _fusible(module: nn.Module, profile: Profile) -> bool:
    return profile.fuses is None or type(module) in profile.fuses


def _bytes(node: fx.Node, profile: Profile) -> int:
    shape = shape_of(node)
    return profile.number * prod(shape) if isinstance(shape, torch.Size) else 0
