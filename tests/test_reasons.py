"""Every operation that cannot stand on a branch says why, in words of the user's."""

from __future__ import annotations

import pytest
import torch
from front import Lambda, conv, image
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rmfx.front.trace import trace
from rmfx.graph.facts import annotate
from rmfx.graph.reasons import why_not
from rmfx.passes.normalise import normalise

REASONS = {
    "LayerNorm on the branch, normalises by the mean and variance over all features of a position": (
        lambda y: F.layer_norm(y, (5,))
    ),
    "GroupNorm on the branch, normalises by the mean and variance over channels and positions": (
        lambda y: F.group_norm(y, 2)
    ),
    "a matmul on the branch, is attention or another product of matrices computed from the input": (
        lambda y: y @ y.transpose(2, 3)
    ),
    "a softmax on the branch, divides by a sum over channels or positions": lambda y: y.softmax(1),
    "a permute on the branch, brings values into another order": lambda y: y.permute(0, 2, 3, 1),
    "ConstantPad2d on the branch, pads with a value that is not zero": lambda y: F.pad(y, (1, 1, 1, 1), value=0.5),
    "MaxPool2d on the branch, takes a maximum over positions": lambda y: F.max_pool2d(y, 2),
    "Upsample on the branch, repeats or interpolates positions": lambda y: F.interpolate(y, scale_factor=2),
    "AdaptiveAvgPool2d on the branch, averages windows whose size depends on that": (
        lambda y: F.adaptive_avg_pool2d(y, 1)
    ),
    "is a product that broadcasts one operand of shape (2, 4, 1, 5)": lambda y: y * y.mean(2, True),
    "is a sum that broadcasts one operand of shape (2, 4, 1, 5)": lambda y: y + y.mean(2, True),
    "multiplies two tensors computed from the input, which is not linear in either": lambda y: y * y.tanh(),
    "is a sum that stays": lambda y: y + y.tanh(),
    "a cumsum on the branch, is an operation that rmfx does not know": lambda y: y.cumsum(2),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason: str) -> None:
    model = Lambda(lambda m, x: REASONS[reason](m.conv(x)), conv=conv())
    gm = normalise(trace(model.double().eval()), inputs=(image(),))
    annotate(gm, (image(),))
    (last,) = list(gm.graph.nodes)[-1].all_input_nodes
    said = why_not(last)
    assert reason in said and said.startswith(repr(last.name)) and "\n" not in said


def test_constants_and_unknown_layers() -> None:
    gm = normalise(trace(Lambda(lambda m, x: x + m.table, table=torch.rand(2, 4, 7, 5)).double().eval()))
    annotate(gm, (image(),))
    assert why_not(list(gm.graph.nodes)[-2]).endswith("is a sum with a constant that differs from position to position")
    gm = normalise(trace(nn.Sequential(nn.Softmin(1)).eval()))
    assert why_not(list(gm.graph.nodes)[1]).endswith(
        "a Softmin on the branch, is neither linear nor an activation that acts on every element by itself"
    )


def test_what_is_no_operation() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        return m.conv(x) * m.scale + x.size(0)

    gm = normalise(trace(Lambda(forward, conv=conv(), scale=torch.rand(7, 5)).eval()))
    said = {node.op + str(node.meta.get("plain_value", "")): why_not(node) for node in gm.graph.nodes}
    assert said["placeholder"] == "'x' is an input of the network"
    assert said["get_attr"] == "'scale' on the branch is a constant with a value of its own for every position"
    assert said["call_methodTrue"] == "'size' on the branch is a number read off a tensor"


def test_a_norm_by_batch_statistics_names_its_place() -> None:
    gm = normalise(trace(nn.Sequential(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))).eval()))
    node = [node for node in gm.graph.nodes if node.op == "call_module"][0]
    assert why_not(node).endswith("normalises by the statistics of each batch, which is no fixed linear map")
    assert "(in 0)" in why_not(node)
    assert isinstance(gm, fx.GraphModule)
