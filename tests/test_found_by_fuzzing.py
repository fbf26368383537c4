"""The smallest forms of networks that ``benchmarks/fuzz.py`` once found converted wrongly, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from front import Lambda, hostile
from oracle import relative_difference
from torch import Tensor, nn

import rmfx
from rmfx.hostile import randomise
from rmfx.report import Report


def converted(
    function: Callable[..., Tensor], shape: tuple[int, ...], inputs: bool, options: Any, **layers: Any
) -> Report:
    """The report, after a comparison."""
    x = hostile(*shape)
    model = randomise(Lambda(function, **layers).double(), x / 8)
    plain = rmfx.convert(model, x if inputs else None, **options)
    with torch.no_grad():
        assert relative_difference(model(x), plain(x)) < 1e-12
    return rmfx.report(plain)


def test_a_gate_over_positions_and_features() -> None:
    """The channels of a gate among linear layers are the last axis: dimension 1 counts positions."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        v = self.up(self.down(x).relu())
        return x + v * torch.sigmoid(self.mask(v))

    layers = {"stem": nn.Linear(3, 8), "down": nn.Linear(8, 2), "up": nn.Linear(2, 8), "mask": nn.Linear(8, 8)}
    converted(forward, (2, 4, 3), True, {}, **layers)


def test_slices_of_a_fork_of_unknown_width() -> None:
    """The conv behind a slice tells the slice's channels, not those of what is sliced."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat((x, self.one(x), x), 1)
        return self.second(self.first(x.narrow(1, 0, 9)).relu()) + x.narrow(1, 0, 9)

    layers = {"stem": nn.Conv2d(3, 6, 1), "one": nn.Conv2d(6, 2, 1), "first": nn.Conv2d(9, 2, 1)}
    converted(forward, (2, 3, 6, 7), False, {}, **layers, second=nn.Conv2d(2, 9, 1))


@pytest.mark.parametrize("swap", [False, True])
def test_slices_of_a_sum_that_broadcasts(swap: bool) -> None:
    """One channel of one operand does not tell how many the sum has."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        fork = x + self.one(x) if swap else self.one(x) + x
        half = fork[:, :2]
        return torch.cat((half + self.second(self.first(half).relu()), fork[:, 2:]), 1)

    layers = {"stem": nn.Conv2d(3, 4, 1), "one": nn.Conv2d(4, 1, 1)}
    layers |= {"first": nn.Conv2d(2, 2, 1), "second": nn.Conv2d(2, 2, 1)}
    report = converted(forward, (2, 3, 6, 7), False, {}, **layers)
    assert [entry.status for entry in report.entries] == ["refused", "removed"]


def test_dead_channels_beside_a_factor_of_no_dimension() -> None:
    """A number computed from the data has no channels."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x * x.amax().tanh()
        return self.second(self.first(x)) + x

    layers = {"stem": nn.Conv2d(3, 4, 1), "first": nn.Conv2d(4, 2, 3), "second": nn.Conv2d(2, 4, 3, padding=2)}
    converted(forward, (2, 3, 6, 7), True, {"drop_dead_channels": True}, **layers)
