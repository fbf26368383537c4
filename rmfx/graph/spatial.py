"""Reads the linear maps of layers that move values in space: average pools, pads, pools of one position, unshuffles.

A pool to a given size, and one that may hang over the border, are fixed maps at some input sizes only:
:func:`size_dependent` tells which, and whoever rewrites one keeps the network at the sizes it was converted for.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx, nn

from rmfx.algebra.affine import Affine, average_pool, from_tensors
from rmfx.algebra.grid import Axis, Grid
from rmfx.errors import InexactError
from rmfx.graph.facts import module_of, shape_of

AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
PADS: dict[str, tuple[type[nn.Module], ...]] = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}
FAMILIES = (AVERAGES, ADAPTIVE, MAXIMA, *PADS.values())
_MODES = {layer: mode for mode, family in PADS.items() for layer in family}


def is_spatial(node: fx.Node) -> bool:
    """Whether the node calls one of these layers, and it may be a linear map here."""
    module: Any = module_of(node)
    if type(module) in AVERAGES or type(module) in _MODES or type(module) is nn.PixelUnshuffle:
        return True
    if type(module) in MAXIMA:
        return not module.return_indices and all(k == 1 for k in _tuple(module.kernel_size, 1))
    return type(module) in ADAPTIVE and _window(node, module) is not None


def size_dependent(node: fx.Node) -> bool:
    """Whether the map of the node is what it is at the input sizes of the example only."""
    module: Any = module_of(node)
    if type(module) in ADAPTIVE:
        return True
    return type(module) in AVERAGES and module.ceil_mode and any(s > 1 for s in _tuple(module.stride, 1))


def spatial_grid(node: fx.Node, dims: int) -> tuple[Grid, int]:
    """The taps of the node's map and, where they are of one weight, the number that their sum is divided by.

    Raises:
        InexactError: where the layer is not a fixed linear map, saying why.
    """
    module: Any = module_of(node)
    if type(module) in _MODES:
        return _pad_grid(module.padding, _MODES[type(module)]), 1
    if type(module) in MAXIMA:
        return Grid.sampling(_tuple(module.stride, dims)), 1
    if type(module) is nn.PixelUnshuffle:
        side = _tuple(module.downscale_factor, dims)
        return Grid.of(side, side), 1
    if type(module) in ADAPTIVE:
        window = _window(node, module)
        if window is None:
            raise InexactError("an adaptive pool is a fixed map only where its output size divides the input size")
        return Grid.of(window, window), prod(window)
    kernel, stride, padding = (_tuple(getattr(module, name), dims) for name in ("kernel_size", "stride", "padding"))
    override = getattr(module, "divisor_override", None)
    if any(padding) and not module.count_include_pad and not override:
        raise InexactError("the divisor of an average pool that does not count its padding varies at the borders")
    grid = Grid.of(kernel, stride, padding)
    if module.ceil_mode and any(s > 1 for s in stride) and not _fits(node, grid):
        raise InexactError("an average pool with ceil_mode has another divisor where it hangs over the border")
    return grid, int(override or prod(kernel))


def spatial_map(node: fx.Node, dims: int, channels: int) -> Affine:
    """The linear map of the node on ``channels`` channels; raises as :func:`spatial_grid` does."""
    grid, divisor = spatial_grid(node, dims)
    if type(module_of(node)) is nn.PixelUnshuffle:  # each output channel reads one tap of one input channel
        taps = torch.eye(grid.taps, dtype=torch.float64).reshape(-1, 1, *grid.kernel)
        return from_tensors(taps.repeat(channels, 1, 1, 1), None, grid, groups=channels)
    return average_pool(channels, grid, divisor)


def _pad_grid(padding: int | tuple[int, ...], mode: str) -> Grid:
    """One tap, shifted by the width of the border; a negative width crops."""
    widths = padding if isinstance(padding, tuple) else (padding, padding)
    if mode != "zeros" and min(widths) < 0:
        raise InexactError(f"{mode} padding of negative width crops")
    pairs = [(widths[i], widths[i + 1]) for i in range(0, len(widths), 2)]
    return Grid(tuple(Axis(before=before, after=after) for before, after in reversed(pairs)), mode)


def _fits(node: fx.Node, grid: Grid) -> bool:
    """Whether rounding the output size up and down is the same at the known sizes: no window hangs over."""
    source, result = shape_of(node.all_input_nodes[0]), shape_of(node)
    if source is None or result is None or len(source) != grid.dims + 2:
        return False
    return grid.out_size(source[2:]) == tuple(result[2:])


def _window(node: fx.Node, module: Any) -> tuple[int, ...] | None:
    """The window of an adaptive pool whose output is no single position, where it divides the input evenly."""
    dims = ADAPTIVE.index(type(module)) + 1
    shape = shape_of(node.all_input_nodes[0]) if node.all_input_nodes else None
    if shape is None or len(shape) != dims + 2:
        return None
    wanted = [size if given is None else given for given, size in zip(_sizes(module, dims), shape[2:], strict=True)]
    if any(size % want for want, size in zip(wanted, shape[2:], strict=True)):
        return None
    window = tuple(size // want for want, size in zip(wanted, shape[2:], strict=True))
    return None if prod(wanted) == 1 and prod(window) > 1 else window


def _sizes(module: Any, dims: int) -> tuple[int | None, ...]:
    given = module.output_size
    return tuple(given) if isinstance(given, tuple | list) else (given,) * dims


def _tuple(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)
