"""Recipes of blocks that tempt a compiler to be wrong."""

from __future__ import annotations

from benchmarks.random_networks.blocks import (
    gated,
    inverted,
    parallel,
    pooled_branches,
    pre_activation,
    residual_block,
    three_way,
)
from benchmarks.random_networks.joins import concat_skip, csp, dense, partial_sum, res2net, shuffle_net
from benchmarks.random_networks.layers import activation, conv, conv_act, conv_norm, norm
from benchmarks.random_networks.parts import branch, closing, joined
from benchmarks.random_networks.writer import Writer


def shared_weights(w: Writer, x: str) -> str:
    """One conv runs twice, with one norm or two."""
    c, dims = w.channels(x), w.dims
    made = f"nn.Conv{dims}d({c}, {c}, 3, 1, 1)" if dims else f"nn.Linear({c}, {c})"
    twice = w.pick("$conv(F.relu($conv({x})))", "$act($conv($act($conv({x}))))", "$conv({x}) + F.relu($conv({x}))")
    layers = {"conv": made} | ({"act": f"nn.PReLU({w.shape(x)[1]})"} if "$act" in twice else {})
    return closing(w, joined(w, w.emit(twice.format(x=x), **layers), x))


def interior_reader(w: Writer, x: str) -> str:
    """A tensor inside the branch is read outside, or returned."""
    inner = conv_act(w, x, w.channels(x))
    total = closing(w, joined(w, conv_norm(w, inner, w.channels(x)), x))
    where = w.pick("returned", "read behind the sum", "sum before returned", "read twice")
    w.features.add(f"interior {where}")
    if where == "returned":
        w.extras.append(inner)
        return total
    if where == "sum before returned":
        w.extras.append(total)
        return closing(w, joined(w, branch(w, total, w.channels(total)), total))
    if where == "read twice":
        return closing(w, joined(w, total, inner))
    return closing(w, joined(w, conv_norm(w, total, w.channels(x)), inner))


def in_place_on_fork(w: Writer, x: str) -> str:
    """An activation in place on what the shortcut reads later: the shortcut sees it."""
    fork = conv_norm(w, x, w.channels(x))
    how = w.pick("F.relu_({v})", "F.relu({v}, inplace=True)", "{v}.clamp_(0, 6)", "{v}.mul_(0.5)", "$act({v})")
    first = w.emit(how.format(v=fork), **({"act": "nn.ReLU(inplace=True)"} if how == "$act({v})" else {}))
    return closing(w, joined(w, conv_norm(w, conv_act(w, first, 4), w.channels(x)), fork))


def in_place_inside(w: Writer, x: str) -> str:
    """Writes inside: ``+=`` on the fork itself, or on a part of it."""
    v = conv_norm(w, x, w.channels(x))
    y = branch(w, v, w.channels(v))
    w.write(w.pick(f"{v} += {y}", f"{v}.add_({y})", f"{v}.sub_({y}, alpha=0.5)", f"{v}.add_({y}).relu_()"))
    return closing(w, joined(w, conv_norm(w, v, w.channels(v)), v))


def broadcasting(w: Writer, x: str) -> str:
    """A sum whose operands differ in shape."""
    c = w.channels(x)
    v = conv_act(w, x, c)
    if not w.dims:
        return closing(w, joined(w, v, w.emit(f"{v}.mean(-1, keepdim=True)")))
    axes = tuple(range(2, w.dims + 2))
    small = w.pick("pooled", "one channel", "parameter", "one row")
    w.features.add(f"broadcasts {small}")
    if small == "pooled":
        return closing(
            w, joined(w, x, w.emit(f"$fc({v}.mean({axes}, keepdim=True))", fc=f"nn.Conv{w.dims}d({c}, {c}, 1)"))
        )
    if small == "one channel":
        return closing(w, joined(w, x, conv(w, v, 1)))
    if small == "one row":
        return closing(w, joined(w, x, w.emit(f"{v}.mean(2, keepdim=True)")))
    sizes = ", ".join(map(str, w.sizes(x)))
    return closing(w, joined(w, w.emit(f"{v} + $pos", pos=f"nn.Parameter(torch.randn(1, {c}, {sizes}))"), x))


