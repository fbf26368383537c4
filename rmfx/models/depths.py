"""How many blocks a network of a given number of layers has in each stage (the paper's Table 1 and Figure 5)."""

from __future__ import annotations

from rmfx.errors import UnsupportedModelError

PUBLISHED = {8: (2, 2, 2, 2), 13: (2, 3, 5, 3), 16: (3, 4, 6, 3), 33: (3, 4, 23, 3), 50: (3, 8, 36, 3)}
_SHARES = (3, 4, 6, 3)  # of ResNet-50's 16 blocks


def stage_depths(depth: int, layers_per_block: int = 3) -> tuple[int, int, int, int]:
    """Blocks per stage of a four-stage network called "``depth``".

    ``depth`` is ``3 * blocks + 2``, as the paper counts in Table 1 (26, 41, 50, 101, 152: two conv layers in the
    ImageNet stem), or ``3 * blocks + 1``, the conv layers behind CIFAR's stem of one (133 in Figure 5). The numbers
    of Table 1 are kept; others share the blocks as ResNet-50 does up to its 16, and beyond, as in ResNet-101,
    the third stage has what is more.

    Args:
        depth: number of layers.
        layers_per_block: 3, or 1 for blocks of one layer each, which are then three times as many in each stage.

    Raises:
        UnsupportedModelError: when no such number of blocks exists, or it leaves a stage empty.

    >>> stage_depths(26), stage_depths(41), stage_depths(101), stage_depths(133)
    ((2, 2, 2, 2), (2, 3, 5, 3), (3, 4, 23, 3), (3, 4, 34, 3))
    >>> stage_depths(26, layers_per_block=1)
    (6, 6, 6, 6)
    """
    if layers_per_block not in (1, 3):
        raise UnsupportedModelError(f"stage_depths: layers_per_block must be 1 or 3, got {layers_per_block}")
    blocks, stem = divmod(depth - 1, 3)
    if stem > 1 or blocks < 4:
        raise UnsupportedModelError(
            f"stage_depths: depth must be 3 * blocks + 2 (or + 1) with at least 4 blocks, got {depth}"
        )
    first, second, third, last = PUBLISHED.get(blocks) or _share(blocks)
    times = 3 // layers_per_block
    return first * times, second * times, third * times, last * times


def _share(blocks: int) -> tuple[int, int, int, int]:
    """Largest remainders, ties to the later stage; more than 16 blocks go to the third stage."""
    if blocks > sum(_SHARES):
        first, second, third, last = _SHARES
        return first, second, third + blocks - sum(_SHARES), last
    quotas = [divmod(blocks * share, sum(_SHARES)) for share in _SHARES]
    counts = [whole for whole, _ in quotas]
    by_remainder = sorted(range(4), key=lambda i: (quotas[i][1], i), reverse=True)
    for i in by_remainder[: blocks - sum(counts)]:
        counts[i] += 1
    return counts[0], counts[1], counts[2], counts[3]
