"""Recipes of residual blocks whose joins are sums."""

from __future__ import annotations

from benchmarks.random_networks.gates import gate
from benchmarks.random_networks.layers import (
    activation,
    any_conv,
    average,
    conv,
    conv_act,
    conv_norm,
    depthwise,
    norm,
    strided,
)
from benchmarks.random_networks.parts import branch, closing, joined, layer_scale, residual, shortcut, zero_channels
from benchmarks.random_networks.writer import Writer


def width_and_stride(w: Writer, x: str) -> tuple[int, int]:
    """Where a block leads."""
    same = w.chance(0.6)
    stride = w.r.choice([1, 1, 2, 2, 3]) if w.dims and not same and min(w.sizes(x)) > 4 else 1
    return w.channels(x) if same else w.some_channels(), stride


def residual_block(w: Writer, x: str) -> str:
    """Any branch, any shortcut."""
    c, stride = width_and_stride(w, x)
    return closing(w, residual(w, x, branch(w, x, c, stride, depth=1)))


def bottleneck(w: Writer, x: str) -> str:
    """1x1, 3x3 of a stride, 1x1."""
    c, stride = width_and_stride(w, x)
    v = conv_act(w, x, w.some_channels(), kernels=(1,))
    v = conv_act(w, v, w.some_channels(), stride)
    return closing(w, residual(w, x, conv_norm(w, v, c, kernels=(1,))))


def inverted(w: Writer, x: str) -> str:
    """Widen, depthwise, narrow; no activation behind the sum."""
    v = conv_act(w, x, w.channels(x) * 2, kernels=(1,))
    v = activation(w, norm(w, depthwise(w, v)))
    if w.chance(0.5):
        v = w.fit(lambda: gate(w, v), w.channels(v), w.sizes(v))
    return closing(w, joined(w, conv_norm(w, v, w.channels(x), kernels=(1,)), x), 0.2)


def depthwise_first(w: Writer, x: str) -> str:
    """A depthwise conv first, as in ConvNeXt with a batch norm, or a grouped one last."""
    v = norm(w, depthwise(w, x))
    v = conv_act(w, v, w.channels(x) * 2, kernels=(1,))
    v = conv(w, v, w.channels(x), kernels=(1, 3))
    return closing(w, joined(w, layer_scale(w, v) if w.chance(0.5) else v, x), 0.2)


def pre_activation(w: Writer, x: str) -> str:
    """Norm, activation, conv, twice; the shortcut starts before or behind the first activation."""
    c, stride = width_and_stride(w, x)
    first = activation(w, norm(w, x) if w.chance(0.8) else x)
    v = conv(w, first, w.some_channels(), stride)
    v = conv(w, activation(w, norm(w, v)), c)
    start = first if w.chance(0.3, "shortcut behind the pre-activation") else x
    return joined(w, v, shortcut(w, start, c, stride))


def pyramid(w: Writer, x: str) -> str:
    """PyramidNet: BN-conv-BN-ReLU-conv-BN and a shortcut padded with zero channels."""
    c = w.channels(x) + w.r.randint(1, 3)
    stride = w.r.choice([1, 2]) if w.dims and min(w.sizes(x)) > 4 else 1
    v = conv_act(w, norm(w, x), w.some_channels(), stride)
    v = norm(w, conv(w, v, c))
    if not w.dims:
        return joined(w, v, shortcut(w, x, c))
    sizes = w.sizes(v)
    s = w.fit(lambda: average(w, x, stride), None, sizes) if stride > 1 else x
    return joined(w, v, zero_channels(w, s, c))


def iresnet(w: Writer, x: str) -> str:
    """BN-conv-BN-PReLU-conv-BN."""
    c, stride = width_and_stride(w, x)
    v = norm(w, conv(w, norm(w, x), w.some_channels()))
    v = w.emit(f"$act({v})", act=f"nn.PReLU({w.shape(v)[1]})")
    return joined(w, norm(w, conv(w, v, c, stride)), shortcut(w, x, c, stride))