def other_norms(w: Writer, x: str) -> str:
    """Norms by the statistics of the batch or of each input."""
    c, dims = w.channels(x), w.dims
    v = conv(w, x, c)
    made = w.pick(
        f"nn.BatchNorm{dims or 1}d({c}, track_running_stats=False)",
        f"nn.GroupNorm(1, {c})",
        f"nn.InstanceNorm{dims or 1}d({c}, affine=True)",
        "nn.LocalResponseNorm(3)",
        f"nn.LayerNorm({list(w.shape(x)[1:])})",
        f"nn.RMSNorm({w.shape(x)[-1]})",
    )
    w.features.add(made[3:].split("(")[0] + (" of batch statistics" if "track" in made else ""))
    v = w.fit(lambda: w.emit(f"$norm({v})", norm=made), c, w.sizes(x), tries=1)
    return closing(w, joined(w, conv_norm(w, activation(w, v), c) if w.chance(0.7) else v, x))


def odd_layers(w: Writer, x: str) -> str:
    """Layers on the branch that no conv is: transposed convs, softmax, GLU, shuffles of positions."""
    c, dims = w.channels(x), w.dims
    v = conv_act(w, x, c)
    made = w.pick(
        *(
            f"nn.ConvTranspose{dims or 1}d({c}, {c}, 3, padding=1)",
            "nn.Softmax(1)",
            "nn.Softmax2d()",
            "nn.LogSoftmax(1)",
        ),
        *(f"nn.LPPool{dims or 1}d(2, 1)", "nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2))"),
        *(f"nn.Sequential(nn.Conv{dims or 1}d({c}, {2 * c}, 1), nn.GLU(1))", "nn.Softmin(1)", "nn.AlphaDropout(0.2)"),
    )
    w.features.add(made.replace("nn.Sequential(", "")[3:].split("(")[0])
    v = w.emit(f"$odd({v})", odd=made)
    v = w.fit(lambda: conv_norm(w, v, c), c, w.sizes(x), tries=2)
    return closing(w, joined(w, v, x))


def data_dependent(w: Writer, x: str) -> str:
    """Factors and shifts that depend on the data, products of two branches."""
    v = conv_act(w, x, w.channels(x))
    code = w.pick(
        *(f"{v} * {x}.mean()", f"{v} * {x}.amax().tanh()", f"{v} * {v}", f"{v} / (1 + {x}.abs().mean())"),
        *(f"{v} * torch.tanh({x})", f"{v} - {v}.mean()", f"torch.maximum({v}, {x})", f"{v} * {x}.shape[0] / 2"),
        *(f"torch.where({v} > 0, {v}, {x})", f"{v}.pow(2)", f"{v}.abs()", f"{v} / {v}.shape[-1]", f"{v}.roll(1, -1)"),
        *(f"{v}.flip(-1)", f"{v}.detach()", f"{v}.clone()", f"F.normalize({v}, dim=1)", f"{v}.exp()", f"{v}.cumsum(1)"),
    )
    w.features.add(code.replace(v, "y").replace(x, "x"))
    v = w.fit(lambda: w.emit(code), w.channels(x), w.sizes(x), tries=1)
    v = conv_norm(w, v, w.channels(x)) if w.chance(0.5) else v
    return closing(w, joined(w, v, x))


def views(w: Writer, x: str) -> str:
    """Views and transposes on the branch, of sizes read off the data or written down."""
    v = conv_act(w, x, w.channels(x))
    n, c = f"{v}.shape[0]", w.channels(v)
    rest = ", ".join(f"{v}.shape[{i}]" for i in range(2, len(w.shape(v))))
    fixed = ", ".join(map(str, w.shape(v)[1:]))
    codes = [f"{v}.reshape({n}, {fixed})", f"{v}.flatten(1).view({n}, {fixed})", f"{v}.view({v}.size())"]
    if w.dims:
        codes += [
            f"{v}.view({n}, {c}, -1).view({n}, {c}, {rest})",
            f"{v}.transpose(1, -1).transpose(1, -1)",
            f"{v}.transpose(-1, -2).contiguous().view({n}, {c}, {rest})",
            f"$fc({v}.movedim(1, -1)).movedim(-1, 1)",
            f"{v}.unsqueeze(0).squeeze(0)",
            f"{v}.view({n}, -1, {rest})",
        ]
    code = w.r.choice(codes)
    w.features.add("a view that " + ("fixes" if fixed in code else "follows") + " sizes")
    v = w.emit(code, **({"fc": f"nn.Linear({c}, {c})"} if "$fc" in code else {}))
    v = w.fit(lambda: conv_norm(w, v, c), c, w.sizes(x), tries=2)
    return closing(w, joined(w, v, x))


