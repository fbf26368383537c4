"""One spelling per operation, one call site per layer: what becomes which layer, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from front import Lambda, assert_exact, bn, conv, hostile, image, layer, normal_form, operations
from oracle import FLOAT64_TOLERANCE, relative_difference
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth, stochastic_depth

import rmfx
from rmfx.errors import NormalFormError
from rmfx.front.trace import trace
from rmfx.passes.normalise import normalise

# -- functions and methods that are layers ----------------------------------------------------------------------------

ACTIVATIONS: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (F.relu, "ReLU()"),
    (torch.relu, "ReLU()"),
    (lambda x: x.relu(), "ReLU()"),
    (lambda x: F.relu(input=x), "ReLU()"),
    (F.relu6, "ReLU6()"),
    (lambda x: F.hardtanh(x, -2.0, 3.0), "Hardtanh(min_val=-2.0, max_val=3.0)"),
    (lambda x: F.hardtanh(x, max_val=6.0, min_val=0.0), "ReLU6()"),
    (lambda x: x.clamp(min=0), "ReLU()"),
    (lambda x: torch.clamp(x, 0.0, 6.0), "ReLU6()"),
    (lambda x: x.clip(-1, 2), "Hardtanh(min_val=-1, max_val=2)"),
    (lambda x: x.clamp(max=3.0), "Hardtanh(min_val=-inf, max_val=3.0)"),
    (lambda x: x.clamp_min(-3), "Hardtanh(min_val=-3, max_val=inf)"),
    (lambda x: x.clamp_max(0.0), "Hardtanh(min_val=-inf, max_val=0.0)"),
    (lambda x: F.leaky_relu(x, 0.2), "LeakyReLU(negative_slope=0.2)"),
    (lambda x: F.elu(x, alpha=0.5), "ELU(alpha=0.5)"),
    (F.selu, "SELU()"),
    (lambda x: F.celu(x, 0.5), "CELU(alpha=0.5)"),
    (F.gelu, "GELU(approximate='none')"),
    (lambda x: F.gelu(x, approximate="tanh"), "GELU(approximate='tanh')"),
    (F.silu, "SiLU()"),
    (F.mish, "Mish()"),
    (F.hardswish, "Hardswish()"),
    (F.hardsigmoid, "Hardsigmoid()"),
    (torch.sigmoid, "Sigmoid()"),
    (F.sigmoid, "Sigmoid()"),
    (lambda x: x.tanh(), "Tanh()"),
    (lambda x: F.softplus(x, beta=2, threshold=5), "Softplus(beta=2, threshold=5)"),
    (F.softsign, "Softsign()"),
    (F.tanhshrink, "Tanhshrink()"),
    (lambda x: F.hardshrink(x, 1.5), "Hardshrink(1.5)"),
    (lambda x: F.softshrink(x, 1.5), "Softshrink(1.5)"),
    (F.logsigmoid, "LogSigmoid()"),
    (torch.sin, "Elementwise(sin)"),
    (lambda x: x.abs(), "Elementwise(abs)"),
    (lambda x: x**3, "Elementwise(pow, 3)"),
    (lambda x: torch.pow(x, exponent=4), "Elementwise(pow, 4)"),
    (lambda x: x * x, "Elementwise(square)"),
    (lambda x: F.threshold(x, 0.5, -1.0), "Threshold(threshold=0.5, value=-1.0)"),
    (lambda x: F.max_pool2d(x, 3, 2, 1), "MaxPool2d(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False)"),
    (lambda x: F.avg_pool2d(x, (2, 3), ceil_mode=True), "AvgPool2d(kernel_size=(2, 3), stride=(2, 3), padding=0)"),
    (lambda x: F.adaptive_avg_pool2d(x, 1), "AdaptiveAvgPool2d(output_size=1)"),
    (lambda x: F.adaptive_avg_pool2d(x, (3, None)), "AdaptiveAvgPool2d(output_size=(3, None))"),
    (lambda x: F.adaptive_max_pool2d(x, [2, 3]), "AdaptiveMaxPool2d(output_size=(2, 3))"),
    (lambda x: torch.flatten(x, 1), "Flatten(start_dim=1, end_dim=-1)"),
    (lambda x: x.flatten(2, 3), "Flatten(start_dim=2, end_dim=3)"),
    (lambda x: x.view(x.size(0), -1), "Flatten(start_dim=1, end_dim=-1)"),
    (lambda x: x.reshape(x.shape[0], -1), "Flatten(start_dim=1, end_dim=-1)"),
    (lambda x: torch.reshape(x, (x.size()[0], -1)), "Flatten(start_dim=1, end_dim=-1)"),
    (lambda x: F.interpolate(x, scale_factor=2), "Upsample(scale_factor=2.0, mode='nearest')"),
    (lambda x: F.interpolate(x, size=(9, 9), mode="bilinear"), "Upsample(size=(9, 9), mode='bilinear')"),
    (lambda x: F.pixel_shuffle(x, 2), "PixelShuffle(upscale_factor=2)"),
    (lambda x: F.channel_shuffle(x, 2), "ChannelShuffle(groups=2)"),
]


@pytest.mark.parametrize(("function", "shown"), ACTIVATIONS, ids=[shown for _, shown in ACTIVATIONS])
def test_functions_become_layers(function: Callable[[Tensor], Tensor], shown: str) -> None:
    gm = assert_exact(Lambda(lambda m, x: function(m.conv(x)), conv=conv()), image())
    assert len(operations(gm)) == 2
    made = [module for name, module in gm.named_children() if name != "conv"]
    assert [repr(module) for module in made] == [shown]


ONE_AND_THREE: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...], str]] = [
    (lambda x: F.max_pool1d(x, 2), (2, 4, 9), "MaxPool1d"),
    (lambda x: F.max_pool3d(x, 2, 1), (2, 4, 5, 3, 4), "MaxPool3d"),
    (lambda x: F.avg_pool1d(x, 3, 2, 1), (2, 4, 9), "AvgPool1d"),
    (lambda x: F.avg_pool3d(x, 2, divisor_override=5), (2, 4, 5, 3, 4), "AvgPool3d"),
    (lambda x: F.adaptive_avg_pool1d(x, 2), (2, 4, 9), "AdaptiveAvgPool1d"),
    (lambda x: F.adaptive_avg_pool3d(x, 2), (2, 4, 5, 3, 4), "AdaptiveAvgPool3d"),
    (lambda x: F.adaptive_max_pool1d(x, 2), (2, 4, 9), "AdaptiveMaxPool1d"),
]


@pytest.mark.parametrize(("function", "shape", "name"), ONE_AND_THREE, ids=[name for *_, name in ONE_AND_THREE])
def test_pools_of_other_dimensions(function: Any, shape: tuple[int, ...], name: str) -> None:
    assert operations(assert_exact(Lambda(lambda m, x: function(x)), hostile(*shape))) == [name]


def test_prelu_keeps_its_parameter() -> None:
    model = Lambda(lambda m, x: F.prelu(x, m.slope), slope=nn.Parameter(torch.tensor([0.1, -2.0, 0.0, 1.5])))
    gm = assert_exact(model, image())
    assert layer(gm, nn.PReLU).weight is model.slope


def _stays(function: Callable[[Lambda, Tensor], Any], *inputs: Tensor, **layers: Any) -> list[str]:
    return operations(assert_exact(Lambda(function, **layers), *(inputs or (image(),))))


def test_what_is_no_such_layer_stays() -> None:
    assert _stays(lambda m, x: F.max_pool2d(x, 2, return_indices=True)) == ["max_pool2d_with_indices"]
    assert _stays(lambda m, x: x.clamp(3, -3)) == ["clamp"]
    assert _stays(lambda m, x: x.clamp(x.mean(), None)) == ["mean", "clamp"]
    assert _stays(lambda m, x: x.view(-1, 35)) == ["reshape"]
    assert _stays(lambda m, x: x.view(x.size(1), -1)) == ["size", "reshape"]
    assert _stays(lambda m, x: F.softmax(x, 1)) == ["softmax"]
    assert _stays(lambda m, x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)) == ["interpolate"]
    assert _stays(lambda m, x: F.prelu(x, x.mean().view(1))) == ["mean", "reshape", "prelu"]
    assert _stays(lambda m, x: F.conv2d(x, x[:, :, :1, :1].mean(0, True))) == ["getitem", "mean", "conv2d"]


# -- convolutions, linear layers, norms -------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"stride": 2, "padding": 1, "groups": 2}, {"padding": "same", "dilation": 2}, {"padding": "valid"}],
    ids=str,
)
def test_functional_convolutions(dims: int, bias: bool, arguments: dict[str, Any]) -> None:
    function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    weight = nn.Parameter(torch.randn(6, 4 // arguments.get("groups", 1), *(3,) * dims))
    layers = {"weight": weight, "bias": nn.Parameter(torch.randn(6)) if bias else None}
    model = Lambda(lambda m, x: function(x, m.weight, m.bias, **arguments), **layers)
    gm = assert_exact(model, hostile(2, 4, *(7, 6, 5)[:dims]))
    made = layer(gm, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1])
    assert operations(gm) == [f"Conv{dims}d"]
    assert made.weight is model.weight and made.bias is model.bias
    assert [name for name, _ in gm.named_parameters()] == [f"conv{dims}d.weight", f"conv{dims}d.bias"][: 1 + bias]


def test_stride_and_padding_of_every_form() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        x = torch.conv2d(x, m.weight, None, (1, 2), [1, 0])
        return F.conv2d(x, weight=m.weight, bias=m.bias, stride=[2], padding=(1,))

    model = Lambda(forward, weight=nn.Parameter(torch.randn(4, 4, 3, 2)), bias=torch.randn(4))
    gm = assert_exact(model, image())
    assert operations(gm) == ["Conv2d", "Conv2d"]
    assert not gm.get_parameter("conv2d_1.bias").requires_grad  # it was a buffer


def test_functional_linear() -> None:
    model = Lambda(lambda m, x: F.linear(x, m.w) + F.linear(x, m.w, m.b), w=nn.Parameter(torch.randn(3, 5)), b=None)
    model.b = nn.Parameter(torch.randn(3))
    gm = assert_exact(model, image())
    assert operations(gm) == ["Linear", "Linear", "add"]


class Norm(nn.Module):
    """``F.batch_norm`` on buffers of its own, with or without weight and bias."""

    def __init__(self, channels: int, weight: bool, bias: bool) -> None:
        super().__init__()
        norm = bn(channels)
        self.mean, self.var = nn.Buffer(norm.running_mean), nn.Buffer(norm.running_var)
        self.weight = norm.weight if weight else None
        self.bias = norm.bias if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, eps=0.03)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_functional_batch_norms(dims: int, weight: bool, bias: bool) -> None:
    producer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 6, 3)
    model = nn.Sequential(producer, nn.ReLU(), Norm(6, weight, bias))
    gm = assert_exact(model, hostile(2, 4, *(7, 6, 5)[:dims]))
    assert operations(gm)[-1] == f"BatchNorm{dims}d"
    made = layer(gm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1])
    assert made.affine == (weight or bias) and made.eps == 0.03


def test_the_rank_comes_from_readers_too() -> None:
    gm = assert_exact(nn.Sequential(Norm(4, True, True), nn.ReLU(), conv()), image())
    assert operations(gm) == ["BatchNorm2d", "ReLU", "Conv2d"]


def test_batch_norms_that_stay() -> None:
    assert operations(assert_exact(Norm(4, True, True), image())) == ["batch_norm"]  # which rank?
    batch = Lambda(lambda m, x: F.batch_norm(m.conv(x), None, None, training=True), conv=conv())
    assert operations(assert_exact(batch, image())) == ["Conv2d", "batch_norm"]
    unlearned = nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False))
    assert operations(assert_exact(unlearned, image())) == ["Conv2d", "BatchNorm2d"]


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_synchronised_batch_norms_are_ordinary_ones(dims: int) -> None:
    producer = nn.Linear(4, 6) if dims == 0 else (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 6, 3)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(producer, bn(6)))
    x = hostile(2, 4, *(7, 6, 5)[:dims])
    gm = normalise(trace(model.double().eval()), inputs=(x,))
    assert operations(gm) == [type(producer).__name__, f"BatchNorm{max(dims, 1)}d"]
    assert torch.equal(gm(x), model(x)) and type(model[1]) is nn.SyncBatchNorm
    assert layer(gm, type(gm.get_submodule("1"))).weight is model[1].weight


def test_a_synchronised_batch_norm_stays_where_its_rank_is_not_known() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(bn(4)))
    assert operations(assert_exact(model, image())) == ["SyncBatchNorm"]


@pytest.mark.parametrize("keep_bn", [False, True])
def test_residual_connections_around_synchronised_batch_norms_are_removed(keep_bn: bool) -> None:
    block = Lambda(lambda m, x: F.relu(x + m.b(m.second(F.relu(m.a(m.first(x)))))), first=conv(), second=conv())
    block.a, block.b = bn(4), bn(4)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(conv(), nn.ReLU(), block)).double().eval()
    converted = rmfx.convert(model, image(), keep_bn=keep_bn)
    assert rmfx.report(converted).count("removed") == 1
    assert relative_difference(model(image()), converted(image())) <= FLOAT64_TOLERANCE


def test_the_builtin_batch_norm() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        norm = m.norm
        arguments = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return torch.batch_norm(m.conv(x), *arguments, False, 0.1, 1e-3, True)

    assert operations(assert_exact(Lambda(forward, conv=conv(), norm=bn(4)), image())) == ["Conv2d", "BatchNorm2d"]


def test_pads() -> None:
    def padded(widths: tuple[int, ...], value: float | None = None, mode: str = "constant") -> list[str]:
        model = Lambda(lambda m, x: F.pad(m.conv(x), widths, mode, value), conv=conv())
        return operations(assert_exact(model, image()))[1:]

    assert padded((1, 2, 0, 3)) == ["ZeroPad2d"]
    assert padded((1, 2)) == ["ZeroPad2d"]
    assert padded((1, 2, 0, 3), -1.5) == ["ConstantPad2d"]
    assert padded((0, 0, 0, 0, 1, 1)) == ["ChannelPad"]
    assert padded((0, 0, 0, 0, 0, 0)) == []
    assert padded((1, 0, 0, 0, 1, 1)) == ["pad"]  # channels and space at once
    assert padded((0, 0, 0, 0, 0, 0, 1, 1)) == ["pad"]  # adds images
    assert padded((-1, 1, 0, -2)) == ["ZeroPad2d"]  # cuts
    assert padded((-1, 0, 0, 0), 1.0) == ["pad"]
    assert padded((-1, 0, 0, 0), mode="circular") == ["pad"]
    assert padded((1, 2, 3, 0), mode="reflect") == ["ReflectionPad2d"]
    assert padded((1, 2, 3, 0), mode="replicate") == ["ReplicationPad2d"]
    assert padded((1, 2, 3, 0), mode="circular") == ["CircularPad2d"]
    assert _stays(lambda m, x: F.pad(x, (1, 1))) == ["pad"]  # of which rank?


def test_global_means() -> None:
    def pooled(function: Callable[[Tensor], Tensor]) -> list[str]:
        return operations(assert_exact(Lambda(lambda m, x: function(m.conv(x)), conv=conv()), image()))[1:]

    assert pooled(lambda x: x.mean((2, 3), keepdim=True)) == ["AdaptiveAvgPool2d"]
    assert pooled(lambda x: torch.mean(x, [-1, -2], True)) == ["AdaptiveAvgPool2d"]
    assert pooled(lambda x: x.mean((2, 3))) == ["mean"]
    assert pooled(lambda x: x.mean((1, 2), keepdim=True)) == ["mean"]


# -- constant expressions ---------------------------------------------------------------------------------------------


class Dirac(nn.Module):
    """DiracNet: the kernel is computed from parameters and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.alpha = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.rand(4))
        self.register_buffer("delta", nn.init.dirac_(torch.empty(4, 4, 3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.alpha.view(-1, 1, 1, 1) * F.normalize(self.weight.flatten(1)).view_as(self.weight)
        return F.conv2d(x, self.delta * self.alpha.view(self.alpha.size(0), 1, 1, 1) + scaled, padding=1)


def test_computed_kernels_become_weights() -> None:
    gm = assert_exact(nn.Sequential(conv(), Dirac()), image())
    assert operations(gm) == ["Conv2d", "Conv2d"]
    assert gm.get_parameter("1.conv2d.weight").requires_grad
    assert not list(gm.get_submodule("1").parameters(recurse=False))


def test_standardised_kernels_become_weights() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        weight = F.batch_norm(m.weight.reshape(1, 4, -1), None, None, training=True).reshape_as(m.weight)
        return F.conv2d(x, weight)

    gm = assert_exact(Lambda(forward, weight=nn.Parameter(torch.randn(4, 4, 3, 3))), image())
    assert operations(gm) == ["Conv2d"]


def test_constants_that_cannot_be_computed_name_the_line() -> None:
    model = Lambda(lambda m, x: x + m.a.view(3, 3), a=torch.rand(4)).eval()
    with pytest.raises(
        NormalFormError, match=r"view \(.*test_normalise.py:\d+\) cannot be computed from its constants"
    ):
        normal_form(model)


# -- what does nothing ------------------------------------------------------------------------------------------------


def test_what_does_nothing_goes_away() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        torch._assert(x.dim() == 4, "rank")
        torch._assert(x.shape[1] == 4, f"channels of {m}")
        x = m.layers(m.conv(x).clone())
        x = F.dropout(F.dropout2d(x, training=False), 0.3, False)
        x = torch.dropout(F.alpha_dropout(x, training=m.training), 0.5, False)
        return stochastic_depth(x, 0.5, "row", training=False)

    layers = nn.Sequential(
        nn.Identity(),
        nn.Dropout(),
        nn.Dropout2d(),
        nn.AlphaDropout(),
        nn.FeatureAlphaDropout(),
        StochasticDepth(0.5, "row"),
    )
    gm = assert_exact(Lambda(forward, conv=conv(), layers=layers, unused=conv()), image())
    assert [node.name for node in gm.graph.nodes] == ["x", "conv", "output"]
    assert [name for name, _ in gm.named_modules()] == ["", "conv"]


def test_dropout_that_drops_stays() -> None:
    gm = normal_form(Lambda(lambda m, x: F.dropout(x, 0.5)).eval())
    assert operations(gm) == ["dropout"]


def effect(x: Tensor) -> Tensor:
    """A function of the user, called for what it does and not for its result."""
    CALLED.append(x.shape)
    return x


CALLED: list[torch.Size] = []
fx.wrap("effect")


def test_functions_of_the_user_are_called_even_if_nobody_reads_the_result() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        effect(x)
        return m.conv(x)

    gm = normal_form(Lambda(forward, conv=conv()).eval())
    CALLED.clear()
    gm(image().float())
    assert operations(gm) == ["effect", "Conv2d"] and len(CALLED) == 1


# -- one call site per layer ------------------------------------------------------------------------------------------


def test_a_layer_called_twice_is_cloned_over_the_same_parameters() -> None:
    model = nn.Sequential(Lambda(lambda m, x: m.act(m.c(m.act(m.c(m.act(x))))), c=conv(), act=nn.PReLU()))
    gm = assert_exact(model, image())
    targets = [node.target for node in gm.graph.nodes if node.op == "call_module"]
    assert targets == ["0.act", "0.c", "0.act_1", "0.c_1", "0.act_2"]
    assert gm.get_submodule("0.c") is not gm.get_submodule("0.c_1")
    assert gm.get_parameter("0.c.weight") is gm.get_parameter("0.c_1.weight") is model[0].c.weight
    gm.get_submodule("0.c_1").register_forward_hook(lambda *args: None)
    assert not gm.get_submodule("0.c")._forward_hooks


def test_one_layer_under_two_names_and_two_layers_over_one_weight() -> None:
    model = Lambda(lambda m, x: m.c(m.b(m.a(x))), a=conv(), b=conv(), c=None)
    model.c, model.b.weight = model.a, model.a.weight
    gm = assert_exact(model, image())
    assert len({id(module) for module in gm.children()}) == 3
    assert len({id(parameter) for parameter in gm.parameters()}) == 3  # one weight, two biases


def test_names_are_those_of_the_model_and_never_collide() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        return F.relu(m.add(torch.relu(m.relu(x)))) + m.relu_1(x).half().double()

    model = nn.Sequential(Lambda(forward, relu=conv(), add=conv(), relu_1=conv()))
    gm = assert_exact(model, image())
    targets = [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]
    assert len(set(targets)) == len(targets) == 5
    assert {"0.relu", "0.add", "0.relu_1"} <= set(targets) and all(name.startswith("0.") for name in targets)
    for name, original in model.named_modules():
        if isinstance(original, nn.Conv2d):
            assert gm.get_submodule(name).weight is original.weight


def test_origin_and_place_are_stamped_on_every_node() -> None:
    model = nn.Sequential(conv(), Lambda(lambda m, x: torch.sub(x, m.c(x)), c=conv()))
    gm = assert_exact(model, image())
    assert all(node.meta["origin"] == node.name for node in gm.graph.nodes)
    places = {node.name: node.meta["place"] for node in gm.graph.nodes}
    assert places == {"input_1": "", "_0": "", "_1_c": "1", "sub_scale": "1", "sub": "1", "output": ""}


def test_normalising_twice_changes_nothing() -> None:
    gm = normal_form(nn.Sequential(Dirac(), conv(), nn.ReLU(), Dirac()).double().eval())
    before, tensors = str(gm.graph), list(gm.state_dict())
    normalise(gm)
    assert (str(gm.graph), list(gm.state_dict())) == (before, tensors)