def gated(w: Writer, x: str) -> str:
    """A gate on the branch: inside, behind the last conv, behind the sum, or computed from before the fork."""
    v = branch(w, x, w.channels(x))
    sizes, c = w.sizes(x), w.channels(x)
    where = w.pick("branch", "outside", "by the fork", "sum", "identity")
    if where == "outside":
        w.features.add("gate from before the fork")
        fork = closing(w, joined(w, v, x))
        v = branch(w, fork, c)
        v = w.fit(lambda: w.pick(gate(w, v, x), joined(w, v, conv(w, x, c, kernels=(1,)))), c, sizes)
        return closing(w, joined(w, activation(w, v) if w.chance(0.5) else v, fork))
    if where == "by the fork":
        w.features.add("gate computed from the fork")
        return closing(w, joined(w, w.fit(lambda: gate(w, v, x), c, sizes), x))
    if where == "sum":
        total = joined(w, v, x)
        return closing(w, w.fit(lambda: gate(w, total), c, sizes))
    if where == "identity":
        w.features.add("gate on the fork itself")
        return closing(w, joined(w, x, w.fit(lambda: gate(w, x), c, sizes)))
    return closing(w, joined(w, w.fit(lambda: gate(w, v), c, sizes), x))


def three_way(w: Writer, x: str) -> str:
    """Three or four branches, each with its shortcut or without."""
    c, stride = width_and_stride(w, x)
    total = branch(w, x, c, stride)
    for _ in range(w.r.choice([2, 2, 3])):
        other = branch(w, x, c, stride, length=1) if w.chance(0.4) else shortcut(w, x, c, stride)
        total = joined(w, total, other)
    return closing(w, total)


def parallel(w: Writer, x: str) -> str:
    """Two nonlinear branches of unequal depth."""
    c, stride = width_and_stride(w, x)
    first = branch(w, x, c, stride, length=w.r.choice([1, 2, 3]))
    return closing(w, joined(w, first, branch(w, x, c, stride, length=w.r.choice([2, 3]))))


def nested(w: Writer, x: str) -> str:
    """A residual within a residual, at the start, the middle or the end of the branch."""
    v = x
    for _ in range(w.r.choice([1, 2])):
        v = conv_act(w, v, w.channels(x)) if w.chance(0.5) else v
        v = closing(w, residual(w, v, branch(w, v, w.channels(x))))
    v = conv_norm(w, v, w.channels(x)) if w.chance(0.6) else v
    return closing(w, joined(w, v, x))


def scaled(w: Writer, x: str) -> str:
    """Branch and shortcut each times a factor."""
    v = layer_scale(w, branch(w, x, w.channels(x)))
    return closing(w, joined(w, v, layer_scale(w, x) if w.chance(0.3) else x))


def repvgg(w: Writer, x: str) -> str:
    """Parallel linear branches, alone or inside of a residual branch."""
    c, stride = width_and_stride(w, x)
    total = norm(w, conv(w, x, c, stride, kernels=(3,)))
    total = joined(w, total, norm(w, conv(w, x, c, stride, kernels=(1,))))
    if stride == 1 and c == w.channels(x):
        total = joined(w, total, norm(w, x) if w.chance(0.7) else x)
    v = activation(w, total)
    return closing(w, residual(w, x, conv_norm(w, v, w.channels(x)))) if stride == 1 and w.chance(0.5) else v


def acnet(w: Writer, x: str) -> str:
    """Convs of different kernels in parallel, inside of a residual branch."""
    c = w.channels(x)
    kernels: tuple[str, ...] = ("3, padding=1", "5, padding=2", "1")
    if w.dims == 2:
        kernels = (*kernels, "(1, 3), padding=(0, 1)", "(3, 1), padding=(1, 0)")
    total = conv(w, x, c)
    for _ in range(2):
        made = f"nn.Conv{w.dims}d({c}, {c}, {w.pick(*kernels)})" if w.dims else f"nn.Linear({c}, {c})"
        total = joined(w, total, norm(w, w.emit(f"$conv({x})", conv=made)))
    v = conv_norm(w, activation(w, total), c)
    return closing(w, joined(w, v, x))


