"""Ranges measured on data: what they hold, and that they can be given back."""

from __future__ import annotations

import copy

import pytest
import torch
from front import hostile, normal_form
from nets import cbr, conv
from test_bounds import last
from test_facts import Recorder
from torch import Tensor, nn

from rmfx.errors import RmfxError
from rmfx.graph.bounds import bounds_of, give_ranges, value_name
from rmfx.graph.facts import annotate
from rmfx.ranges import bounds_from_data


def model() -> nn.Module:
    return nn.Sequential(*cbr(4, 6), conv(6, 5), nn.GELU(), conv(5, 3, 1)).eval()


def test_measured_ranges_hold_the_data_with_a_margin() -> None:
    net, batches = model(), [hostile(2, 4, 6, 6, seed=seed) for seed in range(3)]
    exact, wide = (bounds_from_data(net, batches, margin=margin) for margin in (0.0, 0.5))
    gm = normal_form(copy.deepcopy(net).double())
    values: dict[str, list[Tensor]] = {}
    for x in batches:
        recorder = Recorder(gm)
        with torch.no_grad():
            recorder.run(x)
        for node, value in recorder.values.items():
            values.setdefault(value_name(node), []).append(value.flatten())
    assert set(values) == set(exact) == set(wide) and "input" in exact
    for name, seen in values.items():
        low, high = (float(end) for end in torch.cat(seen).aminmax())
        assert exact[name] == (low, high)
        assert wide[name] == pytest.approx((low - (high - low) / 2, high + (high - low) / 2))


def test_measured_ranges_are_bounds() -> None:
    net, batches = model(), [hostile(2, 4, 6, 6)]
    gm = normal_form(copy.deepcopy(net).double())
    give_ranges(gm, bounds_from_data(net, batches))
    annotate(gm, None)
    low, high = bounds_of(last(gm), 2).range
    y = gm(batches[0])
    assert low <= y.min() and y.max() <= high and high < 10 * float(y.abs().max())


def test_the_model_is_left_as_it_was() -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    bounds_from_data(net, [hostile(2, 4, 6, 6).float()])
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("pack", [tuple, list])
def test_several_inputs(pack: type) -> None:
    class Difference(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return x.relu() * index

    batch = pack((torch.tensor([[-1.0, 2.0]]), torch.tensor([[3, 4]])))
    measured = bounds_from_data(Difference().eval(), [batch], margin=0.0)
    assert measured["x"] == (-1.0, 2.0) and measured["mul"] == (0.0, 8.0) and "index" not in measured


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(RmfxError, match="bounds_from_data needs at least one batch"):
        bounds_from_data(model(), [])
    with pytest.raises(RmfxError, match="margin must not be negative"):
        bounds_from_data(model(), [hostile(2, 4, 6, 6)], margin=-0.1)
    with pytest.raises(RmfxError, match="input is not finite on these data"):
        bounds_from_data(model(), [torch.full((2, 4, 6, 6), torch.inf)])
