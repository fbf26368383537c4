"""Networks that rely on what the user said of values are compared where that holds, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from front import hostile
from nets import conv
from torch import Tensor, nn

import rmfx
from rmfx.check.compare import hostile_like
from rmfx.check.promised import keeping_promises
from rmfx.errors import RmfxError, VerificationError

SHAPE = (2, 4, 9, 7)


class Block(nn.Module):
    """A residual block on the bare input: nothing bounds what it carries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(4, 4, 3), conv(4, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.second(self.first(image).relu())


class Stemmed(nn.Module):
    """The same behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = conv(4, 4, 1), Block()

    def forward(self, image: Tensor) -> Tensor:
        return self.block(self.stem(image))


class Decides(Stemmed):
    """The same in code that symbolic tracing cannot follow."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image if image.shape[2] > 3 else -image)


def images(seed: int = 0) -> Tensor:
    """Numbers of both signs, none beyond 3."""
    return hostile(*SHAPE, seed=seed).clamp(-3, 3)


@pytest.mark.parametrize("make", [Block, Stemmed, Decides])
def test_measured_ranges_are_those_it_is_compared_in(make: Callable[[], nn.Module]) -> None:
    model, x = make().double().eval(), images()
    ranges = rmfx.bounds_from_data(model, [x])
    plain = rmfx.convert(model, x, carrier="shift", value_ranges=ranges, shift_bits=100)
    assert rmfx.report(plain).entries[0].carrier == "shift"
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)
    assert rmfx.verify(model, plain, x, value_ranges=ranges).difference < 1e-12
    with pytest.raises(VerificationError):
        rmfx.verify(model, plain, x)  # beyond the ranges it is another network


def test_a_mistake_is_seen_within_the_ranges() -> None:
    model, x = Block().double().eval(), images()
    ranges = {"image": (-3.0, 3.0)}
    plain = rmfx.convert(model, x, carrier="shift", value_ranges=ranges, shift_bits=100)
    with torch.no_grad():
        next(plain.parameters())[0] *= 1 + 1e-6
    with pytest.raises(VerificationError):
        rmfx.verify(model, plain, x, value_ranges=ranges, quick=True)


def test_inputs_fill_the_ranges() -> None:
    ends = torch.tensor([-1.0, 0.0, -torch.inf, 5.0]), torch.tensor([1.0, 0.5, torch.inf, torch.inf])
    drawn = hostile_like((images(),), {}, 0, 2)
    ((args, _),) = keeping_promises(Block().double().eval(), [drawn], ((images(),), {}), {"image": ends})
    low, high = args[0].amin((0, 2, 3)), args[0].amax((0, 2, 3))
    assert torch.all(low >= ends[0]) and torch.all(high <= ends[1])
    assert low[0] < -0.9 and high[0] > 0.9 and low[1] < 0.05 and high[1] > 0.45  # spread evenly
    assert torch.equal(args[0][:, 2], drawn[0][0][:, 2]) and low[3] == 5 and high[3] > 10


def test_keyword_inputs_and_integers() -> None:
    class Picks(nn.Module):
        def forward(self, x: Tensor, index: Tensor, *, gain: Tensor) -> Tensor:
            return x[index] * gain

    drawn = ((hostile(3, 2), torch.tensor([1, 0])), {"gain": hostile(2, 2)})
    ((args, kwargs),) = keeping_promises(Picks().eval(), [drawn], drawn, {"index": (0, 2), "gain": (-1, 1)})
    assert torch.equal(args[0], drawn[0][0]) and torch.equal(args[1], drawn[0][1])
    assert kwargs["gain"].abs().max() <= 1


def test_where_inner_ranges_fail_the_example_is_compared() -> None:
    model, x = Stemmed().double().eval(), images()
    low, high = (float(end) for end in model.get_submodule("stem")(x).detach().aminmax())
    drawn = [hostile_like((x,), {}, seed, 2, grow) for seed, grow in ((0, 0), (1, 1))]
    kept = keeping_promises(model, drawn, ((x,), {}), {"stem": (low, high)})
    assert len(kept) == 1 and torch.equal(kept[0][0][0], x)
    wide = keeping_promises(model, drawn, ((x,), {}), {"stem": (100 * low, 100 * high)})
    assert len(wide) == 2 and torch.equal(wide[0][0][0], drawn[0][0][0])


def test_an_example_outside_of_the_ranges_is_refused() -> None:
    model, x = Stemmed().double().eval(), images()
    with pytest.raises(RmfxError, match=r"'stem' reaches \[.*\], outside of \[-0\.001, 0\.001\]: give inputs"):
        rmfx.convert(model, x, carrier="shift", value_ranges={"stem": (-1e-3, 1e-3)})
    plain = rmfx.convert(model, 1e-9 * x, carrier="shift", value_ranges={"stem": (-1e3, 1e3)}, shift_bits=100)
    assert rmfx.report(plain).entries[0].carrier == "shift"
