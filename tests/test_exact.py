"""What is computed from weights on every call is kept unrounded until emission, and leaves no trace anywhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from front import Lambda, hostile
from nets import cbn, conv
from oracle import relative_difference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import rmfx
from rmfx.algebra.exact import derive, exact, forget, is_rounded, remember
from rmfx.hostile import randomise

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def _positive(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*shape, generator=torch.Generator().manual_seed(5)) + 0.5)


def _standardised(m: Any, x: Tensor) -> Tensor:
    flat = m.w.reshape(1, 5, -1)
    weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(m.w)
    return x + m.b(F.conv2d(x, weight * m.gain, None, padding=1).relu())


def _block(m: Any, x: Tensor) -> Tensor:
    return x + m.b(m.a(x).relu())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "parametrised weight norm": lambda: Lambda(_block, a=parametrizations.weight_norm(conv(6, 5)), b=conv(5, 6)),
    "parametrised spectral norm": lambda: Lambda(_block, a=parametrizations.spectral_norm(conv(6, 5)), b=cbn(5, 6)),
    "hooked weight norm": lambda: Lambda(_block, a=weight_norm(conv(6, 5)), b=conv(5, 6)),
    "hooked spectral norm": lambda: Lambda(_block, a=conv(6, 5), b=spectral_norm(conv(5, 6))),
    "pruned": lambda: Lambda(_block, a=prune.random_unstructured(conv(6, 5), "weight", amount=0.5), b=conv(5, 6)),
    "a standardised weight": lambda: Lambda(_standardised, w=_positive(5, 6, 3, 3), gain=_positive(5, 1, 1, 1),
                                            b=conv(5, 6)),
    "a product of weights": lambda: Lambda(lambda m, x: x + m.b(F.conv2d(x, m.w * m.g, padding=1).relu()),
                                           w=_positive(5, 6, 3, 3), g=_positive(5, 1, 1, 1), b=conv(5, 6)),
    "a root as scale": lambda: Lambda(lambda m, x: x + m.b(m.a(x).relu()) * (m.g**0.5 + 1e-3), a=conv(6, 5),
                                      b=conv(5, 6), g=_positive(1, 6, 1, 1)),
    "a root as divisor, and a shift": lambda: Lambda(lambda m, x: x + (m.b(m.a(x).relu()) - 3 * m.g.log()) / m.g.sqrt(),
                                                     a=conv(6, 5), b=conv(5, 6), g=_positive(1, 6, 1, 1)),
    "a tensor for every position": lambda: Lambda(lambda m, x: _block(m, x) * m.g.sqrt(), a=conv(6, 5), b=conv(5, 6),
                                                  g=_positive(6, 9, 8)),
    "statistics": lambda: Lambda(
        lambda m, x: x + m.b(F.batch_norm(m.a(x), m.g.sqrt(), m.g**2, m.g.exp()).relu()), a=conv(6, 5), b=conv(5, 6),
        g=_positive(5).detach(),
    ),
    "slopes": lambda: Lambda(lambda m, x: x + m.b(F.prelu(m.a(x), m.g.sqrt())), a=conv(6, 5), b=conv(5, 6),
                             g=_positive(5)),
    "a part of a table": lambda: Lambda(
        lambda m, x: x + m.b(m.a(x).relu()) * (m.g / 3).split(6)[1].view(1, 6, 1, 1), a=conv(6, 5), b=conv(5, 6),
        g=_positive(12),
    ),
    "written-out silu": lambda: Lambda(lambda m, x: x + m.b((lambda y: y * torch.sigmoid(1.702 * y))(m.a(x))),
                                       a=conv(6, 5), b=conv(5, 6)),
}  # fmt: skip
KEPT = {"a tensor for every position": 0}


@pytest.mark.parametrize("name", MODELS)
def test_networks_of_float32_are_verified_without_their_rounding(name: str) -> None:
    torch.manual_seed(0)
    x = hostile(2, 6, 9, 8).float()
    model = randomise(MODELS[name](), x / 8)
    attributes = {key: set(vars(value)) for key, value in model.named_parameters()}
    converted = rmfx.convert(model, x)  # compares in float64, before the weights are rounded
    assert rmfx.report(converted).count("removed") == 1
    assert {key: set(vars(value)) for key, value in model.named_parameters()} == attributes
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double()) if "hooked" not in name else model(x).double()
        assert relative_difference(converted(x), truth) < 1e-5
    tensors = [*converted.parameters(), *converted.buffers()]
    assert not any(is_rounded(tensor) for tensor in tensors)
    assert all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point())
    assert torch.equal(pickle.loads(pickle.dumps(converted))(x), converted(x))


def test_a_parametrization_of_the_users_own() -> None:
    class Softplus(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return F.softplus(w) / 3

    x = hostile(2, 6, 9, 8).float()
    model = randomise(Lambda(_block, a=conv(6, 5), b=conv(5, 6)), x / 8)
    parametrize.register_parametrization(model.a, "weight", Softplus())
    assert rmfx.report(rmfx.convert(model.eval(), x)).count("removed") == 1


def test_exact() -> None:
    third = torch.tensor([1 / 3])
    assert float(exact(third)) != 1 / 3 and exact(third).dtype == torch.float64
    remember(third, lambda: torch.tensor([1 / 3], dtype=torch.float64))
    assert is_rounded(third) and float(exact(third)) == 1 / 3
    assert float(exact(derive(third.view(1, 1), lambda t: t.view(1, 1), third))) == 1 / 3
    assert not is_rounded(derive(torch.ones(1), lambda t: t, torch.ones(1)))
    forget(third)
    forget(third)
    assert not is_rounded(third)


def test_there_is_nothing_to_remember_without_rounding() -> None:
    for tensor in (torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.long)):
        remember(tensor, lambda: torch.zeros(1))
        assert not is_rounded(tensor) and exact(tensor).tolist() == [1]
