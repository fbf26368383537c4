"""``digits32``: handwritten digits made hard enough that depth and width matter.

Each image shows one digit of scikit-learn's 8x8 originals, enlarged, turned, sheared, stretched and moved at random, in
a random colour and contrast, light on dark or dark on light, on a background of smooth clouds, strokes cut out of other
digits, and noise. Training and test images are made from different originals, and everything is drawn from one seed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rmfx.learn.data import Data
from rmfx.learn.digits import originals
from rmfx.learn.images import ImageSplit

SIZE = 32
TRAIN_IMAGES, TEST_IMAGES = 40_000, 8_000
_FRAGMENTS = 3  # pieces of other digits on the background
_CHUNK = 4_000  # images drawn at a time, to bound memory


def digits32(seed: int = 0, train_images: int = TRAIN_IMAGES, test_images: int = TEST_IMAGES) -> Data:
    """Draw the dataset.

    Args:
        seed: of everything, also of which originals are for testing.
        train_images, test_images: how many to draw.

    Raises:
        RuntimeUnavailableError: when scikit-learn is not installed.

    >>> data = digits32(train_images=20, test_images=10)
    >>> len(data.train), len(data.test), data.shape
    (20, 10, (3, 32, 32))
    """
    random = torch.Generator().manual_seed(seed)
    splits = []
    for (sources, labels), count in zip(originals(seed), (train_images, test_images), strict=True):
        strokes = sources.add(1).div(2)  # 0 is paper, 1 is ink
        chosen = torch.arange(count) % len(labels)  # every original equally often
        images = torch.cat([_draw(strokes, part, random) for part in chosen.split(_CHUNK)])
        splits.append(ImageSplit(images, labels[chosen], (127.5,) * 3, (64.0,) * 3))
    return Data("digits32", splits[0], splits[1], (3, SIZE, SIZE), 10)


def _draw(strokes: Tensor, chosen: Tensor, random: torch.Generator) -> Tensor:
    """One image ``[3, 32, 32]`` in uint8 of each chosen original."""
    count = len(chosen)
    digit = _place(strokes[chosen], random, zoom=(0.45, 0.85), turn=25.0, stretch=0.25, shear=0.3, margin=0.9)
    image = 128 + 40 * _clouds(count, random)
    for _ in range(_FRAGMENTS):
        other = torch.randint(len(strokes), (count,), generator=random)
        piece = _place(
            _cut(strokes[other], random), random, zoom=(0.35, 0.8), turn=180.0, stretch=0.3, shear=0.4, margin=1.6
        )
        image = image + _colour(count, random, 20.0, 80.0) * piece
    image = image * (1 - 0.7 * digit) + 0.7 * 128 * digit + _colour(count, random, 50.0, 120.0) * digit
    image = image + 12 * torch.randn(image.shape, generator=random)
    return image.round().clamp(0, 255).to(torch.uint8)


def _place(
    strokes: Tensor,
    random: torch.Generator,
    *,
    zoom: tuple[float, float],
    turn: float,
    stretch: float,
    shear: float,
    margin: float,
) -> Tensor:
    """Enlarge ``[n, 1, 8, 8]`` strokes to ``[n, 1, 32, 32]`` by one random affine map each.

    Args:
        zoom: smallest and largest part of the height that the 8 pixels take.
        turn: largest angle in degrees.
        stretch, shear: largest change of the aspect, largest horizontal shear.
        margin: how far out the digit may be moved; at 1 its square stays within the image.
    """
    count = len(strokes)
    scale = _uniform(count, random, *zoom)
    angle = _uniform(count, random, -turn, turn) * math.pi / 180
    aspect = _uniform(count, random, -stretch, stretch).exp()
    slant = _uniform(count, random, -shear, shear)
    across, down = scale * aspect.sqrt(), scale / aspect.sqrt()
    room = margin * (1 - scale).clamp(min=0)
    right, below = _uniform(count, random, -1, 1) * room, _uniform(count, random, -1, 1) * room
    cos, sin = angle.cos(), angle.sin()
    # From the image's coordinates back to those of the strokes: shear @ turn / scale, about the digit's centre.
    forward = torch.stack(
        [torch.stack([cos - slant * sin, sin + slant * cos], 1), torch.stack([-sin, cos], 1)], 1
    ) / torch.stack([across, down], 1).unsqueeze(2)
    offset = -(forward @ torch.stack([right, below], 1).unsqueeze(2))
    grid = F.affine_grid(torch.cat([forward, offset], 2), [count, 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(strokes, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def _cut(strokes: Tensor, random: torch.Generator) -> Tensor:
    """Keep one side of a random straight line through each digit: strokes, but no digit."""
    count = len(strokes)
    angle = _uniform(count, random, 0, 2 * math.pi)
    axis = torch.linspace(-1, 1, strokes.shape[-1])
    side = angle.cos().view(-1, 1, 1) * axis + angle.sin().view(-1, 1, 1) * axis.unsqueeze(1)
    return strokes * (side > _uniform(count, random, -0.2, 0.3).view(-1, 1, 1)).unsqueeze(1)


def _clouds(count: int, random: torch.Generator) -> Tensor:
    """Smooth random shades ``[n, 3, 32, 32]``: one grey cloud, and a weaker one per colour."""
    grey = torch.randn(count, 1, 5, 5, generator=random)
    coloured = torch.randn(count, 3, 4, 4, generator=random)
    smooth = [F.interpolate(x, (SIZE, SIZE), mode="bicubic", align_corners=False) for x in (grey, coloured)]
    return 0.7 * smooth[0] + 0.4 * smooth[1]


def _colour(count: int, random: torch.Generator, least: float, most: float) -> Tensor:
    """A random colour ``[n, 3, 1, 1]``: lighter or darker than the background by ``least`` to ``most`` shades."""
    strength = _uniform(count, random, least, most) * (torch.randint(0, 2, (count,), generator=random) * 2 - 1)
    tint = 1 + 0.35 * torch.randn(count, 3, generator=random)
    return (strength.unsqueeze(1) * tint).view(count, 3, 1, 1)


def _uniform(count: int, random: torch.Generator, least: float, most: float) -> Tensor:
    return least + (most - least) * torch.rand(count, generator=random)
