"""The tiny networks all tests share: each one block type behind a stem, in ``NETS`` under a name.

>>> model, x = build("basic_identity", seed=0)      # hostile statistics, float64, eval mode, signed input
>>> model, x = build_dyadic("basic_identity", seed=0)  # float64 arithmetic on it is exact
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmfx.hostile import BATCH_NORMS, NORMS, WEIGHTED, randomise

CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BNS: dict[int, type[nn.Module]] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def conv(
    c_in: int, c_out: int, k: int = 3, stride: int = 1, *, groups: int = 1, dilation: int = 1, bias: bool = False,
    dim: int = 2,
) -> nn.Module:  # fmt: skip
    """A size-keeping convolution in ``dim`` dimensions; a linear layer for 0."""
    if dim == 0:
        return nn.Linear(c_in, c_out, bias=bias)
    return CONVS[dim](c_in, c_out, k, stride, dilation * (k // 2), dilation, groups, bias)


def cbn(
    c_in: int, c_out: int, k: int = 3, stride: int = 1, *, groups: int = 1, dilation: int = 1, dim: int = 2
) -> nn.Sequential:
    """Convolution and batch norm."""
    body = conv(c_in, c_out, k, stride, groups=groups, dilation=dilation, dim=dim)
    return nn.Sequential(body, BNS[dim](c_out))


def cbr(c_in: int, c_out: int, k: int = 3, stride: int = 1, *, groups: int = 1, dim: int = 2) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(*cbn(c_in, c_out, k, stride, groups=groups, dim=dim), nn.ReLU())


class Residual(nn.Module):
    """``act(branch(x) + shortcut(x))``."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut or nn.Identity()
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + self.shortcut(x))