def pooled_branches(w: Writer, x: str) -> str:
    """A pool or an upsampling in both branches, or in one."""
    if not w.dims:
        return residual_block(w, x)
    dims, c = w.dims, w.channels(x)
    made = w.pick(
        *(f"nn.MaxPool{dims}d(3, 2, 1)", f"nn.MaxPool{dims}d(2)", f"nn.MaxPool{dims}d(3, 1, 1)"),
        *(f"nn.AvgPool{dims}d(2)", "nn.Upsample(scale_factor=2)", f"nn.AdaptiveAvgPool{dims}d(4)"),
        *(f"nn.MaxPool{dims}d(1, 2)", f"nn.AvgPool{dims}d(3, 1, 1)"),
    )
    if "Upsample" in made and max(w.sizes(x)) > 8:
        made = f"nn.MaxPool{dims}d(2)"
    w.features.add(f"{made[3:].split('(')[0]} in both branches")
    v = w.emit(f"$pool({branch(w, x, c)})", pool=made)
    s = w.emit(f"$pool({x})", pool=made)
    v = conv_norm(w, v, c) if w.chance(0.4) else v
    return closing(w, joined(w, v, s))


def down_and_up(w: Writer, x: str) -> str:
    """An hourglass: the branch pools, convolves and upsamples."""
    if not w.dims:
        return residual_block(w, x)
    w.features.add("upsampling in one branch")
    v = w.emit(f"$pool({x})", pool=w.pick(f"nn.MaxPool{w.dims}d(2)", f"nn.AvgPool{w.dims}d(2)"))
    v = conv_norm(w, v, w.channels(x))
    mode = w.pick("nearest", {1: "linear", 2: "bilinear", 3: "trilinear"}[w.dims])
    v = w.emit(f"F.interpolate({v}, size={x}.shape[2:], mode={mode!r})")
    return closing(w, joined(w, v, x))


def changing_sizes(w: Writer, x: str) -> str:
    """Paddings that shrink or grow the tensor inside, and are made up for by the last conv."""
    if not w.dims:
        return residual_block(w, x)
    c, stride = width_and_stride(w, x)
    v = x
    for index in range(w.r.choice([1, 1, 2])):
        kernel, padding = w.r.choice([1, 2, 3, 4, 5]), w.r.randint(0, 3)
        step = stride if index == 0 and w.chance(0.5) else 1
        made = f"nn.Conv{w.dims}d({w.channels(v)}, {w.some_channels()}, {kernel}, {step}, {padding})"
        v = activation(w, w.emit(f"$conv({v})", conv=made))
    wanted = strided(w.sizes(x), stride)
    v = any_conv(w, v, c, stride if max(w.sizes(v)) > max(wanted) + 5 else 1, wanted)
    return closing(w, residual(w, x, v))


def plain(w: Writer, x: str) -> str:
    """No residual connection at all."""
    c, stride = width_and_stride(w, x)
    return conv_act(w, x, c, stride)


def self_sum(w: Writer, x: str) -> str:
    """Sums of a tensor with itself, with constants, with a learned tensor."""
    v = conv_norm(w, x, w.channels(x))
    ones = ", 1" * w.dims
    shift = f"nn.Parameter(torch.randn({w.channels(x)}{ones}))"
    v = w.emit(w.pick(f"{v} + {v}", f"{v} + 1.5", f"2 - {v}", f"{v} + $shift", f"{x} + ({v} + 0.5)"), shift=shift)
    return closing(w, joined(w, v, x) if w.chance(0.5) else v)


RECIPES = {
    "residual": residual_block,
    "bottleneck": bottleneck,
    "inverted": inverted,
    "depthwise first": depthwise_first,
    "pre-activation": pre_activation,
    "pyramid": pyramid,
    "iresnet": iresnet,
    "gated": gated,
    "three-way": three_way,
    "parallel": parallel,
    "nested blocks": nested,
    "scaled": scaled,
    "repvgg": repvgg,
    "acnet": acnet,
    "pooled branches": pooled_branches,
    "hourglass": down_and_up,
    "changing sizes": changing_sizes,
    "plain": plain,
    "self-sum": self_sum,
}
