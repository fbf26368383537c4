"""Recipes of blocks that cut and join channels: partial sums, concat skips, splits, shuffles."""

from __future__ import annotations

from benchmarks.random_networks.layers import conv_act, conv_norm, depthwise, norm
from benchmarks.random_networks.parts import branch, closing, joined, residual
from benchmarks.random_networks.writer import MisfitError, Writer


def cut(w: Writer, v: str, start: int, end: int) -> str:
    """Channels ``start`` to ``end - 1``."""
    spellings = [f"{v}[{w.slices}{start}:{end}]", f"{v}.narrow({w.axis}, {start}, {end - start})"]
    if not w.dims:
        spellings.pop()
    return w.emit(w.r.choice(spellings))


def halves(w: Writer, v: str) -> tuple[str, str]:
    """Two halves, by ``chunk``, ``split`` or slices."""
    c, k = w.channels(v), w.channels(v) // 2
    if c % 2:
        raise MisfitError("an odd number of channels")
    spelling = w.pick("chunk", "split", "slices", "sizes")
    if spelling == "slices":
        return cut(w, v, 0, k), cut(w, v, k, c)
    w.features.add(spelling if spelling != "sizes" else "split")
    code = {
        "chunk": f"{v}.chunk(2, {w.axis})",
        "split": f"torch.split({v}, {k}, {w.axis})",
        "sizes": f"{v}.split(({k}, {c - k}), dim={w.axis})",
    }[spelling]
    return w.emit(f"{code}[0]"), w.emit(f"{code}[1]")


def concat(w: Writer, *parts: str) -> str:
    """Side by side along the channels."""
    inside = ", ".join(parts)
    return w.emit(w.pick(f"torch.cat([{inside}], {w.axis})", f"torch.cat(({inside}), dim={w.axis})"))


def shuffled(w: Writer, v: str, groups: int) -> str:
    """A channel shuffle, as a layer or by views."""
    w.features.add("channel shuffle")
    if w.dims != 2 or w.chance(0.3):
        if not w.dims:
            raise MisfitError("no positions")
        return w.emit(f"$shuffle({v})", shuffle=f"nn.ChannelShuffle({groups})")
    n, c = f"{v}.shape[0]", w.channels(v)
    h, wide = f"{v}.shape[2]", f"{v}.shape[3]"
    grouped = f"{v}.view({n}, {groups}, {c // groups}, {h}, {wide})"
    return w.emit(f"{grouped}.transpose(1, 2).{w.pick('contiguous().view', 'reshape')}({n}, {c}, {h}, {wide})")


def partial_sum(w: Writer, x: str) -> str:
    """Some channels are summed, the others pass or are replaced."""
    c = w.channels(x)
    k = w.r.randint(1, max(1, c - 1))
    v = branch(w, x, c) if w.chance(0.5) else branch(w, cut(w, x, 0, k), k)
    mine = v if w.channels(v) == k else cut(w, v, 0, k)
    rest = x if w.channels(v) == k else w.pick(v, x)
    return closing(w, concat(w, joined(w, mine, cut(w, x, 0, k)), cut(w, rest, k, c)))


def in_place_partial_sum(w: Writer, x: str) -> str:
    """``y[:, :k] += x[:, :k]``."""
    c = w.channels(x)
    k = w.r.randint(1, c)
    v = branch(w, x, c)
    w.write(f"{v}[{w.slices}:{k}] += {x}[{w.slices}:{k}]")
    return closing(w, v)


def concat_skip(w: Writer, x: str) -> str:
    """What a branch computes stands beside its input, and a conv reads both."""
    v = branch(w, x, w.some_channels())
    both = concat(w, *w.r.sample([x, v], 2))
    both = norm(w, both) if w.chance(0.3) else both
    v = conv_norm(w, closing(w, both, 0.4), w.some_channels())
    return closing(w, v)


def dense(w: Writer, x: str) -> str:
    """Dense connections, by concats or by sums."""
    tensors = [x]
    by_sum = w.chance(0.3, "dense sums")
    for _ in range(w.r.choice([2, 3])):
        if by_sum:
            total = tensors[0]
            for other in tensors[1:]:
                total = joined(w, total, other)
            tensors.append(conv_act(w, total, w.channels(x)))
        else:
            source = concat(w, *tensors) if len(tensors) > 1 else x
            tensors.append(conv_act(w, source, 2))
    return joined(w, tensors[-1], x) if by_sum else concat(w, *tensors)


def res2net(w: Writer, x: str) -> str:
    """Parts of the channels, each convolved together with the one before; a residual around all."""
    c = w.channels(x)
    scale = w.r.choice([2, 3, 4])
    part = w.r.choice([1, 2])
    v = conv_act(w, x, part * scale, kernels=(1,))
    parts = [cut(w, v, i * part, (i + 1) * part) for i in range(scale)]
    made = [parts[0]]
    last = ""
    for piece in parts[1:]:
        last = conv_act(w, joined(w, last, piece) if last else piece, part)
        made.append(last)
    v = conv_norm(w, concat(w, *made), c, kernels=(1,))
    return closing(w, residual(w, x, v))


def ghost(w: Writer, x: str) -> str:
    """Ghost modules: a conv, and cheap depthwise maps of it beside it."""
    v = x
    for index in range(2):
        half = max(w.channels(x) // 2, 1) if index else w.some_channels()
        v = conv_act(w, v, half, kernels=(1,)) if not index else conv_norm(w, v, half, kernels=(1,))
        cheap = norm(w, depthwise(w, v))
        v = concat(w, v, w.emit(f"F.relu({cheap})") if not index else cheap)
    return closing(w, residual(w, x, v), 0.3)


def csp(w: Writer, x: str) -> str:
    """Cross stage partial: one part through residual blocks, the other past them, and a conv of both."""
    if w.chance(0.5):
        first, second = halves(w, x)
    else:
        first, second = (conv_act(w, x, w.some_channels(), kernels=(1,)) for _ in range(2))
    for _ in range(w.r.choice([1, 2])):
        first = closing(w, joined(w, branch(w, first, w.channels(first)), first), 0.3)
    return conv_act(w, concat(w, second, first), w.some_channels(), kernels=(1,))


def shuffle_net(w: Writer, x: str) -> str:
    """ShuffleNet: half of the channels passes, a concat, a shuffle; or grouped convs with a shuffle between."""
    c = w.channels(x)
    if c % 2:
        raise MisfitError("an odd number of channels")
    if w.chance(0.5):
        first, second = halves(w, x)
        return shuffled(w, concat(w, first, branch(w, second, c // 2)), 2)
    v = conv_act(w, x, 4, kernels=(1,))
    v = norm(w, depthwise(w, shuffled(w, v, 2)))
    return closing(w, residual(w, x, conv_norm(w, v, c, kernels=(1,))))


RECIPES = {
    "partial sum": partial_sum,
    "in-place partial sum": in_place_partial_sum,
    "concat skip": concat_skip,
    "dense": dense,
    "res2net": res2net,
    "ghost": ghost,
    "csp": csp,
    "shuffle": shuffle_net,
}
