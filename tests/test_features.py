"""Batch norms of features, written as norms of all positions put after one another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from front import Lambda, bn, hostile, layer, operations
from torch import Tensor, nn

from rmfx.files.layer_json import decode_layer, encode_layer
from rmfx.front.normal import check_normal
from rmfx.front.trace import trace
from rmfx.graph.facts import annotate, channels_of
from rmfx.graph.linear import affine_of, dims_of, is_linear
from rmfx.modules import FeatureNorm
from rmfx.passes.normalise import normalise

Shape = tuple[int, ...]


def found(function: Callable[[Lambda, Tensor], Tensor], shape: Shape = (2, 5, 4)) -> list[str]:
    """The operations behind a linear layer; the normal form is seen to give what the model gives."""
    model = Lambda(function, fc=nn.Linear(4, 4), norm=bn(4, nn.BatchNorm1d)).double().eval()
    gm = normalise(trace(model), inputs=(hostile(*shape),))
    check_normal(gm)
    for batch in (2, 3):
        x = hostile(batch, *shape[1:])
        assert torch.equal(gm(x), model(x))
    return operations(gm)[1:]


def test_a_norm_of_features() -> None:
    def levit(m: Lambda, x: Tensor) -> Tensor:
        x = m.fc(x)
        return m.norm(x.flatten(0, 1)).reshape_as(x)

    assert found(levit) == ["FeatureNorm"]
    assert found(lambda m, x: (lambda y: m.norm(y.flatten(0, -2)).view_as(y))(m.fc(x))) == ["FeatureNorm"]
    deeper = found(lambda m, x: (lambda y: m.norm(y.flatten(0, 2)).reshape(y.shape))(m.fc(x)), (2, 3, 5, 4))
    assert deeper == ["FeatureNorm"]
    assert found(lambda m, x: (lambda y: m.norm(y.flatten(0, 1)).view(y.size()))(m.fc(x))) == ["FeatureNorm"]


def test_what_is_none() -> None:
    square = (2, 4, 4)
    assert "FeatureNorm" not in found(
        lambda m, x: (lambda y: m.norm(y.flatten(1, 2)[:, :4]).sum() + y)(m.fc(x)), square
    )
    assert "FeatureNorm" not in found(lambda m, x: m.norm(m.fc(x).flatten(0, 1)).reshape_as(x.transpose(1, 0)))
    assert "FeatureNorm" not in found(lambda m, x: m.norm(m.fc(x)).reshape_as(x), square)
    assert "FeatureNorm" not in found(lambda m, x: m.norm(m.fc(x).flatten(0, 1)))
    assert "FeatureNorm" not in found(lambda m, x: m.norm(m.fc(x).flatten(0, 1)).reshape(-1, 1, 4))


@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 4), (2, 3, 5, 4)])
def test_it_is_a_map_of_features(shape: Shape) -> None:
    module, x = FeatureNorm(bn(4, nn.BatchNorm1d)).double().eval(), hostile(*shape)
    gm = normalise(trace(nn.Sequential(nn.Linear(4, 4), module).double().eval()))
    annotate(gm, (x,))
    node = [node for node in gm.graph.nodes if node.op == "call_module"][-1]
    assert is_linear(node) and dims_of(node) == 0 and channels_of(node, 0) == 4
    affine = affine_of(node, 0)
    weight, bias = affine.weights()
    want = module(x)
    assert (x * weight.flatten() + bias - want).abs().max() <= 1e-13 * want.abs().max()
    assert affine.diagonal and affine.sources == {
        f"1.norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    }


def test_batch_statistics_stay() -> None:
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    model = Lambda(lambda m, x: m.norm(x.flatten(0, 1)).reshape_as(x), norm=norm).double().eval()
    assert "FeatureNorm" not in operations(normalise(trace(model), inputs=(hostile(2, 5, 4),)))


def test_it_is_saved() -> None:
    rebuilt = decode_layer(encode_layer(FeatureNorm(nn.BatchNorm1d(4, eps=0.5, affine=False))))
    assert isinstance(rebuilt, FeatureNorm) and rebuilt.norm.eps == 0.5 and rebuilt.norm.weight is None
    assert layer(nn.ModuleList([rebuilt]), nn.BatchNorm1d).num_features == rebuilt.num_features == 4
