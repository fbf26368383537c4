"""What blocks are made of: branches, shortcuts, and the sums that join them."""

from __future__ import annotations

from functools import partial

from benchmarks.random_networks.gates import gate
from benchmarks.random_networks.layers import (
    Sizes,
    activation,
    any_conv,
    average,
    blur,
    conv,
    conv_act,
    conv_norm,
    norm,
    strided,
)
from benchmarks.random_networks.writer import MisfitError, Writer

SUMS = (
    *("{a} + {b}",) * 8,
    *("{b} + {a}",) * 3,
    *("torch.add({a}, {b})", "{a}.add({b})", "{a} - {b}", "{b} - {a}", "torch.sub({a}, {b})"),
    *("{a} + 0.5 * {b}", "torch.add({a}, {b}, alpha=0.3)", "{a} * 0.7 + {b} * -1.3", "-{a} + {b}", "{a} + {b} / 3"),
    *("sum([{a}, {b}])", "1.5 * ({a} + {b})", "torch.add({a}, {b}, alpha=-2)"),
)


def branch(w: Writer, v: str, c_out: int, stride: int = 1, *, length: int | None = None, depth: int = 0) -> str:
    """Convs with norms, activations, now and then a gate or an inner residual; ends in a conv as a rule."""
    wanted = strided(w.sizes(v), stride)
    length = length or w.r.choice([1, 2, 2, 2, 3])
    at = w.r.randrange(length)
    for index in range(length):
        step = stride if index == at else 1
        if index == length - 1:
            v = w.fit(partial(last_conv, w, v, c_out, step, wanted), c_out)
        else:
            v = w.fit(partial(conv_act, w, v, w.some_channels(), step))
        if index < length - 1 and w.chance(0.12):
            v = w.fit(partial(gate, w, v), w.channels(v), w.sizes(v))
        if depth and index < length - 1 and w.chance(0.15, "nested"):
            v = residual(w, v, branch(w, v, w.channels(v), depth=depth - 1))
    if w.chance(0.15):
        v = w.fit(lambda: gate(w, v), c_out, wanted)
    if w.chance(0.08, "activation at the end of the branch"):
        v = activation(w, v)
    if w.chance(0.08):
        v = layer_scale(w, v)
    return dropout(w, v) if w.chance(0.08) else v


def last_conv(w: Writer, v: str, c_out: int, stride: int, sizes: Sizes) -> str:
    """The conv before a sum."""
    if w.dims and w.chance(0.05):
        return any_conv(w, v, c_out, stride, sizes)
    return conv_norm(w, v, c_out, stride)


def layer_scale(w: Writer, v: str) -> str:
    """A factor per channel, in one of its shapes, or one for all."""
    w.features.add("layer scale")
    c = w.channels(v)
    ones = ", 1" * w.dims
    shape = w.pick(f"1, {c}{ones}", f"{c}{ones}", "1") if w.dims else w.pick(f"{c}", "1")
    made = w.pick(f"nn.Parameter(torch.randn({shape}))", f"nn.Buffer(torch.randn({shape}))")
    return w.emit(w.pick(f"{v} * $gamma", f"$gamma * {v}", f"{v}.mul($gamma)", f"{v} / (2 + $gamma.abs())"), gamma=made)


def dropout(w: Writer, v: str) -> str:
    """What does nothing in eval mode."""
    w.features.add("dropout")
    if w.chance(0.4):
        return w.emit(f"F.dropout({v}, 0.2, self.training)")
    made = "nn.Dropout(0.3)" if not w.dims else w.pick("nn.Dropout(0.3)", f"nn.Dropout{w.dims}d(0.2)", "nn.Identity()")
    return w.emit(f"$drop({v})", drop=made)


def shortcut(w: Writer, v: str, c_out: int, stride: int = 1) -> str:
    """What stands beside the branch: the identity where that fits, else something linear."""
    fits = c_out == w.channels(v) and stride == 1
    if fits and w.chance(0.65, "identity shortcut"):
        return v
    wanted = strided(w.sizes(v), stride)
    return w.fit(lambda: _shortcut(w, v, c_out, stride), c_out, wanted, tries=30)


