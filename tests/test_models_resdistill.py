"""ResDistill's student: a ResNet at strength 1, a plain network at strength 0, both exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from counting_nets import TABLES_WITHIN, assert_converts, conv, linear, on_meta, parameters, planned
from safetensors.torch import save_file

from rmfx import models
from rmfx.errors import UnsupportedModelError
from rmfx.models import fading_resnet, resdistill34_cifar, resdistill50, resnet
from rmfx.models.resdistill import FadingResNet
from rmfx.weights import load_weights

WIDTHS = (64, 128, 256, 512)
DEPTHS, SMALL = (1, 2, 1, 1), (4, 8, 16, 32)


def plain_parameters(depths: Sequence[int], widths: Sequence[int], bottleneck: bool, stem: int, classes: int) -> int:
    """Of the faded student: its branches' convs with biases, and no projection."""
    c = widths[0]
    total = conv(3, c, stem)
    for width, depth in zip(widths, depths, strict=True):
        for _ in range(depth):
            if bottleneck:
                total += conv(c, width) + conv(width, width, 3) + conv(width, 4 * width)
                c = 4 * width
            else:
                total += conv(c, width, 3) + conv(width, width, 3)
                c = width
    return total + linear(c, classes)


def faded(net: FadingResNet, strength: float = 0.0) -> FadingResNet:
    net.fade(strength)
    return net


def small(bottleneck: bool = False, stem: Any = "cifar") -> FadingResNet:
    return fading_resnet(DEPTHS, widths=SMALL, bottleneck=bottleneck, stem=stem, num_classes=10)


def test_an_unfaded_student_is_the_resnet() -> None:
    torch.manual_seed(0)
    student = small().eval()
    torch.manual_seed(0)
    net = resnet(DEPTHS, widths=SMALL, stem="cifar", num_classes=10).eval()
    x = torch.randn(2, 3, 17, 17)
    with torch.no_grad():
        assert torch.equal(student(x), net(x))


def test_resdistill_34_of_table_1() -> None:
    report = planned(lambda: faded(resdistill34_cifar()), 32)
    assert report.count("removed") == 0
    assert report.totals.params_after == plain_parameters((3, 4, 6, 3), WIDTHS, False, 3, 10)
    assert report.totals.params_after / 1e6 == pytest.approx(21.1, rel=TABLES_WITHIN)
    assert report.totals.macs_after is not None
    assert report.totals.macs_after / 1e9 == pytest.approx(1.16, rel=TABLES_WITHIN)


def test_resdistill_50_of_table_1() -> None:
    assert parameters(on_meta(resdistill50)) == pytest.approx(25.6, rel=TABLES_WITHIN)
    after = planned(lambda: faded(resdistill50()), 224).totals.params_after
    assert after == plain_parameters((3, 4, 6, 3), WIDTHS, True, 7, 1000)


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize(("stem", "kernel", "size"), [("cifar", 3, 16), ("imagenet", 7, 64)])
def test_faded_students_convert_exactly_to_their_branches(bottleneck: bool, stem: Any, kernel: int, size: int) -> None:
    net = faded(small(bottleneck, stem))
    assert_converts(net, plain_parameters(DEPTHS, SMALL, bottleneck, kernel, 10), size=size)


def carrying_parameters() -> int:
    """Of the small student's plain form while it still has shortcuts, which are then carried as in ResNet."""
    c, total = 4, conv(3, 4, 3)
    for width, depth in zip(SMALL, DEPTHS, strict=True):
        for _ in range(depth):
            total += conv(c, c + width, 3) + conv(c + width, width, 3)
            c = width
    return total + linear(c, 10)


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_students_convert_exactly_at_any_strength(strength: float) -> None:
    assert_converts(faded(small(), strength), carrying_parameters(), sums=5)


def test_fading_changes_the_function() -> None:
    net, x = small().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        outputs = [faded(net, strength)(x) for strength in (1.0, 0.5, 0.0)]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


def test_nothing_of_a_shortcut_is_computed_at_strength_0() -> None:
    net = faded(small())
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    with_gradient = {name for name, p in net.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in net.named_parameters() if ".shortcut." not in name}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_restores_the_strength(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"student{suffix}"
    state = faded(small(), 0.3).state_dict()
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    fresh = small()
    assert fresh.strength == 1.0
    load_weights(fresh, path, "student")
    assert fresh.strength == 0.3


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_impossible_strengths_are_refused(strength: float) -> None:
    with pytest.raises(UnsupportedModelError, match="fade: strength must be from 0 to 1, got"):
        small().fade(strength)


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="fading_resnet: depths must be 4 positive block counts"):
        fading_resnet((1, 1, 1))
    with pytest.raises(UnsupportedModelError, match="fading_resnet: stem must be 'imagenet' or 'cifar'"):
        models.resdistill34(stem="mnist")  # type: ignore[arg-type]
