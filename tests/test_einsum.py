"""Sums of products with a constant matrix are linear layers and 1x1 convolutions; others stay what they are."""

from __future__ import annotations

import pytest
import torch
from front import Lambda, conv, hostile, image, operations
from oracle import FLOAT64_TOLERANCE, relative_difference
from torch import Tensor, nn
from torch.nn import functional as F

import rmfx
from rmfx.front.normal import check_normal
from rmfx.front.trace import trace
from rmfx.hostile import randomise
from rmfx.passes.normalise import normalise

# The equation, sizes of the tensor and of the matrix, and what it is.
LAYERS: list[tuple[str, tuple[int, ...], tuple[int, int], str]] = [
    ("nchw,oc->nohw", (2, 4, 7, 5), (6, 4), "Conv2d"),
    ("nchw,co->nohw", (2, 4, 7, 5), (4, 6), "Conv2d"),
    ("bct, dc -> bdt", (2, 4, 7), (6, 4), "Conv1d"),
    ("nctyx,oc->notyx", (2, 4, 3, 5, 2), (6, 4), "Conv3d"),
    ("nhwc,oc->nhwo", (2, 7, 5, 4), (6, 4), "Linear"),
    ("nc,cd->nd", (2, 4), (4, 6), "Linear"),
    ("c,oc->o", (4,), (6, 4), "Linear"),
    ("nchw,ow->ncho", (2, 4, 7, 5), (6, 5), "Linear"),
    ("...c,oc->...o", (2, 3, 4), (6, 4), "einsum"),
    ("nchw,oh->ncow", (2, 4, 7, 5), (6, 7), "einsum"),
    ("nchw,oc->onhw", (2, 4, 7, 5), (6, 4), "einsum"),
    ("nchw,oc->nhwo", (2, 4, 7, 5), (6, 4), "einsum"),
    ("nchw,oc->nhw", (2, 4, 7, 5), (6, 4), "einsum"),
    ("nchw,oc", (2, 4, 7, 5), (6, 4), "einsum"),
    ("nchw,cc->nchw", (2, 4, 7, 5), (4, 4), "einsum"),
    ("nnc,oc->no", (4, 4, 4), (6, 4), "einsum"),
    ("nchw,nc->nchw", (2, 4, 7, 5), (2, 4), "einsum"),
]


@pytest.mark.parametrize("order", ["first", "second", "a list"])
@pytest.mark.parametrize(("equation", "sizes", "matrix", "expected"), LAYERS)
def test_layers(equation: str, sizes: tuple[int, ...], matrix: tuple[int, int], expected: str, order: str) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        if order == "second":
            terms, arrow, result = equation.partition("->")
            return torch.einsum(",".join(terms.split(",")[::-1]) + arrow + result, m.w, x)
        return torch.einsum(equation, [x, m.w]) if order == "a list" else torch.einsum(equation, x, m.w)

    model = Lambda(forward, w=nn.Parameter(hostile(*matrix, seed=1))).eval()
    x = hostile(*sizes)
    gm = normalise(trace(model))
    check_normal(gm)
    assert operations(gm) == [expected]
    assert relative_difference(model(x), gm(x)) <= FLOAT64_TOLERANCE


def test_a_matrix_that_the_input_makes_stays() -> None:
    model = Lambda(lambda m, x: torch.einsum("nchw,oc->nohw", x, x.mean((0, 3))), a=conv()).eval()
    assert "einsum" in operations(normalise(trace(model)))


@pytest.mark.parametrize("door", ["fx", "export"])
def test_a_residual_connection_around_an_einsum_is_removed(door: str) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        return F.relu(x + torch.einsum("nchw,co->nohw", F.relu(m.conv(x)), m.w))

    model = Lambda(forward, stem=conv(), conv=conv(), w=nn.Parameter(torch.rand(4, 4)))
    model = randomise(model.double(), image(), 0).eval()
    converted = rmfx.convert(torch.export.export(model, (image(),)) if door == "export" else model, image())
    assert rmfx.report(converted).count("removed") == 1
    assert relative_difference(model(image()), converted(image())) <= FLOAT64_TOLERANCE
