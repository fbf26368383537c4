"""Least squares after pruning: what others say is found again, what is right is left alone, unseen images gain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import CONVS
from oracle import assert_equivalent, relative_difference
from test_pruning import FORMS, NARROW, dead_net, in_form
from torch import Tensor, fx, nn

import rmfx
from rmfx import models
from rmfx.errors import RmfxError
from rmfx.hostile import randomise
from rmfx.pruning.coupling import Coupling
from rmfx.pruning.prune import prune
from rmfx.pruning.reconstruct import reconstruct

Batches = list[tuple[Tensor, None]]


def with_twins(dims: int, bias: bool, **options: object) -> nn.Module:
    """The last half of the first layer's channels says what the first half says."""
    conv = CONVS[dims] if dims else nn.Linear
    window = {"kernel_size": 3, **options} if dims else {}
    first, last = conv(4, 8, bias=bias, **window), conv(8, 6, bias=bias, **window)  # type: ignore[operator]
    with torch.no_grad():
        for value in first.parameters():
            value[4:] = value[:4]
    return nn.Sequential(first, nn.ReLU(), last).double().eval()


def the_twins(gm: fx.GraphModule, coupling: Coupling) -> Tensor:
    score = torch.ones(coupling.count)
    first = next(node for node in gm.graph.nodes if node.op == "call_module")
    score[coupling.channels[first].sets[4:]] = 0
    return score


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dims", "options"),
    [
        (0, {}),
        (1, {"stride": 2, "dilation": 2}),
        (2, {"padding": 1}),
        (2, {"padding": "same", "padding_mode": "reflect"}),
        (2, {"stride": 2, "padding": (0, 2)}),
        (3, {"padding": 1}),
    ],
)
def test_channels_that_say_the_same_are_made_up_for(dims: int, options: dict[str, object], bias: bool) -> None:
    torch.manual_seed(0)
    model = with_twins(dims, bias, **options)
    sizes = (17, 11, 7)[:dims]
    data = [(8 * torch.randn(16, 4, *sizes, dtype=torch.float64), None) for _ in range(4)]
    fresh = 8 * torch.randn(2, 4, *sizes, dtype=torch.float64)
    without, with_it = (
        prune(model, fresh, threshold=0.5, importance=the_twins, calibration=calibration)
        for calibration in (None, data)
    )
    assert [(width.before, width.after - width.constants) for width in with_it.widths] == [(8, 4)]
    assert without.error > 0.01 and with_it.error < 1e-6
    unseen = 3 * torch.randn_like(fresh)
    assert relative_difference(model(unseen), with_it.network(unseen)) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_where_nothing_is_missing_nothing_changes(form: str) -> None:
    model, x, _ = dead_net()
    network = in_form(form, model, x)
    data = [(x + torch.randn_like(x), None) for _ in range(2)]
    options = {"threshold": 1e-9, "importance": "l2" if form == "plain" else "bn"}
    pruned = prune(network, x, **options, calibration=data)  # type: ignore[arg-type]
    assert pruned.error < 1e-10
    assert_equivalent(model, pruned.network, x)


@pytest.mark.slow
@pytest.mark.parametrize("build", [models.resnet20, NARROW], ids=["resnet20", "grouped"])
@pytest.mark.parametrize("form", FORMS)
def test_unseen_images_gain(build: Callable[..., nn.Module], form: str) -> None:
    torch.manual_seed(0)
    images = [torch.randn(8, 3, 32, 32) for _ in range(3)]
    model = randomise(build(num_classes=10).eval(), images[0], 0)
    network = in_form(form, model, images[0])
    data: Batches = [(batch, None) for batch in images]
    fresh = torch.randn(32, 3, 32, 32)
    errors = []
    for calibration in (None, data):
        pruned = prune(network, images[0], amount=0.1, importance="l2", calibration=calibration)
        with torch.no_grad():
            errors.append(float((pruned.network(fresh) - network(fresh)).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_channels_that_stand_for_constants_stay_constant() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 17, 15, dtype=torch.float64)
    plain = rmfx.convert(randomise(models.resnet20().double().eval(), x, 0), x)  # no channel of it is constant
    data = [(torch.randn_like(x), None) for _ in range(2)]
    pruned = prune(plain, x, amount=0.4, importance="l2", calibration=data)
    homes = sum(width.constants for width in pruned.widths)
    silent = sum(
        int((layer.weight.flatten(1) == 0).all(1).sum())
        for layer in pruned.network.modules()
        if isinstance(layer, nn.Conv2d)
    )
    assert homes > 0 and silent >= homes


@pytest.mark.parametrize("size", [1, 3])
def test_how_images_lie_in_batches_does_not_matter(size: int) -> None:
    torch.manual_seed(0)
    model = with_twins(2, bias=True)
    images, fresh = (8 * torch.randn(count, 4, 9, 9, dtype=torch.float64) for count in (32, 2))
    data: Batches = [(batch, None) for batch in images.split(size)]
    pruned = prune(model, fresh, threshold=0.5, importance=the_twins, calibration=data)
    assert pruned.error < 1e-6


def test_one_image_alone_changes_nothing() -> None:
    whole = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 2, 1)))
    narrow = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 2, 1)))
    assert reconstruct(narrow, whole, {"0": torch.arange(2)}, [(torch.randn(1, 3, 8, 8), None)]) == 0
    assert reconstruct(narrow, whole, {"0": torch.arange(2)}, [(torch.randn(2, 3, 8, 8), None)]) == 1


def test_no_data_is_an_error() -> None:
    net = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(RmfxError, match="reconstruction needs batches"):
        reconstruct(net, net, {"0": torch.arange(2)}, [])
