"""Instance norms by running statistics become batch norms; those by the statistics of each input stay."""

from __future__ import annotations

import pytest
import torch
from front import Lambda, assert_exact, bn, hostile, operations
from oracle import assert_equivalent
from torch import Tensor, nn

import rmfx
from rmfx.front.trace import trace
from rmfx.passes.normalise import normalise

NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def tracking(cls: type[nn.Module], affine: bool = True) -> nn.Module:
    """An instance norm with statistics and weights far from the identity."""
    norm = cls(4, affine=affine, track_running_stats=True)
    norm.load_state_dict(bn(4).state_dict(), strict=affine)
    return norm


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_connections_around_them_are_removed(dims: int, affine: bool) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        return torch.relu(x + m.second(m.b(m.first(m.a(x)).relu())))

    convs = {name: CONVS[dims - 1](4, 4, 3, padding=1) for name in "ab"}
    norms = {name: tracking(NORMS[dims - 1], affine) for name in ("first", "second")}
    model = Lambda(forward, **convs, **norms).double().eval()
    x = hostile(2, 4, *(5, 6, 7)[:dims])
    result = rmfx.convert(model, x)
    assert rmfx.report(result).count("removed") == 1
    assert_equivalent(model, result, x)
    assert type(model.first) is NORMS[dims - 1], "the user's own layer stays what it is"


def test_without_example_inputs_sequences_may_have_no_batch() -> None:
    assert operations(assert_exact(nn.Sequential(tracking(nn.InstanceNorm2d)), hostile(2, 4, 5, 6))) == ["BatchNorm2d"]
    model = nn.Sequential(tracking(nn.InstanceNorm1d))
    assert operations(assert_exact(model, hostile(4, 4))) == ["InstanceNorm1d"]


def test_a_single_image_has_no_batch() -> None:
    model = nn.Sequential(tracking(nn.InstanceNorm2d)).double().eval()
    gm = normalise(trace(model), inputs=(hostile(4, 5, 6),))
    assert operations(gm) == ["InstanceNorm2d"] and torch.equal(gm(hostile(4, 5, 6)), model(hostile(4, 5, 6)))


def test_statistics_of_each_input_and_networks_that_will_train_keep_theirs() -> None:
    assert operations(assert_exact(nn.Sequential(nn.InstanceNorm2d(4)), hostile(2, 4, 5, 6))) == ["InstanceNorm2d"]
    gm = normalise(trace(nn.Sequential(tracking(nn.InstanceNorm2d)).eval()), keep_dropout=True)
    assert operations(gm) == ["InstanceNorm2d"]
