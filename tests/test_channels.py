"""What picks, adds, joins and shuffles channels: what becomes which layer, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from front import Lambda, assert_exact, conv, hostile, image, layer, normal_form, operations
from oracle import assert_equivalent
from torch import Tensor, nn
from torch.nn import functional as F

import rmfx
from rmfx.front.trace import trace
from rmfx.passes.normalise import normalise


def parts_of(function: Callable[[Tensor], Any], width: int = 6) -> list[str]:
    """The operations behind a convolution with ``width`` channels, with the arguments of slices and pads."""
    gm = assert_exact(Lambda(lambda m, x: function(m.conv(x)), conv=conv(4, width)), image())
    return shown(gm)[1:]


def shown(gm: Any) -> list[str]:
    """The operations of a graph; slices, pads and shuffles with their arguments."""
    names = []
    for node, name in zip([n for n in gm.graph.nodes if n.op.startswith("call")], operations(gm), strict=True):
        special = name in ("ChannelSlice", "ChannelPad", "ChannelShuffle")
        names.append(f"{name}({gm.get_submodule(str(node.target)).extra_repr()})" if special else name)
    return names


def sliced(start: int, length: int, axis: int = 1) -> str:
    return f"ChannelSlice(start={start}, length={length}, axis={axis})"


SLICES: list[tuple[Callable[[Tensor], Any], list[str]]] = [
    (lambda y: y[:, :2], [sliced(0, 2)]),
    (lambda y: y[:, 2:, :, :], [sliced(2, 4)]),
    (lambda y: y[:, -2:, ...], [sliced(4, 2)]),
    (lambda y: y[:, 1:-1], [sliced(1, 4)]),
    (lambda y: y[:, :99], []),
    (lambda y: y[:, 0:6, ...], []),
    (lambda y: y.narrow(1, 1, 3), [sliced(1, 3)]),
    (lambda y: torch.narrow(y, 1, -3, 3), [sliced(3, 3)]),
    (lambda y: y[..., 1:3], ["getitem"]),  # columns of the image
    (lambda y: y[:, ::2], ["getitem"]),
    (lambda y: y[:, 1], ["getitem"]),
    (lambda y: y[1:], ["getitem"]),
    (lambda y: y[:, 1:3, 1:], ["getitem"]),
    (lambda y: y[:, None, 1:3], ["getitem"]),
    (lambda y: y.narrow(2, 1, 3), ["narrow"]),
    (lambda y: y.split(4, 1), ["split"]),  # the parts leave the network as they are
]


@pytest.mark.parametrize("index", range(len(SLICES)))
def test_slices(index: int) -> None:
    function, expected = SLICES[index]
    assert parts_of(function) == expected


SAMPLES: list[tuple[Callable[[Tensor], Any], tuple[int, ...] | None]] = [
    (lambda y: y[:, :, ::2, ::2], (2, 2)),
    (lambda y: y[:, :, 0::2, ::3], (2, 3)),
    (lambda y: y[..., ::2, ::2], (2, 2)),
    (lambda y: y[..., ::3], (1, 3)),
    (lambda y: y[:, :, ::4], (4, 1)),
    (lambda y: y[:, :, 1::2, ::2], None),  # begins elsewhere
    (lambda y: y[:, :, :6:2, ::2], None),
    (lambda y: y[:, :2, ::2, ::2], None),
    (lambda y: y[::2, :, ::2, ::2], None),
    (lambda y: y[:, :, ::2, 1], None),
]


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_samples_in_space_are_pools_of_one_position(index: int) -> None:
    function, stride = SAMPLES[index]
    gm = assert_exact(Lambda(lambda m, x: function(m.conv(x)), conv=conv(4, 6)), image())
    assert operations(gm)[1:] == (["getitem"] if stride is None else ["MaxPool2d"])
    if stride is not None:
        (pool,) = [module for module in gm.modules() if isinstance(module, nn.MaxPool2d)]
        assert (pool.kernel_size, pool.stride) == (1, stride)


def test_samples_of_sequences_and_volumes() -> None:
    one = assert_exact(Lambda(lambda m, x: m.conv(x)[:, :, ::2], conv=nn.Conv1d(4, 6, 1)), hostile(2, 4, 7))
    three = Lambda(lambda m, x: m.conv(x)[:, :, ::2, :, ::3], conv=nn.Conv3d(4, 6, 1))
    assert operations(one) == ["Conv1d", "MaxPool1d"]
    assert operations(assert_exact(three, hostile(2, 4, 5, 3, 7))) == ["Conv3d", "MaxPool3d"]


SPLITS: list[tuple[Callable[[Tensor], Any], list[tuple[int, int]]]] = [
    (lambda y: y.split(4, 1), [(0, 4), (4, 2)]),
    (lambda y: y.split(4, dim=1), [(0, 4), (4, 2)]),
    (lambda y: y.split([1, 5], 1), [(0, 1), (1, 5)]),
    (lambda y: torch.split(y, (2, 3, 1), -3), [(0, 2), (2, 3), (5, 1)]),
    (lambda y: y.chunk(2, 1), [(0, 3), (3, 3)]),
    (lambda y: torch.chunk(y, 4, dim=1), [(0, 2), (2, 2), (4, 2)]),
    (lambda y: y.tensor_split(4, 1), [(0, 2), (2, 2), (4, 1), (5, 1)]),
    (lambda y: torch.tensor_split(y, 2, dim=1), [(0, 3), (3, 3)]),
]


@pytest.mark.parametrize("index", range(len(SPLITS)))
def test_every_part_of_a_split_is_a_slice(index: int) -> None:
    function, expected = SPLITS[index]
    count = len(expected)
    found = parts_of(lambda y: [function(y)[i].relu() for i in range(count)])
    assert [name for name in found if name != "ReLU"] == [sliced(*part) for part in expected]
    found = parts_of(lambda y: function(y)[-1].relu())
    assert found == [sliced(*expected[-1]), "ReLU"]


def _difference(pair: Any) -> Tensor:
    first, second = pair
    return first - second


TUPLES: list[tuple[Callable[[Tensor], Any], list[str]]] = [
    (lambda y: torch.cat(y.chunk(2, 1)[::-1], 1), [sliced(3, 3), sliced(0, 3), "cat"]),
    (lambda y: torch.cat(tensors=torch.split(y, [1, 2, 3], 1)[1:], dim=1), [sliced(1, 2), sliced(3, 3), "cat"]),
    (lambda y: _difference(y.chunk(3, 1)[:-1]), [sliced(0, 2), sliced(2, 2), "ChannelAffine", "add"]),
    (lambda y: y.chunk(3, 1)[::-1][1:][0].relu(), [sliced(2, 2), "ReLU"]),
    (lambda y: y.chunk(3, 1)[1:], [sliced(2, 2), sliced(4, 2)]),
    (lambda y: torch.cat(y.chunk(2, 2)[::-1], 2), ["chunk", "getitem", "cat"]),  # as many parts as the image has
]


@pytest.mark.parametrize("index", range(len(TUPLES)))
def test_slices_of_a_tuple_of_parts(index: int) -> None:
    function, expected = TUPLES[index]
    assert parts_of(function) == expected


def test_a_part_that_is_read_twice_is_one_slice() -> None:
    assert parts_of(lambda y: y.chunk(2, 1)[0] + y[:, :3]) == [sliced(0, 3), sliced(0, 3), "add"]

    def forward(y: Tensor) -> Tensor:
        parts = y.chunk(2, 1)
        return parts[0].sigmoid() + parts[0].tanh() + parts[1]

    assert parts_of(forward) == [sliced(0, 3), "Sigmoid", "Tanh", "add", sliced(3, 3), "add"]


def test_splits_along_other_dimensions_stay() -> None:
    assert parts_of(lambda y: y.chunk(2, 0)[0].relu()) == ["chunk", "getitem", "ReLU"]
    assert parts_of(lambda y: y.split(2, 2)[0].relu()) == ["split", "getitem", "ReLU"]


def test_channels_of_an_input_are_known_by_their_reader_only() -> None:
    model = Lambda(lambda m, x: m.conv(x) + x[:, 1:3], conv=conv(4, 2))
    assert shown(assert_exact(model, image())) == ["Conv2d", sliced(1, 2), "add"]
    assert operations(assert_exact(Lambda(lambda m, x: x[:, 1:3]), image())) == ["getitem"]


def test_features_are_sliced_along_the_last_axis() -> None:
    model = Lambda(lambda m, x: m.fc(x)[:, 1:3], fc=nn.Linear(4, 6))
    assert shown(assert_exact(model, hostile(3, 4)))[1:] == ["getitem"]  # the input may have any rank
    gm = normalise(trace(model.double().eval()), inputs=(hostile(3, 4),))
    assert shown(gm)[1:] == [sliced(1, 2, -1)]
    assert torch.equal(gm(hostile(3, 4)), model(hostile(3, 4)))
    tokens = Lambda(lambda m, x: (m.fc(x)[:, 1:3], m.fc(x)[..., 1:3]), fc=nn.Linear(4, 6)).double().eval()
    gm = normalise(trace(tokens), inputs=(hostile(3, 5, 4),))
    assert shown(gm) == ["Linear", "getitem", "Linear", sliced(1, 2, -1)]
    for size in (3, 7):
        assert all(map(torch.equal, gm(hostile(2, size, 4)), tokens(hostile(2, size, 4))))


# -- zero channels and concatenations ----------------------------------------------------------------------------------


def padded(before: int, after: int) -> str:
    return f"ChannelPad(before={before}, after={after}, axis=1)"


ZEROS: list[tuple[Callable[[Tensor], Any], list[str]]] = [
    (lambda y: F.pad(y, (0, 0, 0, 0, 1, 2)), [padded(1, 2)]),
    (lambda y: F.pad(y, [0, 0, 0, 0, 0, 2], "constant", 0), [padded(0, 2)]),
    (lambda y: F.pad(y, (0, 0, 0, 0, 0, 2), value=1.0), ["pad"]),
    (lambda y: F.pad(y, (0, 0, 0, 0, 0, -2)), ["pad"]),
    (lambda y: torch.cat([y, torch.zeros_like(y)], 1), [padded(0, 6)]),
    (lambda y: torch.cat([torch.zeros_like(y), y, torch.zeros_like(y)], dim=-3), [padded(6, 6)]),
    (lambda y: torch.cat((y, y.new_zeros(y.size(0), 3, y.size(2), y.size(3))), 1), [padded(0, 3)]),
    (lambda y: torch.cat((y, y, torch.zeros_like(y)), 1), ["zeros_like", "cat"]),
    (lambda y: torch.cat((y, torch.zeros_like(y)), 2), ["zeros_like", "cat"]),
    (lambda y: torch.cat((y, torch.ones_like(y)), 1), ["ones_like", "cat"]),
]


@pytest.mark.parametrize("index", range(len(ZEROS)))
def test_zero_channels(index: int) -> None:
    function, expected = ZEROS[index]
    assert parts_of(function) == expected


def test_zeros_of_a_type_of_their_own_are_a_pad_where_they_do_not_change_the_type() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        y = m.conv(x)
        return torch.cat((y, y.new_zeros((y.shape[0], 3, y.shape[2], y.shape[3]), dtype=torch.float64)), 1)

    for dtype, expected in ((torch.float64, [padded(0, 3)]), (torch.float32, ["new_zeros", "cat"])):
        model, x = Lambda(forward, conv=conv()).to(dtype).eval(), image().to(dtype)
        gm = normalise(trace(model), inputs=(x,))
        assert [name for name in shown(gm)[1:] if name not in ("getattr", "getitem")] == expected
        assert torch.equal(gm(x), model(x)) and gm(x).dtype == torch.float64
    assert "cat" in operations(normal_form(Lambda(forward, conv=conv()).double().eval()))  # of which type is x?


def test_one_spelling_of_concatenations() -> None:
    for function in (
        lambda y: torch.cat([y, y.relu()], 1),
        lambda y: torch.concat((y, y.relu()), dim=-3),
        lambda y: torch.concatenate((y, y.relu()), axis=1),
        lambda y: torch.cat(tensors=[y, y.relu()], dim=1),
    ):
        gm = assert_exact(Lambda(lambda m, x, f=function: f(m.conv(x)), conv=conv()), image())
        (node,) = [node for node in gm.graph.nodes if node.target is torch.cat]
        assert [getattr(part, "name", part) for part in (*node.args[0], node.args[1])] == ["conv", "relu", 1]
        assert not node.kwargs
    assert parts_of(lambda y: torch.cat([y], 1)) == []


# -- products with a broadcast operand ---------------------------------------------------------------------------------


JOINED: list[tuple[Callable[[Tensor], Any], list[str]]] = [
    (lambda y: torch.cat([y, y.relu()], 1).chunk(2, 1)[0].tanh(), ["Tanh"]),
    (lambda y: torch.cat([y, y.relu()], 1)[:, 6:].tanh(), ["ReLU", "Tanh"]),
    (lambda y: torch.cat([y, y.relu()], -3)[:, 7:9].tanh(), ["ReLU", sliced(1, 2), "Tanh"]),
    (lambda y: torch.cat([y.relu(), torch.cat([y, y], 1)], 1).narrow(1, 13, 2).tanh(), [sliced(1, 2), "Tanh"]),
    (lambda y: torch.cat([y, y.relu()], 1)[:, 5:7].tanh(), ["ReLU", "cat", sliced(5, 2), "Tanh"]),
    (lambda y: torch.cat([y, y.relu()], 2)[:, :3].tanh(), ["ReLU", "cat", sliced(0, 3), "Tanh"]),
]


@pytest.mark.parametrize("index", range(len(JOINED)))
def test_slices_of_a_concat_are_slices_of_its_operands(index: int) -> None:
    function, expected = JOINED[index]
    assert sorted(parts_of(function)) == sorted(expected)


def test_parts_of_a_concat_that_are_read_twice() -> None:
    def forward(y: Tensor) -> Tensor:
        parts = torch.cat([y, y.relu()], 1).chunk(2, 1)
        return parts[0].sigmoid() + parts[1] + parts[0].tanh() + parts[1].tanh()

    assert parts_of(forward) == ["ReLU", "Sigmoid", "add", "Tanh", "add", "Tanh", "add"]


def test_a_concat_that_changes_types_is_sliced_itself() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        return torch.cat([m.conv(x), m.low(x.half())], 1)[:, 4:]

    gm = normalise(trace(Lambda(forward, conv=conv(), low=conv().half()).eval()), inputs=(image().float(),))
    assert shown(gm)[-2:] == ["cat", sliced(4, 4)]
    assert gm(image().float()).dtype == torch.float32


@pytest.mark.parametrize("sized", [True, False])
def test_a_sum_of_the_halves_of_a_concat_is_a_residual_sum(sized: bool) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        x = m.first(x)
        first, second = torch.cat([x, m.third(m.second(x).relu())], 1).chunk(2, 1)
        return first + second

    model = Lambda(forward, first=conv(), second=conv(), third=conv()).double().eval()
    result = rmfx.convert(model, *((image(),) if sized else ()))
    assert [(entry.kind, entry.status) for entry in rmfx.report(result).entries] == [("identity", "removed")]
    assert_equivalent(model, rmfx.to_sequential(result), image())


def gated(expand: Callable[[Tensor, Tensor], Tensor], known: bool = False) -> list[str]:
    model = Lambda(lambda m, x: x * expand(m.conv(x).mean((2, 3), keepdim=True), x), conv=conv()).double().eval()
    gm = normalise(trace(model), inputs=(image(),) if known else None)
    assert torch.equal(gm(image(1)), model(image(1)))
    return [name for name in operations(gm)[2:] if name not in ("size", "getattr", "getitem")]


def test_products_broadcast_by_themselves() -> None:
    assert gated(lambda gate, x: gate) == ["mul"]
    assert gated(lambda gate, x: gate.expand_as(x)) == ["mul"]
    assert gated(lambda gate, x: gate.expand(x.size())) == ["expand", "mul"]
    assert gated(lambda gate, x: gate.expand(x.size()), known=True) == ["mul"]
    assert gated(lambda gate, x: gate.broadcast_to(x.shape), known=True) == ["mul"]


def test_an_expansion_that_makes_the_result_larger_stays() -> None:
    model = Lambda(lambda m, x: m.conv(x).mean((2, 3), True) * x.mean((2, 3), True).expand(x.shape), conv=conv())
    gm = normalise(trace(model.double().eval()), inputs=(image(),))
    assert operations(gm)[-2:] == ["expand", "mul"]


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_of_channels_are_written_out() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        y = m.conv(x)
        batch, channels, height, width = y.shape
        return y.reshape(batch, channels // 2, 2 * height, width) * (channels**-0.5) / y.size(1)

    gm = assert_exact(Lambda(forward, conv=conv()), image())
    (node,) = [node for node in gm.graph.nodes if node.target == "reshape"]
    assert node.args[2] == 2 and operations(gm)[-2:] == ["ChannelAffine", "ChannelAffine"]
    for size in ((1, 4, 3, 8), (3, 4, 9, 2)):
        x = hostile(*size)
        assert torch.equal(gm(x), forward(gm, x))


def test_weights_that_depend_on_a_number_of_channels_are_computed() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        y = m.conv(x)
        return F.conv2d(y, m.blur.expand(y.shape[1], -1, -1, -1), groups=y.shape[1])

    gm = assert_exact(Lambda(forward, conv=conv(), blur=torch.rand(1, 1, 3, 3)), image())
    assert operations(gm) == ["Conv2d", "Conv2d"]
    assert gm.get_submodule("conv2d").groups == 4


# -- shuffles ---------------------------------------------------------------------------------------------------------


def torchvision_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


SHUFFLES: list[Callable[[Tensor], Tensor]] = [
    lambda y: torchvision_shuffle(y, 2),
    lambda y: torchvision_shuffle(y, 3),
    lambda y: y.reshape(y.shape[0], 3, -1, y.shape[2], y.shape[3]).permute(0, 2, 1, 3, 4).flatten(1, 2),
    lambda y: y.unflatten(1, (2, 3)).transpose(2, 1).flatten(1, 2),
    lambda y: y.view(y.size(0), 3, 2, y.size(2), y.size(3)).transpose(1, 2).reshape(y.shape),
]


@pytest.mark.parametrize("index", range(len(SHUFFLES)))
def test_shuffles(index: int) -> None:
    model = Lambda(lambda m, x: SHUFFLES[index](m.conv(x)), conv=conv(4, 6))
    gm = assert_exact(model, image())
    assert operations(gm) == ["Conv2d", "ChannelShuffle"]
    assert layer(gm, nn.ChannelShuffle).groups == (2, 3, 3, 2, 3)[index]
    assert torch.equal(gm(hostile(3, 4, 2, 6)), model(hostile(3, 4, 2, 6)))


def test_features_are_not_shuffled_by_a_layer() -> None:
    """``nn.ChannelShuffle`` takes images only."""
    model = Lambda(lambda m, x: m.fc(x).reshape(-1, 2, 3).transpose(1, 2).reshape(-1, 6), fc=nn.Linear(4, 6))
    gm = normalise(trace(model.double().eval()), inputs=(hostile(3, 4),))
    assert operations(gm) == ["Linear", "reshape", "transpose", "reshape"]


def no_shuffle(function: Callable[[Tensor], Tensor]) -> bool:
    gm = assert_exact(Lambda(lambda m, x: function(m.conv(x)), conv=conv(4, 6)), image())
    return "ChannelShuffle" not in operations(gm)


def test_what_is_no_shuffle_stays() -> None:
    def five(y: Tensor, height: Any, width: Any) -> Tensor:
        return y.view(y.size(0), 2, 3, height, width)

    def four(z: Tensor, y: Tensor) -> Tensor:
        return z.reshape(y.size(0), 6, y.size(2), y.size(3))

    assert no_shuffle(lambda y: four(five(y, y.size(3), y.size(2)).transpose(1, 2), y))  # moves positions
    assert no_shuffle(lambda y: four(five(y, y.size(2), y.size(3)).transpose(0, 2), y))
    assert no_shuffle(lambda y: four(five(y, y.size(2), y.size(3)).transpose(3, 4), y))
    assert no_shuffle(lambda y: five(y, y.size(2), y.size(3)).transpose(1, 2).flatten(2, 3))
    assert no_shuffle(lambda y: y.view(2, 2, 3, 7, 5).transpose(1, 2).reshape(y.shape))  # of this size only
    assert no_shuffle(lambda y: five(y, y.size(2), y.size(3)).transpose(1, 2).reshape(y.size(0), 3, -1, y.size(3)))