def _shortcut(w: Writer, v: str, c_out: int, stride: int) -> str:
    kind = w.r.random()
    if kind < 0.45 or not w.dims:
        w.features.add("projection shortcut")
        return _projection(w, v, c_out, stride)
    if kind < 0.6:
        w.features.add("pooled shortcut")
        v = average(w, v, stride)
        return v if w.channels(v) == c_out and w.chance(0.5) else _projection(w, v, c_out, 1)
    if kind < 0.72:
        return zero_channels(w, _subsampled(w, v, stride), c_out)
    if kind < 0.87:
        w.features.add("linear chain shortcut")
        return _linear_chain(w, v, c_out, stride)
    if kind < 0.92:
        return conv_norm(w, blur(w, v, stride), c_out, kernels=(1,))
    w.features.add("max pool shortcut")
    window = "1" if stride == 1 else w.pick(f"1, {stride}", f"{stride}, {stride}", f"3, {stride}, 1")
    return _projection(w, w.emit(f"$pool({v})", pool=f"nn.MaxPool{w.dims}d({window})"), c_out, 1)


def _projection(w: Writer, v: str, c_out: int, stride: int) -> str:
    v = conv(w, v, c_out, stride, kernels=(1,))
    return norm(w, v) if w.chance(0.5) else v


def _linear_chain(w: Writer, v: str, c_out: int, stride: int) -> str:
    length = w.r.randint(1, 3)
    at = w.r.randrange(length)
    for index in range(length):
        v = conv_norm(w, v, c_out if index == length - 1 else w.some_channels(), stride if index == at else 1)
        if w.chance(0.2):
            v = layer_scale(w, v)
    return v


def _subsampled(w: Writer, v: str, stride: int) -> str:
    if stride == 1:
        return v
    if w.chance(0.5, "strided slice"):
        return w.emit(f"{v}[:, :{f', ::{stride}' * w.dims}]")
    return average(w, v, stride)


def zero_channels(w: Writer, v: str, c_out: int) -> str:
    """``v`` with zero channels added, behind it or on both sides."""
    missing = c_out - w.channels(v)
    if missing <= 0:
        raise MisfitError("no channels to add")
    w.features.add("zero-padded channels")
    before = w.r.choice([0, 0, missing // 2])
    spatial = "0, 0, " * w.dims
    if before == 0 and w.chance(0.4):
        shape = ", ".join(f"{v}.shape[{i}]" if i != 1 else str(missing) for i in range(w.dims + 2))
        return w.emit(f"torch.cat([{v}, torch.zeros({shape}, dtype={v}.dtype, device={v}.device)], 1)")
    return w.emit(f"F.pad({v}, ({spatial}{before}, {missing - before}))")


def joined(w: Writer, a: str, b: str) -> str:
    """The sum of two, in one of its spellings."""
    if w.chance(0.08, "in-place sum"):
        w.write(f"{a} += {b}")
        return a
    code = w.r.choice(SUMS).format(a=a, b=b)
    if "-" in code or "*" in code or "/" in code or "alpha" in code:
        w.features.add("scaled or subtracted")
    return w.emit(code)


def residual(w: Writer, v: str, y: str) -> str:
    """``y`` plus a shortcut from ``v``."""
    stride = 1
    if w.dims and w.sizes(y) != w.sizes(v):
        stride = next((s for s in (2, 3, 4) if strided(w.sizes(v), s) == w.sizes(y)), 1)
    s = shortcut(w, v, w.channels(y), stride)
    if s == y:
        raise MisfitError("nothing to add")
    return joined(w, y, s)


def closing(w: Writer, v: str, probability: float = 0.7) -> str:
    """An activation behind the sum, as a rule."""
    if w.chance(0.1, "norm behind the sum"):
        v = norm(w, v)
    return activation(w, v) if w.chance(probability) else v
