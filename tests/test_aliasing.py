"""In-place operations: every reader sees what it would have seen, or the graph is refused with file and line."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from front import Lambda, assert_exact, bn, hostile, image, normal_form, operations
from torch import Tensor, fx, nn
from torch.nn import functional as F

import rmfx
from rmfx.errors import NormalFormError
from rmfx.front.aliasing import resolve_in_place
from rmfx.front.opnames import FRESH, NO_OUT_OF_PLACE, out_of_place
from rmfx.front.trace import trace
from rmfx.modules import ChannelSlice
from rmfx.passes.normalise import normalise


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


# -- refusals ---------------------------------------------------------------------------------------------------------


def _partial(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :2].add_(x[:, :2])
    return y


def _partial_operator(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    part = y.narrow(1, 0, 2)
    part += x[:, :2]
    return m.a(y)


def _view_read_later(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    flat = y.flatten(1)
    y.relu_()
    return flat


def _unknown_read_later(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    z = y.contiguous()
    z.relu_()
    return y + z


def _whole_split_read_later(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    first, second = y.chunk(2, 1)
    first.relu_()
    return y * 2


def _view_in_the_output(m: Lambda, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.a(x)
    flat = y.reshape(2, -1)
    return flat, y.relu_()


def _data(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    y.data.mul_(2)
    return y


def _parts_of_an_expansion(m: Lambda, x: Tensor) -> Tensor:
    first, second = m.a(x).unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(3).unbind(1)
    first.add_(1)
    return first + 2 * second


def _parts_of_the_input(m: Lambda, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)  # one and the same, where a caller expands one channel
    first.mul_(2)
    return m.a(torch.cat([first, second], 1))


def _slice_layer(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    part = m.part(y)
    part.relu_()
    return torch.cat([y, part], 1)


@pytest.mark.parametrize(
    ("forward", "name", "reader"),
    [
        (_partial, "add_", "output"),
        (_partial_operator, "iadd", "a_1"),
        (_view_read_later, "relu_", "output"),
        (_unknown_read_later, "relu_", "add"),
        (_whole_split_read_later, "relu_", "mul"),
        (_view_in_the_output, "relu_", "output"),
        (_data, "mul_", "output"),
        (_slice_layer, "relu_", "cat"),
        (_parts_of_an_expansion, "add_", "mul"),
        (_parts_of_the_input, "mul_", "cat"),
    ],
)
def test_writes_seen_through_a_view_are_refused(forward: Any, name: str, reader: str) -> None:
    with pytest.raises(NormalFormError) as caught:
        normal_form(Lambda(forward, a=conv(), part=ChannelSlice(0, 2)).eval())
    message = str(caught.value)
    first = forward.__code__.co_firstlineno
    line = int(message.split("test_aliasing.py:")[1].split(",")[0].split(")")[0])
    assert first < line < first + 6, "the line of the write"
    assert f"({name} at " in message and f"which {reader}" in message
    assert "write the out-of-place form" in message


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x + m.weight.mul_(2),
        lambda m, x: x + F.relu(m.weight, inplace=True),
        lambda m, x: x + m.weight.view(1, 4, 1, 1).add_(1),
        lambda m, x: x + operator.iadd(m.weight, 1),
        lambda m, x: x + m.act(m.weight),
    ],
    ids=["method", "flag", "view", "operator", "layer"],
)
def test_writes_into_parameters_are_refused(forward: Any) -> None:
    weight = torch.rand(4, 1, 1)
    model = Lambda(forward, weight=weight, act=nn.ReLU(inplace=True)).eval()
    with pytest.raises(NormalFormError, match=r"writes into weight, which would change the model on every call"):
        normal_form(model)
    assert torch.equal(model.weight, weight)


def _into_zeros(m: Lambda, x: Tensor) -> Tensor:
    y = torch.zeros(2, 4, 7, 5)
    y += x
    return y


def _item_of_zeros(m: Lambda, x: Tensor) -> Tensor:
    y = torch.zeros(2, 4, 7, 5)
    y[:, 1:3] = x
    return y


@pytest.mark.parametrize("forward", [_into_zeros, _item_of_zeros])
def test_writes_into_constants_of_the_graph_are_refused(forward: Any) -> None:
    with pytest.raises(NormalFormError, match="writes into _tensor_constant0"):
        normal_form(Lambda(forward).eval())


@pytest.mark.parametrize("method", ["copy_", "fill_", "bernoulli_"])
def test_writes_without_an_out_of_place_form_are_refused(method: str) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        return getattr(m.a(x), method)(0.5)

    with pytest.raises(NormalFormError, match=rf"{method} at .*test_aliasing.py:\d+\) has no out-of-place form"):
        normal_form(Lambda(forward, a=conv()).eval())


def test_an_out_argument_is_refused() -> None:
    model = Lambda(lambda m, x: torch.add(x, 1, out=m.a(x)), a=conv()).eval()
    with pytest.raises(NormalFormError, match="writes into an argument: use its result instead, without out="):
        normal_form(model)


def test_an_overload_that_writes_is_refused() -> None:
    model = Lambda(lambda m, x: torch.ops.aten.relu_.default(m.a(x)), a=conv()).eval()
    with pytest.raises(NormalFormError, match="has no out-of-place form"):
        normal_form(model)


def _rounds(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    y = y.relu().half()
    y += m.a(x)  # in place, half stays half
    return y


def test_writes_of_wider_numbers_are_refused() -> None:
    x = image().float()
    with pytest.raises(NormalFormError) as caught:
        normalise(trace(Lambda(_rounds, a=conv()).eval()), inputs=(x,))
    line = _rounds.__code__.co_firstlineno + 3
    assert f"test_aliasing.py:{line})" in str(caught.value)
    assert "writes torch.float32 into half, which is torch.float16: cast a_1 first" in str(caught.value)


@pytest.mark.parametrize(
    "write",
    [lambda y, m: y.add_(y > 0), lambda y, m: y.mul_(torch.arange(5)), lambda y, m: y.sub_(m.wide)],
    ids=["bool", "integers", "a constant"],
)
def test_writes_that_keep_the_type_are_exact(write: Callable[[Tensor, Lambda], Tensor]) -> None:
    wide = torch.tensor([0.5, 2.0, -3.0, 1.0], dtype=torch.float64).view(4, 1, 1)
    model = Lambda(lambda m, x: write(m.a(x), m), a=conv(), wide=wide).eval()
    x = image().float()
    gm = normalise(trace(model), inputs=(x,))
    assert gm(x).dtype == torch.float32 and torch.equal(gm(x), model(x))


def test_inputs_are_never_written() -> None:
    model = Lambda(lambda m, x: m.a(x.sub_(0.5)), a=conv()).double().eval()
    x, same = image(), image()
    assert torch.equal(rmfx.convert(model, x)(x), model(image())) and torch.equal(x, same)


def test_nodes_keep_their_names() -> None:
    gm = trace(Lambda(_out_add, a=conv(), b=conv()).eval())
    before = [node.name for node in gm.graph.nodes]
    resolve_in_place(gm)
    assert [node.name for node in gm.graph.nodes] == before


# -- the tables, against torch ----------------------------------------------------------------------------------------

Call = Callable[[Any, Tensor], Any]


def _plain(f: Any, x: Tensor) -> Any:
    return f(x)


def _with_itself(f: Any, x: Tensor) -> Any:
    return f(x, x)


def _zero(f: Any, x: Tensor) -> Any:
    return f(x, 0)


def _one(f: Any, x: Tensor) -> Any:
    return f(x, 1)


BOTH = "div divide eq floor_divide fmod ge gt le logical_and logical_or lt maximum minimum ne remainder rsub truediv"
ONE = "mul multiply pow true_divide floordiv mod max_pool2d avg_pool2d topk cumsum cumprod repeat_interleave glu"
CALLS: dict[str, Call] = {
    **dict.fromkeys(BOTH.split(), _with_itself),
    **dict.fromkeys(ONE.split(), _one),
    **dict.fromkeys(("add", "sub", "subtract", "softmax", "log_softmax", "softmin", "logsumexp"), _zero),
    **dict.fromkeys(("clamp_min", "clamp_max", "hardshrink", "softshrink"), _zero),
    **{name: (lambda f, x: f(x, -99.0, 99.0)) for name in ("clamp", "clip", "hardtanh")},
    **{name: (lambda f, x: f(x, -99.0, 0.0)) for name in ("threshold", "_threshold")},
    **{f"max_pool{d}d": (lambda f, x, d=d: f(_sized(x, d), 1)) for d in (1, 2, 3)},
    **{f"avg_pool{d}d": (lambda f, x, d=d: f(_sized(x, d), 1)) for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": (lambda f, x, d=d: f(_sized(x, d), (4,) * d)) for d in (1, 2, 3)},
    **{f"adaptive_max_pool{d}d": (lambda f, x, d=d: f(_sized(x, d), (4,) * d)) for d in (1, 2, 3)},
    **{f"conv{d}d": (lambda f, x, d=d: f(_sized(x, d), torch.ones(4, 4, *(1,) * d))) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": (lambda f, x, d=d: f(_sized(x, d), torch.ones(4, 4, *(1,) * d))) for d in (1, 2, 3)},
    "addcdiv": lambda f, x: f(x, x, x, value=0),
    "addcmul": lambda f, x: f(x, x, x, value=0),
    "addmm": lambda f, x: f(x[0, 0], x[0, 0], x[0, 0], alpha=0),
    "baddbmm": lambda f, x: f(x[0], x[0], x[0], alpha=0),
    "batch_norm": lambda f, x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "bmm": lambda f, x: f(x[0], x[0]),
    "cat": lambda f, x: f([x]),
    "concat": lambda f, x: f([x]),
    "embedding": lambda f, x: F.embedding(torch.arange(4), x[0, 0]),
    "flip": lambda f, x: f(x, []),
    "full_like": _one,
    "glu": lambda f, x: f(x, 1),
    "group_norm": lambda f, x: f(x, 1),
    "index_select": lambda f, x: f(x, 0, torch.arange(len(x))),
    "instance_norm": lambda f, x: F.instance_norm(x),
    "interpolate": lambda f, x: f(x, scale_factor=1),
    "layer_norm": lambda f, x: f(x, (4,)),
    "lerp": lambda f, x: f(x, x, 0.0),
    "linear": lambda f, x: f(x, torch.eye(4)),
    "local_response_norm": lambda f, x: f(x, 1),
    "masked_fill": lambda f, x: f(x, torch.zeros(4, dtype=torch.bool), 0.0),
    "matmul": lambda f, x: f(x, torch.eye(4)),
    "mm": lambda f, x: f(x[0, 0], torch.eye(4)),
    "new_full": lambda f, x: x.new_full((4,), 1.0),
    "new_ones": lambda f, x: x.new_ones(4),
    "new_zeros": lambda f, x: x.new_zeros(4),
    "one_hot": lambda f, x: f(torch.zeros(4, dtype=torch.long)),
    "pad": lambda f, x: [f(x, (0, 0, 0, 0), mode=mode) for mode in ("constant", "replicate", "reflect", "circular")],
    "prelu": lambda f, x: f(x, torch.ones(1)),
    "repeat": lambda f, x: x.repeat(1, 1, 1, 1),
    "roll": lambda f, x: f(x, 0),
    "scaled_dot_product_attention": lambda f, x: f(x, x, x),
    "stack": lambda f, x: f([x]),
    "tril": lambda f, x: f(x, 9),
    "triu": lambda f, x: f(x, -9),
    "where": lambda f, x: f(torch.ones(4, dtype=torch.bool), x, x),
}


def _sized(x: Tensor, dims: int) -> Tensor:
    return {1: x[0], 2: x, 3: x[None]}[dims]


def _function(name: str) -> Any:
    for namespace in (torch, F, operator, torch._C._nn):
        if hasattr(namespace, name):
            return getattr(namespace, name)
    return getattr(Tensor, name)


@pytest.mark.parametrize("name", sorted(FRESH))
def test_fresh_results_share_no_memory(name: str) -> None:
    """Arguments under which an operation has nothing to do, where it would be free to hand its input back."""
    x = torch.rand(4, 4, 4, 4) + 0.5
    result = CALLS.get(name, _plain)(_function(name), x)
    results = [tensor for tensor in torch.utils._pytree.tree_leaves(result) if isinstance(tensor, Tensor)]
    assert results, "the operation gives a tensor"
    for tensor in results:
        assert tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_every_in_place_method_is_known() -> None:
    """A method with a trailing underscore has an out-of-place form, or is listed as having none."""
    names = [name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")]
    missing = {name for name in names if not hasattr(Tensor, name[:-1]) and name not in NO_OUT_OF_PLACE}
    sparse = {"resize_as_sparse_", "sparse_resize_", "sparse_resize_and_clear_"}
    assert len(names) > 100
    assert missing == sparse | {"fill_diagonal_", "map2_", "share_memory_"}  # refused like those that are listed


@pytest.mark.parametrize("name", ["relu_", "celu_", "selu_", "rrelu_", "threshold_", "sigmoid_", "clamp_"])
def test_functions_have_their_out_of_place_form(name: str) -> None:
    plain = out_of_place(getattr(torch, name))
    assert plain is getattr(torch, name[:-1], None) or plain is getattr(F, name[:-1])


def test_hostile_inputs_show_a_lost_activation() -> None:
    x = hostile(2, 4, 7, 5)
    assert x.min() < -6 and x.max() > 6
