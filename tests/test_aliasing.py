"""In-place operations: every reader sees what it would have seen."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from front import Lambda, assert_exact, bn, hostile, image, operations
from torch import Tensor, fx, nn
from torch.nn import functional as F

import rmfx
from rmfx.front.aliasing import resolve_in_place
from rmfx.front.trace import trace


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


class PreActivation(nn.Module):
    """``ReLU(inplace=True)`` on the fork: the shortcut reads relu(x), whatever the code seems to say."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.conv, self.norm = conv(), nn.ReLU(inplace=True), conv(), bn(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(self.relu(x))
        return self.norm(y) + x


def test_the_shortcut_of_a_pre_activation_block_sees_the_activation() -> None:
    gm = assert_exact(PreActivation(), image())
    total = next(node for node in gm.graph.nodes if node.target is operator.add)
    assert [str(arg) for arg in total.args] == ["norm", "relu"]


def _identity_then_iadd(m: Lambda, x: Tensor) -> Tensor:
    x = m.a(x)
    identity = x
    x += m.b(x)
    return x + identity  # identity is x, and has changed too


def _basic_block(m: Lambda, x: Tensor) -> Tensor:
    identity = x
    out = m.b(F.relu_(m.a(x)))
    out += identity
    return F.relu(out, inplace=True)


def _out_add(m: Lambda, x: Tensor) -> Tensor:
    out = m.a(x)
    out.add_(x)
    F.relu_(out)  # the result is never named: only the write counts
    return m.b(out)


def _relu_on_the_input(m: Lambda, x: Tensor) -> Tensor:
    y = torch.relu_(x)
    return m.a(x) + y


def _through_identity(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    z = m.drop(m.same(y))
    z.mul_(3)
    return y - z


def _all_operators(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    keep = y * 1.5
    y += x
    y -= keep
    y *= x
    y /= 4
    return y


def _two_outputs(m: Lambda, x: Tensor) -> dict[str, Any]:
    y = m.a(x)
    early = m.b(y)
    y.clamp_(-1, 2)
    return {"late": y, "pair": (early, [m.b(y)])}


def _dead_end_view(m: Lambda, x: Tensor) -> Tensor:
    flat = m.a(x).flatten(1)
    flat.relu_()  # the convolution's own output is not read again
    return flat


def _view_read_before(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    gate = y.view(2, 4, -1).sum(-1)
    y += x
    return y * gate[:, :, None, None]


def _sizes_read_after(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    flat = y.view(y.size(0), -1)
    flat.relu_()
    return flat * y.size(1) + y.shape[2]


def _in_place_dropout(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    z = F.dropout(y, 0.5, training=False, inplace=True)
    z += 1
    return y + m.b(z)


def _counting(m: Lambda, x: Tensor) -> Tensor:
    n = x.size(2)
    n += 1
    n *= 2
    return m.a(x) * n


def _parts_of_a_split(m: Lambda, x: Tensor) -> Tensor:
    first, second = m.a(x).chunk(2, 1)
    first = F.relu(first, inplace=True)
    return torch.cat([second, first], 1)


def _parts_of_a_view(m: Lambda, x: Tensor) -> Tensor:
    first, second = m.a(x).flatten(2).transpose(1, 2).reshape(2, 35, 2, 2).permute(2, 0, 1, 3).unbind(0)
    first *= 0.5
    return first - second


def _method_chain(m: Lambda, x: Tensor) -> Tensor:
    return m.a(x).relu_().add_(x).clamp_(max=3).neg_()


def _flags(m: Lambda, x: Tensor) -> Tensor:
    y = F.leaky_relu(m.a(x), 0.2, True)
    F.hardtanh_(y, -3, 3)
    F.elu_(y)
    torch.celu_(y)
    return F.threshold(y, 0.1, 0.0, inplace=True)


EXACT = [
    _identity_then_iadd,
    _basic_block,
    _out_add,
    _relu_on_the_input,
    _through_identity,
    _all_operators,
    _two_outputs,
    _dead_end_view,
    _view_read_before,
    _sizes_read_after,
    _in_place_dropout,
    _counting,
    _parts_of_a_split,
    _parts_of_a_view,
    _method_chain,
    _flags,
]


@pytest.mark.parametrize("forward", EXACT, ids=lambda f: f.__name__.strip("_"))
def test_readers_see_what_they_saw(forward: Callable[[Lambda, Tensor], Any]) -> None:
    layers = {"a": conv(), "b": conv(), "same": nn.Identity(), "drop": nn.Dropout(inplace=True)}
    gm = assert_exact(Lambda(forward, **layers), image())
    assert not any(getattr(module, "inplace", False) for module in gm.modules())


def test_the_result_differs_where_aliasing_is_ignored() -> None:
    """Plain torch.fx followed by dead-code removal gets these wrong: the cases above can fail."""
    model = Lambda(_out_add, a=conv(), b=conv()).double().eval()
    plain = fx.symbolic_trace(model)
    for node in reversed(plain.graph.nodes):
        if node.op == "call_method" or node.target is torch.relu_:
            node.replace_all_uses_with(node.args[0])
            plain.graph.erase_node(node)
    plain.recompile()
    assert not torch.equal(plain(image()), model(image()))


def test_an_in_place_layer_used_several_times_is_switched_once() -> None:
    model = Lambda(lambda m, x: m.act(m.b(m.act(m.a(m.act(x))))), a=conv(), b=conv(), act=nn.ReLU6(inplace=True))
    gm = assert_exact(model, image())
    assert operations(gm) == ["ReLU6", "Conv2d", "ReLU6", "Conv2d", "ReLU6"]
    assert model.act.inplace  # the caller's layer is as it was


def test_inputs_are_never_written() -> None:
    model = Lambda(lambda m, x: m.a(x.sub_(0.5)), a=conv()).double().eval()
    x, same = image(), image()
    assert torch.equal(rmfx.convert(model, x)(x), model(image())) and torch.equal(x, same)


def test_nodes_keep_their_names() -> None:
    gm = trace(Lambda(_out_add, a=conv(), b=conv()).eval())
    before = [node.name for node in gm.graph.nodes]
    resolve_in_place(gm)
    assert [node.name for node in gm.graph.nodes] == before


def test_hostile_inputs_show_a_lost_activation() -> None:
    x = hostile(2, 4, 7, 5)
    assert x.min() < -6 and x.max() > 6