def attention(w: Writer, x: str) -> str:
    """Pre-norm attention over positions."""
    c = w.channels(x)
    if not w.dims:
        v = w.emit(f"$norm({x})", norm=f"nn.LayerNorm({c})")
        v = w.emit(
            f"torch.softmax($q({v}) @ $k({v}).transpose(-1, -2), -1) @ $v({v})",
            **dict.fromkeys("qkv", f"nn.Linear({c}, {c})"),
        )
        v = w.fit(lambda: joined(w, v, x), c, w.sizes(x), tries=1)
        inner = w.emit(
            f"$out(F.gelu($up($norm({v}))))",
            norm=f"nn.LayerNorm({c})",
            up=f"nn.Linear({c}, 6)",
            out=f"nn.Linear(6, {c})",
        )
        return joined(w, inner, v)
    flat = w.emit(f"$qkv({x}).flatten(2)", qkv=f"nn.Conv{w.dims}d({c}, {c}, 1)")
    v = w.emit(f"({flat} @ torch.softmax({flat}.transpose(1, 2) @ {flat} * 0.01, -1)).reshape({x}.shape)")
    return closing(w, joined(w, conv_norm(w, v, c), x))


def odd_sums(w: Writer, x: str) -> str:
    """Sums in spellings that are no plain sum."""
    c = w.channels(x)
    v = branch(w, x, c)
    code = w.pick(
        *(f"torch.stack([{x}, {v}]).sum(0)", f"torch.lerp({x}, {v}, 0.3)", f"torch.addcmul({x}, {v}, {v}, value=0.1)"),
        *(f"({x} + {v}).add(1.0)", f"{x}.add({v}, alpha=2)", f"torch.cat([{x}, {v}], 0).chunk(2, 0)[1] + {x}"),
        *(f"torch.rsub({x}, {v})", f"torch.stack([{x}, {v}], 1).mean(1)", f"({x} + {v}) / 2", f"-({x} - {v})"),
    )
    w.features.add(code.replace(v, "y").replace(x, "x"))
    return closing(w, w.emit(code))


def half_used(w: Writer, x: str) -> str:
    """The fork has more readers than the sum: it is returned, pooled aside, or read by a second block."""
    v = branch(w, x, w.channels(x))
    total = closing(w, joined(w, v, x))
    if w.chance(0.5):
        w.extras.append(x)
        return total
    return closing(w, joined(w, branch(w, total, w.channels(x)), norm(w, x)))


def odd_fork(w: Writer, x: str) -> str:
    """A block that starts from a tensor of which little is known."""
    c = w.channels(x)
    one = f"nn.Conv{w.dims}d({c}, 1, 1)" if w.dims else f"nn.Linear({c}, 1)"
    codes = [
        *(
            f"torch.cat([{x}, {x}], {w.axis})",
            f"{x} * torch.sigmoid($one({x}))",
            f"$one({x}) + {x}",
            f"{x} + $one({x})",
        ),
        *(f"torch.softmax({x}, {w.axis})", f"{x} * 2 + {x}", f"torch.where({x} > 0, {x}, -{x})", f"{x}.clone()"),
        *(f"{x}[{w.slices}1:]", f"torch.cat([{x}[{w.slices}:1], {x}, {x}], {w.axis})", f"F.normalize({x}, dim=1)"),
        *(f"{x}.transpose(0, 1).transpose(0, 1)", f"torch.maximum({x}, $one({x}))", f"{x}.detach()", f"{x}.flip(1)"),
    ]
    if w.dims:
        made = f"F.max_pool{w.dims}d({x}, 3, 1, 1)"
        codes += [made, f"{x} + {x}.mean(1, keepdim=True)", f"F.pad({x}, {(0, 0) * w.dims + (1, 0)})"]
    code = w.r.choice(codes)
    fork = w.emit(code, **({"one": one} if "$one" in code else {}))
    recipe = w.r.choice(
        [
            *(residual_block, pre_activation, gated, parallel, inverted, three_way, pooled_branches),
            *(partial_sum, concat_skip, res2net, csp, shuffle_net, dense),
        ]
    )
    w.features.add(recipe.__name__.replace("_", " ") + " from an odd fork")
    return recipe(w, fork)


RECIPES = {
    "odd fork": odd_fork,
    "shared weights": shared_weights,
    "interior reader": interior_reader,
    "in place on the fork": in_place_on_fork,
    "in place inside": in_place_inside,
    "broadcasting": broadcasting,
    "other norms": other_norms,
    "odd layers": odd_layers,
    "data-dependent": data_dependent,
    "views": views,
    "attention": attention,
    "odd sums": odd_sums,
    "half used": half_used,
}