class Sum(nn.Module):
    """``act(first(x) + second(x) + ...)``."""

    def __init__(self, *branches: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            total = total + branch(x)
        return self.act(total)


class Scaled(nn.Module):
    """``relu(x + 0.25 * branch(x))``; 0.25 keeps the dyadic oracle exact."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + 0.25 * self.branch(x))


class Subtracted(nn.Module):
    """``relu(x - branch(x))``."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x - self.branch(x))


class PreActivation(nn.Module):
    """``x + conv(relu(bn(conv(relu(bn(x))))))``."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c), conv(c, c)
        self.bn2, self.conv2 = nn.BatchNorm2d(c), conv(c, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(torch.relu(self.bn2(y)))


class Dirac(nn.Module):
    """DiracNet: ``relu(bn(conv(x) + a * x))`` with a per-channel ``a`` (0.5 here)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(c, c, bias=True), nn.BatchNorm2d(c)
        self.register_buffer("scale", torch.full((c, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x) + self.scale * x))


def basic(c: int = 6, c_out: int | None = None, stride: int = 1, *, dim: int = 2) -> nn.Module:
    """ResNet's basic block; a 1x1 projection where the shape changes."""
    c_out = c_out or c
    branch = nn.Sequential(cbr(c, c_out, 3, stride, dim=dim), cbn(c_out, c_out, dim=dim))
    return Residual(branch, None if (c, stride) == (c_out, 1) else cbn(c, c_out, 1, stride, dim=dim))


def bottleneck(strides: tuple[int, int, int], groups: int = 1, c: int = 8, c_out: int = 12) -> nn.Module:
    """ResNet's (or ResNeXt's) bottleneck with the stride on one of its convs."""
    s1, s2, s3 = strides
    branch = nn.Sequential(cbr(c, 4, 1, s1), cbr(4, 4, 3, s2, groups=groups), cbn(4, c_out, 1, s3))
    stride = s1 * s2 * s3
    return Residual(branch, None if (c, stride) == (c_out, 1) else cbn(c, c_out, 1, stride))


def inverted(c: int = 4, expand: int = 12, act: type[nn.Module] = nn.ReLU6) -> nn.Module:
    """MobileNetV2's block with a linear output: the stream is signed."""
    first = nn.Sequential(*cbn(c, expand, 1), act())
    middle = nn.Sequential(*cbn(expand, expand, groups=expand), act())
    return Residual(nn.Sequential(first, middle, cbn(expand, c, 1)), act=nn.Identity())


def plain_branch(c: int = 6, k: int = 3, dilation: int = 1) -> nn.Sequential:
    """conv-ReLU-conv with biases and no norm."""
    return nn.Sequential(
        conv(c, c + 2, k, dilation=dilation, bias=True), nn.ReLU(), conv(c + 2, c, k, dilation=dilation, bias=True)
    )


def acnet(c: int = 6) -> nn.Module:
    """ACNet: 3x3, 1x3 and 3x1 in parallel, each with BN."""
    wide = nn.Sequential(nn.Conv2d(c, c, (1, 3), padding=(0, 1), bias=False), nn.BatchNorm2d(c))
    tall = nn.Sequential(nn.Conv2d(c, c, (3, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(c))
    return Sum(cbn(c, c), wide, tall)


def dbb(c: int = 6) -> nn.Module:
    """Diverse-branch-like: 3x3, 1x1, 1x1 under 3x3, and 1x1 under an average pool, each with BN."""
    composed = nn.Sequential(conv(c, c, 1), cbn(c, c))
    pooled = nn.Sequential(conv(c, c, 1), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(c))
    return Sum(cbn(c, c), cbn(c, c, 1), composed, pooled)


def mobileone(c: int = 6) -> nn.Module:
    """MobileOne-like: a depthwise stage and a pointwise stage, each a sum of two conv-BN and a BN."""
    depthwise = Sum(nn.BatchNorm2d(c), cbn(c, c, 1, groups=c), cbn(c, c, groups=c), cbn(c, c, groups=c))
    return nn.Sequential(depthwise, Sum(nn.BatchNorm2d(c), cbn(c, c, 1), cbn(c, c, 1)))


def nested() -> nn.Module:
    """A residual block inside the branch of another."""
    return Residual(nn.Sequential(cbr(6, 6), basic(), cbn(6, 6)))


@dataclass(frozen=True)
class Net:
    """How to build one network, the input shape it takes, and what is known about it.

    Attributes:
        build: makes the network with fresh weights.
        shape: of one input, ``[N, C, *sizes]``.
        sums: how many residual or parallel sums ``rmfx.convert`` finds in it, all removable.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 8, 8)
    sums: int = 1


def behind_stem(block: Callable[[], nn.Module], c: int, dim: int = 2) -> Callable[[], nn.Module]:
    """The network ``stem (conv-BN-ReLU, 3 -> c channels), block``: the block sees values in [0, inf)."""
    return lambda: nn.Sequential(cbr(3, c, dim=dim), block())


def behind_linear_stem(block: Callable[[], nn.Module], c: int) -> Callable[[], nn.Module]:
    """The network ``conv-BN, block``: the block sees signed values."""
    return lambda: nn.Sequential(cbn(3, c), block())


NETS: dict[str, Net] = {
    "basic_identity": Net(behind_stem(basic, 6)),
    "basic_projection": Net(behind_stem(lambda: basic(6, 10, 2), 6)),
    "basic_signed": Net(behind_linear_stem(basic, 6)),
    "basic_chain": Net(behind_stem(lambda: nn.Sequential(basic(), basic(6, 8, 2), basic(8)), 6), sums=3),
    "basic_1d": Net(behind_stem(lambda: basic(dim=1), 6, 1), (2, 3, 11)),
    "basic_1d_projection": Net(behind_stem(lambda: basic(6, 8, 2, dim=1), 6, 1), (2, 3, 11)),
    "basic_3d": Net(behind_stem(lambda: basic(dim=3), 6, 3), (2, 3, 5, 4, 6)),
    "mlp": Net(behind_stem(lambda: basic(dim=0), 6, 0), (16, 3)),
    "bottleneck_identity": Net(behind_stem(lambda: bottleneck((1, 1, 1), c_out=8), 8)),
    "bottleneck_stride_1": Net(behind_stem(lambda: bottleneck((2, 1, 1)), 8)),
    "bottleneck_stride_2": Net(behind_stem(lambda: bottleneck((1, 2, 1)), 8)),
    "bottleneck_stride_3": Net(behind_stem(lambda: bottleneck((1, 1, 2)), 8)),
    "resnext": Net(behind_stem(lambda: bottleneck((1, 1, 1), groups=2, c_out=8), 8)),
    "resnext_projection": Net(behind_stem(lambda: bottleneck((1, 2, 1), groups=2), 8)),
    "inverted_relu6": Net(behind_linear_stem(inverted, 4)),
    "inverted_relu": Net(behind_linear_stem(lambda: inverted(act=nn.ReLU), 4)),
    "inverted_hardswish": Net(behind_linear_stem(lambda: inverted(act=nn.Hardswish), 4)),
    "biased": Net(behind_stem(lambda: Residual(plain_branch()), 6)),
    "dilated": Net(behind_stem(lambda: Residual(plain_branch(dilation=2)), 6)),
    "kernel_5": Net(behind_stem(lambda: Residual(plain_branch(k=5)), 6)),
    "scaled": Net(behind_stem(lambda: Scaled(plain_branch()), 6)),
    "subtracted": Net(behind_stem(lambda: Subtracted(plain_branch()), 6)),
    "nested": Net(behind_stem(nested, 6), sums=2),
    "two_branches": Net(behind_stem(lambda: Sum(plain_branch(), plain_branch()), 6)),
    "three_way": Net(behind_stem(lambda: Sum(plain_branch(), nn.Identity(), cbn(6, 6, 1)), 6), sums=2),
    "pre_activation": Net(behind_linear_stem(lambda: PreActivation(4), 4)),
    "repvgg": Net(behind_stem(lambda: Sum(cbn(6, 6), cbn(6, 6, 1), nn.BatchNorm2d(6)), 6), sums=2),
    "repvgg_strided": Net(behind_stem(lambda: Sum(cbn(6, 8, 3, 2), cbn(6, 8, 1, 2)), 6)),
    "acnet": Net(behind_stem(acnet, 6), sums=2),
    "diracnet": Net(behind_stem(lambda: Dirac(6), 6)),
    "dbb": Net(behind_stem(dbb, 6), sums=3),
    "mobileone": Net(behind_stem(mobileone, 6), sums=5),
}

# Float64 arithmetic is exact on all of these with dyadic weights; a Hardswish divides by 6, the pool of "dbb" by 9.
DYADIC = tuple(name for name in NETS if name not in ("inverted_hardswish", "dbb"))


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The network in float64 with hostile statistics, and one input with values well beyond +-6."""
    net = NETS[name]
    torch.manual_seed(seed)
    x = torch.randn(net.shape, dtype=torch.float64)
    return randomise(net.build().double(), x, seed), x * 8


def build_dyadic(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The network in float64 with :func:`dyadic` weights, and an integer input between -16 and 16."""
    net = NETS[name]
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-16, 17, net.shape, generator=random, dtype=torch.float64)
    return dyadic(net.build().double(), seed), x


DYADIC_EPS = 2.0**-10


@torch.no_grad()
def dyadic(model: nn.Module, seed: int = 0) -> nn.Module:
    """Integer conv weights and dyadic norm statistics, in place, eval mode: float64 arithmetic becomes exact.

    Batch norms get ``eps = 2**-10`` and ``var + eps`` exactly 1/4, 1, 4 or 16, whose roots are powers of two, so
    a converted network of convs, sums, poolings over 2**n cells and piecewise-linear activations with dyadic slopes
    must be ``torch.equal`` to the original on integer inputs: no sum or product is ever rounded.
    """
    random = torch.Generator().manual_seed(seed)

    def integers(like: Tensor, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, like.shape, generator=random).to(like.dtype)

    for module in model.eval().modules():
        if isinstance(module, WEIGHTED):
            module.weight.copy_(integers(module.weight, -2, 2))
            if module.bias is not None:
                module.bias.copy_(integers(module.bias, -8, 8))
        elif isinstance(module, BATCH_NORMS):
            module.eps = DYADIC_EPS
            module.running_var.copy_(4.0 ** integers(module.running_var, -1, 2) - DYADIC_EPS)
            module.running_mean.copy_(integers(module.running_mean, -16, 16) / 4)
            module.weight.copy_((2.0 ** integers(module.weight, -1, 1)) * (2 * integers(module.weight, 0, 1) - 1))
            module.bias.copy_(integers(module.bias, -16, 16) / 4)
        elif isinstance(module, nn.PReLU):
            module.weight.copy_(integers(module.weight, -1, 2) / 4)
        elif isinstance(module, nn.LeakyReLU):
            module.negative_slope = 0.25
        elif isinstance(module, NORMS):
            raise AssertionError(f"no dyadic statistics for {type(module).__name__}")
    return model
