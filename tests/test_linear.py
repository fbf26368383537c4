"""Maps read off layers compute what the layers compute, and layers made of maps compute what the maps do."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_affine import CONVS, MODES, axes, axis_of, integers, layer, map_of, run_affine, signal, smallest
from torch import Tensor, fx, nn

from rmfx.algebra.affine import Affine, compose, dirac, from_tensors
from rmfx.algebra.grid import Axis, Grid
from rmfx.errors import InexactError
from rmfx.front.trace import trace
from rmfx.graph.editor import meta_layer
from rmfx.graph.emit import Storage, _fill
from rmfx.graph.facts import annotate
from rmfx.graph.linear import affine_of, dims_of, is_linear, mixes, size_dependent
from rmfx.modules import ChannelAffine, ChannelPad, ChannelSlice
from rmfx.passes.normalise import normalise

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def node_of(module: nn.Module, x: Tensor | None) -> fx.Node:
    """The node of the last layer of ``module`` in normal form, with facts for input ``x``."""
    gm = normalise(trace(module.double().eval()))
    annotate(gm, None if x is None else (x,))
    return [node for node in gm.graph.nodes if node.op == "call_module"][-1]


def read(module: nn.Module, x: Tensor | None, dims: int) -> Affine:
    """The map of the last layer of ``module``."""
    return affine_of(node_of(module, x), dims)


def refusal(module: nn.Module, x: Tensor | None, dims: int) -> str:
    """Why the last layer of ``module`` is no map."""
    with pytest.raises(InexactError) as error:
        read(module, x, dims)
    return str(error.value)


def assert_reads(module: nn.Module, x: Tensor, dims: int, tolerance: float = 0.0) -> None:
    """The map of ``module``, as a dense layer where it is depthwise without axes, is ``module``."""
    affine, want = read(module, x, dims), module(x)
    if not dims and affine.groups > 1:
        weight, bias = affine.weights()
        affine = from_tensors(torch.diag(weight.flatten()), bias, Grid())
    got = run_affine(affine, x)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@settings(max_examples=60)
@given(st.integers(0, 3), st.sampled_from(MODES), st.sampled_from((1, 2, 4)), st.booleans(), st.data())
def test_convolutions(dims: int, mode: str, groups: int, bias: bool, data: st.DataObject) -> None:
    extra = data.draw(st.integers(0, 2))
    module = layer(4, 8, data.draw(axes(dims)), mode, groups if dims else 1, bias)
    sizes = [n + extra for n in smallest([map_of(module).grid])] if dims else [3] * extra
    assert_reads(module, signal(extra, *([4, *sizes] if dims else [*sizes, 4])), dims)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=60)
@given(st.integers(1, 3), st.sampled_from(MODES), st.booleans(), st.lists(st.integers(1, 4), min_size=6))
def test_padding_by_name(dims: int, mode: str, same: bool, spans: list[int]) -> None:
    padding = "same" if same else "valid"
    kernel, dilation = spans[:dims], [min(d, 3 if dims < 3 else 2) for d in spans[3 : 3 + dims]]
    module = CONVS[dims - 1](2, 3, kernel, padding=padding, dilation=dilation, padding_mode=mode)
    for offset, parameter in enumerate(module.parameters()):
        parameter.data = integers(offset, *parameter.shape)
    x = signal(0, 2, *(d * (k - 1) + 2 for k, d in zip(kernel, dilation, strict=True)))
    assert_reads(module.requires_grad_(False), x, dims)
    if same:
        assert module(x).shape[2:] == x.shape[2:] and read(module, x, dims).grid.excess == (0,) * dims


def test_a_mode_that_pads_nothing_is_no_mode() -> None:
    for padding in (0, "valid"):
        module = nn.Conv2d(2, 2, 3, padding=padding, padding_mode="reflect")
        assert read(module, None, 2).grid == Grid.of((3, 3))


def hostile_norm(dims: int, affine: bool) -> nn.Module:
    """Statistics far from 0 and 1, variance 0 and scale 0 among them."""
    norm = BATCH_NORMS[dims](5, eps=1e-3, affine=affine).double().eval()
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([-30.0, 0.0, 0.5, 7.0, 100.0]))
        norm.running_var.copy_(torch.tensor([0.0, 1e-8, 0.3, 50.0, 1e6]))
        for parameter, values in zip(norm.parameters(), ([-2.0, 1e-3, 0.0, 3.0, 40.0], [9.0, -1.0, 4.0, 0.0, -60.0]),
                                     strict=False):  # fmt: skip
            parameter.copy_(torch.tensor(values))
    return norm.requires_grad_(False)


@pytest.mark.parametrize("dims", range(4))
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norms(dims: int, affine: bool) -> None:
    assert_reads(hostile_norm(dims, affine), signal(0, 5, *[3] * dims), dims, tolerance=1e-14)


@pytest.mark.parametrize("dims", range(4))
@pytest.mark.parametrize("vector", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_channel_affine(dims: int, vector: bool, biased: bool) -> None:
    weight, bias = (integers(i, 5) if vector else torch.tensor(-3.0 - i).double() for i in range(2))
    module = ChannelAffine(weight, bias if biased else None, axis=1 if dims else -1)
    assert_reads(module, signal(0, 5, *[3] * dims), dims)
    assert read(module, signal(0, 5, *[3] * dims), dims).has_bias == biased


@settings(max_examples=60)
@given(st.integers(1, 3), st.booleans(), st.sampled_from((None, 1, 5)), st.booleans(), st.data())
def test_average_pools(dims: int, counts: bool, divisor: int | None, default: bool, data: st.DataObject) -> None:
    kernel, stride = (data.draw(st.integers(1, 4)) for _ in range(2))
    padding = data.draw(st.integers(0, kernel // 2)) if counts or (divisor and dims > 1) else 0
    arguments = {} if dims == 1 else {"divisor_override": divisor}
    module = POOLS[dims - 1](
        kernel, None if default else stride, padding, ceil_mode=False, count_include_pad=counts, **arguments
    )
    assert_reads(module, signal(1, 3, *(kernel + i for i in range(dims))), dims, tolerance=1e-14)


def test_pools_with_a_varying_divisor_are_refused_and_would_be_wrong() -> None:
    reasons = {
        "ceil_mode": "an average pool with ceil_mode has another divisor where it hangs over the border",
        "count_include_pad": "the divisor of an average pool that does not count its padding varies at the borders",
    }
    for name, reason in reasons.items():
        x, varying = signal(0, 3, 6, 6), nn.AvgPool2d(3, 2, 1).double()
        setattr(varying, name, name == "ceil_mode")
        assert refusal(varying, x, 2) == reason
        fixed = copy.deepcopy(varying)
        setattr(fixed, name, name != "ceil_mode")
        got, want = run_affine(read(fixed, x, 2), x), varying(x)
        assert got.shape != want.shape or (got - want).abs().max() > 1


def test_norms_that_are_no_fixed_map_are_refused() -> None:
    norm, x = nn.BatchNorm2d(3, track_running_stats=False), signal(0, 3, 4, 4)
    reason = "batch norm without running statistics normalises by the statistics of each batch"
    assert refusal(norm, x, 2) == reason
    alone, together = norm.double()(x[:1]), norm(x)[:1]
    assert not torch.allclose(alone, together)
    assert refusal(nn.BatchNorm1d(4), None, 0) == (
        "whether BatchNorm1d normalises features or positions depends on the input's rank: pass example_inputs"
    )


def test_norms_of_another_dimension_than_the_channels_are_refused() -> None:
    assert refusal(nn.Sequential(nn.BatchNorm1d(4)), signal(0, 4, 4), 0) == (
        "_0 normalises dimension 1 of a 3-dimensional tensor: not its channels"
    )
    # An unbatched input: the convolution gives [channels, positions], and the norm scales the positions.
    model, x = nn.Sequential(layer(3, 5, [axis_of(1)]), hostile_norm(1, True)), signal(0, 3, 5)[0]
    assert model(x).shape == (5, 5)
    assert refusal(model, x, 1) == "_1 normalises dimension 1 of a 2-dimensional tensor: not its channels"


def test_what_is_no_map_of_these_dimensions_is_refused() -> None:
    x = signal(0, 4, 4)
    scale = ChannelAffine(torch.ones(4), axis=1)
    for module, given_x, dims, reason in (
        (nn.ReLU(), x, 2, "_0 is not a linear layer"),
        (nn.Conv2d(4, 4, 1), None, 1, "_0 has 2 spatial dimensions among layers of 1"),
        (nn.Linear(4, 4), x, 2, "_0 has 0 spatial dimensions among layers of 2"),
        (nn.AvgPool1d(2), x, 2, "_0 has 1 spatial dimensions among layers of 2"),
        (nn.BatchNorm2d(4), None, 1, "_0 has 2 spatial dimensions among layers of 1"),
        (nn.BatchNorm1d(4), x, 2, "_0 normalises dimension 1 of a 3-dimensional tensor: not its channels"),
        (ChannelAffine(torch.tensor(2.0)), None, 2, "the number of channels at _0 is unknown: pass example_inputs"),
        (nn.AvgPool2d(2), None, 2, "the number of channels at _0 is unknown: pass example_inputs"),
        (scale, x, 0, "_0 scales another axis than the channels"),
        (ChannelAffine(torch.ones(4), axis=-1), x, 1, "_0 scales another axis than the channels"),
        (ChannelAffine(torch.ones(4), axis=-1), signal(0, 2, 1), 0, "_0 makes 4 channels of 1"),
    ):
        assert refusal(nn.Sequential(module), given_x, dims) == reason


def test_what_a_layer_is() -> None:
    kinds = {
        nn.Linear(4, 4): (True, True, 0), nn.Conv1d(4, 4, 1): (True, True, 1), nn.Conv3d(4, 4, 1): (True, True, 3),
        nn.BatchNorm2d(4): (True, False, 2), nn.BatchNorm1d(4): (True, False, None),
        nn.AvgPool2d(2): (True, False, 2), ChannelAffine(torch.ones(4)): (True, False, None),
        nn.ReLU(): (False, False, None), nn.ConvTranspose2d(4, 4, 1): (False, False, None),
        nn.MaxPool2d(2): (False, False, 2), nn.MaxPool2d(1, 2): (True, False, 2), nn.ZeroPad2d(1): (True, False, 2),
        nn.ChannelShuffle(2): (True, False, None), nn.PixelUnshuffle(2): (True, False, 2),
        nn.GroupNorm(2, 4): (False, False, None),
    }  # fmt: skip
    for module, kind in kinds.items():
        node = node_of(module, None)
        assert (is_linear(node), mixes(node), dims_of(node)) == kind, module
    assert dims_of(node_of(nn.BatchNorm1d(4), signal(0, 4, 3))) == 1
    assert dims_of(node_of(nn.BatchNorm1d(4), signal(0, 4))) is None


def test_a_layer_that_a_pass_has_made_has_its_map_already() -> None:
    node, waiting = node_of(nn.Conv2d(3, 3, 1), None), dirac(3, Grid.sampling([1, 1]))
    node.meta["affine"] = waiting
    assert affine_of(node, 2) is waiting


def test_sources_are_the_names_of_the_weights() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    assert read(model[:1], None, 2).sources == {"0.weight", "0.bias"}
    assert read(model, None, 2).sources == {f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}


# -- the way back: from maps to layers ---------------------------------------------------------------------------------


def emitted(affine: Affine) -> nn.Module:
    """The ``torch.nn`` layer of ``affine`` with its weights, in float64."""
    module = meta_layer(affine)
    _fill(module, affine, Storage(torch.float64, torch.device("cpu"), False, False))
    return module


@settings(max_examples=100)
@given(
    st.lists(st.tuples(*[st.integers(1, 3)] * 3, *[st.integers(0, 4)] * 2), max_size=3),
    st.sampled_from((1, 2)), st.booleans(), st.integers(0, 2),
)  # fmt: skip
def test_emission_of_any_borders(spans: list[tuple[int, ...]], groups: int, bias: bool, extra: int) -> None:
    grid = Grid(tuple(Axis(*span) for span in spans))
    groups = groups if spans else 1
    affine = from_tensors(integers(0, 4, 4 // groups, *grid.kernel), integers(1, 4) if bias else None, grid, groups)
    module, x = emitted(affine), signal(0, 4, *(n + extra for n in smallest([grid])))
    assert type(module) is (CONVS[len(spans) - 1] if spans else nn.Linear)
    assert (module.bias is not None) == bias
    assert torch.equal(module(x), run_affine(affine, x))


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_emission_of_other_paddings(mode: str, kernel: int) -> None:
    module = same_padded(kernel, mode)
    x = signal(0, 2, 7)
    assert torch.equal(emitted(read(module, x, 1))(x), module(x))


def same_padded(kernel: int, mode: str) -> nn.Module:
    """A convolution with ``padding="same"``: more on the right than on the left where ``kernel`` is even."""
    module = nn.Conv1d(2, 3, kernel, padding="same", padding_mode=mode, dtype=torch.float64).requires_grad_(False)
    for offset, parameter in enumerate(module.parameters()):
        parameter.copy_(integers(offset, *parameter.shape))
    return module


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("outer", [axis_of(1), axis_of(1, 2), axis_of(3), axis_of(2, 2)], ids=str)
def test_emission_of_compositions_with_uneven_borders(mode: str, outer: Axis) -> None:
    inner, behind, x = same_padded(4, mode), layer(3, 2, [outer], seed=5), signal(0, 2, 8)
    assert torch.equal(emitted(compose(map_of(behind), read(inner, x, 1)))(x), behind(inner(x)))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_emission_keeps_storage(channels_last: bool, requires_grad: bool) -> None:
    affine = map_of(layer(4, 6, [axis_of(3, p=1)] * 2))
    module = meta_layer(affine)
    _fill(module, affine, Storage(torch.float16, torch.device("cpu"), requires_grad, channels_last))
    form = torch.channels_last if channels_last else torch.contiguous_format
    for parameter in module.parameters():
        assert parameter.dtype == torch.float16 and parameter.requires_grad == requires_grad
    assert module.weight.is_contiguous(memory_format=form)
    assert torch.equal(module.weight.double(), affine.weights()[0])


# -- layers that pick channels, and layers that move values in space ---------------------------------------------------

SELECTIONS = [
    (ChannelSlice(1, 2), [1, 2]), (ChannelSlice(0, 5), [0, 1, 2, 3, 4]), (ChannelSlice(4, 2), [4, 5]),
    (ChannelPad(1, 2), [-1, 0, 1, 2, 3, 4, 5, -1, -1]), (ChannelPad(0, 1), [0, 1, 2, 3, 4, 5, -1]),
    (nn.ChannelShuffle(2), [0, 3, 1, 4, 2, 5]), (nn.ChannelShuffle(3), [0, 2, 4, 1, 3, 5]),
]  # fmt: skip


@pytest.mark.parametrize(("index", "dims"), [(i, d) for i in range(7) for d in range(4) if d or i < 5])
def test_selections(index: int, dims: int) -> None:
    module, rows = copy.deepcopy(SELECTIONS[index])
    if not dims:
        module.axis = -1
    x = signal(0, 6, *[3] * dims)
    assert_reads(module, x, dims)
    assert dims_of(node_of(module, x)) == dims
    affine = affine_of(node_of(module, x), dims, 6)
    assert affine.weights()[0].flatten(1).tolist() == [[float(i == row) for i in range(6)] for row in rows]
    assert (affine.in_channels, affine.out_channels, affine.has_bias) == (6, len(rows), False)


def test_selections_from_another_axis_are_refused() -> None:
    x = signal(0, 4, 4)
    reason = "_0 picks from another axis than the channels"
    for module in (ChannelSlice(0, 2, axis=-1), ChannelPad(0, 2, axis=-1)):
        assert refusal(nn.Sequential(module), x, 1) == "_0 has 0 spatial dimensions among layers of 1"
        assert refusal(nn.Sequential(nn.Linear(4, 4), module), None, 1).endswith(
            "picks from another axis than the channels"
        )
    for module in (ChannelSlice(0, 2), ChannelPad(0, 2), nn.ChannelShuffle(2)):
        assert refusal(nn.Sequential(module), x, 0) == "_0 has 1 spatial dimensions among layers of 0"
        with pytest.raises(InexactError, match=f"^{reason}$"):
            affine_of(node_of(nn.Sequential(module), None), 0, 4)
    for module in (ChannelSlice(0, 2), ChannelPad(0, 2), nn.ChannelShuffle(2)):
        assert refusal(nn.Sequential(module), None, 2) == "the number of channels at _0 is unknown: pass example_inputs"
    assert affine_of(node_of(nn.Sequential(nn.Linear(4, 6), ChannelSlice(1, 2, axis=-1)), None), 0).in_channels == 6
    tokens = nn.Sequential(nn.Linear(4, 4), ChannelSlice(1, 2, axis=-1))
    x = signal(0, 3, 4)
    assert torch.equal(run_affine(affine_of(node_of(tokens, x), 0), x), tokens[1](x))


PADS = {"Zero": "zeros", "Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}


@pytest.mark.parametrize("stem", PADS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pads(stem: str, dims: int) -> None:
    widths = tuple((0, 2, 1, 1, 3, 0)[: 2 * dims])
    module = getattr(nn, f"{stem}Pad{dims}d")(widths)
    x = signal(0, 3, *(4 + i for i in range(dims)))
    assert_reads(module, x, dims)
    affine = read(module, x, dims)
    assert affine.grid.mode == PADS[stem] and not affine.diagonal and not affine.grid.samples
    assert is_linear(node_of(module, x)) and dims_of(node_of(module, x)) == dims
    cropping = getattr(nn, f"{stem}Pad{dims}d")((-1, 1) * dims)
    if stem == "Zero":
        assert_reads(cropping, x, dims)
    else:
        assert refusal(cropping, x, dims) == f"{PADS[stem]} padding of negative width crops"


@pytest.mark.parametrize("stem", PADS)
@pytest.mark.parametrize("widths", [(0, 1), (2, 0), (1, 1), (-1, 1), (-2, -1)])
def test_pads_become_part_of_the_layer_behind_them(stem: str, widths: tuple[int, int]) -> None:
    if min(widths) < 0 and stem != "Zero":
        return  # torch has no such layer
    pad, x = getattr(nn, f"{stem}Pad1d")(widths).double(), signal(0, 2, 9)
    for behind in (layer(2, 3, [axis_of(3, 2)], seed=5), layer(2, 3, [axis_of(2, 1)], seed=5)):
        assert torch.equal(emitted(compose(map_of(behind), read(pad, x, 1)))(x), behind(pad(x)))
    padded = layer(2, 3, [axis_of(3, 2, p=1)], seed=5)
    if stem == "Zero" and min(widths) >= 0:
        assert torch.equal(emitted(compose(map_of(padded), read(pad, x, 1)))(x), padded(pad(x)))
    else:
        with pytest.raises(InexactError, match="has already padded"):
            compose(map_of(padded), read(pad, x, 1))


def test_a_pad_behind_a_layer_commutes_where_its_padding_does() -> None:
    x = signal(0, 2, 7)
    free, biased = (layer(2, 2, [axis_of(1, 2)], bias=bias, seed=3) for bias in (False, True))
    zero, edge = nn.ZeroPad1d((1, 2)).double(), nn.ReplicationPad1d((1, 2)).double()
    assert torch.equal(run_affine(compose(read(zero, x, 1), map_of(free)), x), zero(free(x)))
    with pytest.raises(InexactError, match="would see 0 where the inner bias should stand"):
        compose(read(zero, x, 1), map_of(biased))
    with pytest.raises(InexactError, match="replicate padding does not commute with a stride"):
        compose(read(edge, x, 1), map_of(free))
    plain = layer(2, 2, [axis_of(1)], seed=3)
    assert torch.equal(run_affine(compose(read(edge, x, 1), map_of(plain)), x), edge(plain(x)))


def test_cropped_maps_are_not_padded_again() -> None:
    cropped = from_tensors(torch.ones(1, 1, 1).double(), None, Grid((Axis(before=-1),)))
    with pytest.raises(InexactError, match="has already padded"):
        compose(map_of(layer(1, 1, [axis_of(3, p=1)])), cropped)


@pytest.mark.parametrize("size", range(4, 14))
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 3, 0), (2, 1, 0)])
def test_pools_with_ceil_mode_are_maps_where_nothing_hangs_over(
    size: int, kernel: int, stride: int, padding: int
) -> None:
    module = nn.AvgPool1d(kernel, stride, padding, ceil_mode=True)
    x = signal(0, 3, size)
    node, plain = node_of(module, x), nn.AvgPool1d(kernel, stride, padding).double()
    fits = torch.equal(module(x), plain(x)) if module(x).shape == plain(x).shape else False
    assert size_dependent(node) == (stride > 1)
    if fits:
        assert_reads(module, x, 1, tolerance=1e-14)
    else:
        assert (
            refusal(module, x, 1) == "an average pool with ceil_mode has another divisor where it hangs over the border"
        )
    assert fits == ((size + 2 * padding - kernel) % stride == 0) or stride == 1


def test_pools_with_ceil_mode_need_sizes() -> None:
    assert "hangs over the border" in refusal(
        nn.Sequential(nn.Conv1d(3, 3, 1), nn.AvgPool1d(2, ceil_mode=True)), None, 1
    )


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 5, 6, 12])
def test_pools_to_a_given_size(wanted: int) -> None:
    module, x = nn.AdaptiveAvgPool2d((wanted, None)), signal(0, 3, 12, 5)
    node = node_of(module, x)
    assert is_linear(node) == (12 % wanted == 0)
    if 12 % wanted:
        assert refusal(module, x, 2).endswith("is not a linear layer")
    else:
        assert_reads(module, x, 2, tolerance=1e-14)
        assert size_dependent(node)
    assert not is_linear(node_of(module, None)) and dims_of(node) == 2


def test_the_pool_to_one_position_is_no_convolution() -> None:
    assert not is_linear(node_of(nn.AdaptiveAvgPool2d(1), signal(0, 3, 4, 4)))
    assert is_linear(node_of(nn.AdaptiveAvgPool2d(1), signal(0, 3, 1, 1)))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_a_pixel_unshuffle_is_a_strided_convolution(factor: int) -> None:
    module, x = nn.PixelUnshuffle(factor), signal(0, 3, 12, 6)
    assert_reads(module, x, 2)
    node = node_of(module, x)
    assert affine_of(node, 2).groups == 3 and not size_dependent(node)
    assert "unknown" in refusal(module, None, 2)


@pytest.mark.parametrize(
    "module", [nn.MaxPool2d(1, 2), nn.MaxPool2d(1), nn.AvgPool2d(1, 2), nn.AvgPool2d(1, 1)], ids=str
)
def test_pools_of_one_position(module: nn.Module) -> None:
    x = signal(0, 3, 5, 4)
    assert_reads(module, x, 2)
    assert read(module, x, 2).grid.samples and not size_dependent(node_of(module, x))
    assert not is_linear(node_of(nn.MaxPool2d((1, 2)), x))
    indices = fx.symbolic_trace(nn.Sequential(nn.MaxPool2d(1, return_indices=True)))
    assert not is_linear([node for node in indices.graph.nodes if node.op == "call_module"][0])
