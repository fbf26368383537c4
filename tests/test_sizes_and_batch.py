"""Code that looks at sizes, or at the batch: told from code that does not, and guarded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from front import hostile
from torch import Tensor, nn
from torch.nn import functional as F

import rmfx
from rmfx.front.doors import enter
from rmfx.front.sizes import depends_on_sizes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Sized(nn.Module):
    """``function`` of one tensor."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.bn = function, nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.bn(x))


def _gate(x: Tensor) -> Tensor:
    b, c, _, _ = x.size()
    return x * x.mean((2, 3)).view(b, c, 1, 1)


SIZES: list[tuple[Any, bool]] = [
    (_gate, False),
    (lambda x: F.interpolate(x, scale_factor=2), False),
    (lambda x: F.adaptive_avg_pool2d(x, 2), False),
    (lambda x: x if x.ndim == 4 else x[0], False),
    (lambda x: x[:, : x.shape[1] // 2], False),
    (lambda x: F.interpolate(x, size=x.shape[-2:]), True),
    (lambda x: x if x.shape[-1] == x.shape[-2] else -x, True),
    (lambda x: F.pad(x, (0, x.shape[-1] % 2)), True),
    (lambda x: sum(x[..., i] for i in range(x.shape[-1])), True),
    (lambda x: x * (1 / x[0, 0].numel()), True),
    (lambda x: x.view(-1, x.stride(1)), True),
    (lambda x: F.local_response_norm(x, 2), True),
]


@pytest.mark.parametrize(("function", "depends"), SIZES, ids=range(len(SIZES)))
def test_what_depends_on_sizes(function: Any, depends: bool) -> None:
    assert depends_on_sizes(Sized(function).eval(), (torch.zeros(2, 4, 8, 8),), {}) is depends


class OneApart(nn.Module):
    """Code that goes another way for a batch of 1."""

    def forward(self, x: Tensor) -> Tensor:
        return -x if x.shape[0] == 1 else x * 2


class Pairs(nn.Module):
    """Code that goes another way for even batches."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] % 2 else x * 2


@pytest.mark.parametrize("cls", [OneApart, Pairs])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_code_that_decides_by_the_batch_is_guarded(cls: type[nn.Module], batch: int) -> None:
    model, image = cls().eval(), hostile(batch, 3, 4, 4)
    converted = rmfx.convert(model, image)
    assert torch.equal(converted(image), model(image))
    with pytest.raises(ValueError, match=rf"got \({batch + 1}, 3, 4, 4\)"):
        converted(hostile(batch + 1, 3, 4, 4))


class OneBatch(nn.Module):
    """Code that takes the batch for a number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[i : i + 1] * (i + 1) for i in range(int(x.shape[0]))])


def test_a_batch_that_the_code_fixes_is_guarded() -> None:
    model, image = OneBatch().eval(), hostile(2, 3, 4, 4)
    entered = enter(model, (image,), {})
    assert entered.batch and entered.sizes
    converted = rmfx.convert(model, image)
    assert torch.equal(converted(image), model(image))
    with pytest.raises(ValueError, match=r"got \(3, 3, 4, 4\)"):
        converted(hostile(3, 3, 4, 4))


class Pooled(nn.Module):
    """A concat of two branches behind a pool whose last window may hang over the border."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(self.pool(x)).relu(), self.b(self.pool(x)).relu()], 1)


def test_a_concat_that_was_removed_at_one_size_is_guarded() -> None:
    model, x = Pooled().double().eval(), hostile(2, 3, 8, 8)
    plain = rmfx.convert(model, x, concat=True)
    report = rmfx.report(plain)
    assert not report.entries and len(report.concat_conditions) == 1
    assert report.image_conditions == report.concat_conditions and report.concat_conditions[0] in str(report)
    assert rmfx.Report.from_dict(report.to_dict()) == report
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"converted for spatial size \(8, 8\), got \(9, 9\)"):
        plain(hostile(2, 3, 9, 9))
