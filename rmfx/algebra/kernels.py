"""The arithmetic of convolution weights: pure functions on tensors, no modules and no graphs.

A weight has shape ``[out, in/groups, *kernel]`` with 0 to 3 kernel axes (``nn.Linear`` has none).
Callers pass float64; every function keeps the dtype it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_scale_shift(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Batch norm in eval mode as ``x * scale + shift``, both ``[C]``.

    ``scale = weight / sqrt(var + eps)``, ``shift = bias - mean * scale``.
    """
    scale = torch.rsqrt(var + eps) if weight is None else weight / torch.sqrt(var + eps)
    shift = -mean * scale if bias is None else bias - mean * scale
    return scale, shift


def scale_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype, piece: int = 1 << 13) -> Tensor:
    """``scale_o * weight_o`` in float64, rounded to ``dtype``, about ``piece`` weights at a time.

    Pieces of 64 KiB come back from the heap again and again; larger ones leave holes in it.

    >>> scale_rows(torch.ones(2, 1), torch.tensor([2.0, 3.0]), torch.float32).tolist()
    [[2.0], [3.0]]
    """
    scaled = torch.empty(weight.shape, dtype=dtype)
    rows = max(1, piece // max(1, weight[0].numel()))
    factors = scale.reshape(-1, *[1] * (weight.dim() - 1))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        scaled[part] = weight[part].double() * factors[part]
    return scaled


def regroup(weight: Tensor, groups: int, to: int) -> Tensor:
    """The same linear map with fewer groups: ``[O, I/groups, *k] -> [O, I/to, *k]``; ``to`` divides ``groups``.

    >>> regroup(torch.ones(2, 1), groups=2, to=1).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if groups == to:
        return weight
    merged, kernel = groups // to, weight.shape[2:]
    out, width = weight.shape[0] // groups, weight.shape[1]
    blocks = weight.reshape(to, merged, out, width, *kernel)
    wide = weight.new_zeros(to, merged, out, merged, width, *kernel)
    index = torch.arange(merged)
    wide[:, index, :, index] = blocks.transpose(0, 1)
    return wide.reshape(to * merged * out, merged * width, *kernel)


def spread(weight: Tensor, kernel: Sequence[int], index: tuple[slice, ...]) -> Tensor:
    """Place the taps of ``weight`` at ``index`` of a kernel of size ``kernel`` that is zero elsewhere."""
    if tuple(weight.shape[2:]) == tuple(kernel):
        return weight
    wide = weight.new_zeros(*weight.shape[:2], *kernel)
    wide[(slice(None), slice(None), *index)] = weight
    return wide


def compose_weights(outer: Tensor, inner: Tensor, groups: int) -> Tensor:
    """The kernel of ``outer(inner(x))`` where both have ``groups`` groups: a full convolution of kernels.

    ``W[o, i, t] = sum over m and t' of outer[o, m, t'] * inner[m, i, t - t']``; with kernels of one tap this is
    the matrix product of the paper's equation 4. The taps of both must lie on one common grid.
    """
    dims = outer.dim() - 2
    mid, width = outer.shape[1], inner.shape[1]
    outer_g = outer.reshape(groups, -1, mid, *outer.shape[2:])
    inner_g = inner.reshape(groups, mid, width, *inner.shape[2:])
    if all(k == 1 for k in outer.shape[2:]) or all(k == 1 for k in inner.shape[2:]):
        out = torch.einsum(
            "gomt,gmis->goits", outer_g.reshape(*outer_g.shape[:3], -1), inner_g.reshape(groups, mid, width, -1)
        )
        kernel = [a + b - 1 for a, b in zip(outer.shape[2:], inner.shape[2:], strict=True)]
        return out.reshape(outer.shape[0], width, *kernel)
    # conv correlates, so the outer kernel is flipped; inner channels are the batch.
    flipped = outer_g.flip(tuple(range(3, 3 + dims)))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    padding = [k - 1 for k in outer.shape[2:]]
    full = [convolve(inner_g[g].transpose(0, 1), flipped[g], padding=padding).transpose(0, 1) for g in range(groups)]
    return torch.cat(full).reshape(outer.shape[0], width, *full[0].shape[2:])


def compose_bias(outer: Tensor, inner_bias: Tensor, groups: int) -> Tensor:
    """What a constant ``inner_bias`` (``[mid]``) becomes behind ``outer`` where no tap reads padding: ``[O]``."""
    summed = outer.flatten(2).sum(2) if outer.dim() > 2 else outer
    grouped = summed.reshape(groups, -1, summed.shape[1])
    return torch.einsum("gom,gm->go", grouped, inner_bias.reshape(groups, -1)).reshape(-1)


def place_block(target: Tensor, block: Tensor, rows: Tensor, columns: Tensor, index: tuple[slice, ...]) -> None:
    """Write a small kernel into a larger grouped one, in place.

    Args:
        target: ``[O, I/G, *K]``, written.
        block: ``[o, i/g, *k]``.
        rows: ``[o]``, the output channel of ``target`` for each row of ``block``.
        columns: ``[o, i/g]``, the column of ``target`` (within its group) for each weight of ``block``; one row
            ``[1, i/g]`` where all are alike.
        index: the taps of ``target`` that ``block`` takes.
    """
    if _is_run(rows) and bool((columns == columns[:1]).all()) and _is_run(columns[0]):
        first, left = int(rows[0]), int(columns[0, 0])
        target[(slice(first, first + len(rows)), slice(left, left + columns.shape[1]), *index)] = block
        return
    scattered: tuple[Tensor | slice, ...] = (rows[:, None], columns, *index)
    target[scattered] = block.to(target.dtype)


def _is_run(index: Tensor) -> bool:
    return bool((index == torch.arange(int(index[0]), int(index[0]) + len(index))).all())
