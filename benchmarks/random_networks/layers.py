"""Layers of random networks: convs of every kind, norms, activations in every spelling, pools."""

from __future__ import annotations

from benchmarks.random_networks.writer import Writer

Sizes = tuple[int, ...]

# The usual ones more often; {c} is the number of channels.
ACTIVATIONS = (
    *("nn.ReLU()",) * 8,
    *("nn.ReLU(inplace=True)",) * 2,
    *("nn.ReLU6()", "nn.Hardswish()", "nn.SiLU()", "nn.GELU()", "nn.LeakyReLU(0.1)", "nn.PReLU({c})") * 2,
    *("nn.GELU(approximate='tanh')", "nn.PReLU()", "nn.Hardtanh(-0.3, 0.7)", "nn.SiLU(inplace=True)"),
    *("nn.ELU()", "nn.CELU(0.7)", "nn.SELU()", "nn.Hardsigmoid()", "nn.Sigmoid()", "nn.Tanh()", "nn.Mish()"),
    *("nn.Softplus()", "nn.Softplus(2.0, 5.0)", "nn.Softsign()", "nn.Tanhshrink()", "nn.LogSigmoid()"),
    *("nn.Hardshrink(0.4)", "nn.Softshrink(0.4)", "nn.Threshold(0.1, -0.5)", "nn.RReLU()", "nn.LeakyReLU(-0.2)"),
)
WRITTEN = (
    *("F.relu({v})", "{v}.relu()", "torch.relu({v})", "F.relu({v}, inplace=True)", "{v}.clamp(min=0)"),
    *("{v}.relu_()", "F.relu6({v})", "{v}.clamp(0, 6)", "torch.clamp({v}, -0.7, 1.9)", "F.leaky_relu({v}, 0.2)"),
    *("{v} * torch.sigmoid({v})", "F.silu({v})", "F.hardswish({v})", "{v} * F.relu6({v} + 3) / 6", "F.gelu({v})"),
    *("{v} * F.hardsigmoid({v})", "torch.tanh({v})", "{v} * ({v} > 0)", "{v} * torch.tanh(F.softplus({v}))"),
    *("torch.sin({v})", "{v}.abs()", "F.relu6({v} + 3) / 6", "torch.clamp_min({v}, 0.0)", "F.mish({v})"),
)


def activation(w: Writer, v: str) -> str:
    """Any activation of ``torch.nn``, as a layer or written out."""
    if w.chance(0.2, "activation written out"):
        code = w.r.choice(WRITTEN)
        if "_()" in code or "inplace" in code:
            w.features.add("activation in place")
        return w.emit(code.format(v=v))
    made = w.r.choice(ACTIVATIONS).format(c=w.shape(v)[1])
    w.features.add(made.split("(")[0])
    if "inplace" in made:
        w.features.add("activation in place")
    return w.emit(f"$act({v})", act=made)


def norm(w: Writer, v: str) -> str:
    """A batch norm, of whatever arguments; nothing where linear layers run over positions."""
    if len(w.shape(v)) == 3 and not w.dims:
        return v
    more = w.pick("", "", "", ", affine=False", ", eps=0.01", ", momentum=None")
    return w.emit(f"$bn({v})", bn=f"nn.BatchNorm{w.dims or 1}d({w.channels(v)}{more})")


def strided(sizes: Sizes, stride: int) -> Sizes:
    """The sizes behind a stride."""
    return tuple((size - 1) // stride + 1 for size in sizes)


def conv(w: Writer, v: str, c_out: int, stride: int = 1, *, kernels: tuple[int, ...] = (1, 1, 3, 3, 3, 5, 2, 4)) -> str:
    """A conv of size-keeping padding, written in one of many ways; a linear layer for 0 dimensions."""
    if not w.dims:
        return w.emit(f"$fc({v})", fc=f"nn.Linear({w.channels(v)}, {c_out}, bias={w.chance(0.6)})")
    return w.fit(lambda: _conv(w, v, c_out, stride, kernels), c_out, strided(w.sizes(v), stride), tries=20)


def _conv(w: Writer, v: str, c_out: int, stride: int, kernels: tuple[int, ...]) -> str:
    r, c_in = w.r, w.channels(v)
    kernel, dilation = r.choice(kernels), r.choice([1, 1, 1, 1, 2, 3])
    groups = r.choice([g for g in (1, 1, 1, 2, 4, c_in) if c_in % g == 0 and c_out % g == 0])
    if kernel == 1:
        dilation = 1
    if dilation > 1:
        w.features.add("dilated")
    if groups > 1:
        w.features.add("depthwise" if groups == c_in else "grouped")
    if kernel % 2 == 0:
        w.features.add("even kernel")
    reach = dilation * (kernel - 1)
    padding: int | str = reach // 2
    if reach % 2 or w.chance(0.12):
        if stride == 1 and w.chance(0.4, "padding='same'"):
            padding = "same"
        else:
            v, padding = _pad(w, v, reach), 0
    mode = ""
    if padding and w.chance(0.12):
        mode = r.choice(["reflect", "replicate", "circular"])
        w.features.add(f"padding_mode={mode}")
        mode = f", padding_mode={mode!r}"
    made = (
        f"nn.Conv{w.dims}d({c_in}, {c_out}, {kernel}, {stride}, {padding!r}, {dilation}, {groups}, "
        f"bias={w.chance(0.5)}{mode})"
    )
    if not mode and w.chance(0.03, "weight norm"):
        made = f"torch.nn.utils.parametrizations.weight_norm({made})"
    return w.emit(f"$conv({v})", conv=made)


def _pad(w: Writer, v: str, total: int) -> str:
    """``total`` positions of padding, more on one side."""
    w.features.add("F.pad")
    before = [w.r.randint(0, total) for _ in range(w.dims)]
    amounts = [side for b in before for side in (b, total - b)]
    mode = w.r.choice(["constant"] * 5 + ["reflect", "replicate", "circular"])
    if mode == "constant" and w.chance(0.3):
        return w.emit(f"$pad({v})", pad=f"nn.ZeroPad{w.dims}d({tuple(amounts)})")
    return w.emit(f"F.pad({v}, {tuple(amounts)}" + (f", mode={mode!r})" if mode != "constant" else ")"))


def any_conv(w: Writer, v: str, c_out: int, stride: int, sizes: Sizes) -> str:
    """A conv of any padding whose output has the given sizes here; at other input sizes it may not."""

    def draw() -> str:
        kernel, padding = w.r.choice([1, 2, 3, 4, 5]), w.r.randint(0, 3)
        made = f"nn.Conv{w.dims}d({w.channels(v)}, {c_out}, {kernel}, {stride}, {padding}, bias={w.chance(0.5)})"
        return w.emit(f"$conv({v})", conv=made)

    if not w.dims:
        return conv(w, v, c_out)
    w.features.add("sizes fit here only")
    return w.fit(draw, c_out, sizes)


def conv_norm(w: Writer, v: str, c_out: int, stride: int = 1, **more: tuple[int, ...]) -> str:
    """A conv, with a norm behind it as a rule."""
    v = conv(w, v, c_out, stride, **more)
    return norm(w, v) if w.chance(0.6) else v


def conv_act(w: Writer, v: str, c_out: int, stride: int = 1, **more: tuple[int, ...]) -> str:
    """A conv, a norm and an activation; now and then as one ``nn.Sequential``."""
    if w.dims and w.chance(0.1, "nn.Sequential"):
        c_in, dims = w.channels(v), w.dims
        layers = f"nn.Conv{dims}d({c_in}, {c_out}, 3, {stride}, 1, bias=False), nn.BatchNorm{dims}d({c_out}), nn.ReLU()"
        return w.emit(f"$seq({v})", seq=f"nn.Sequential({layers})")
    return activation(w, conv_norm(w, v, c_out, stride, **more))


def depthwise(w: Writer, v: str, stride: int = 1) -> str:
    """A depthwise conv."""
    if not w.dims:
        return v
    w.features.add("depthwise")
    c, kernel = w.channels(v), w.r.choice([3, 3, 5])
    made = f"nn.Conv{w.dims}d({c}, {c}, {kernel}, {stride}, {kernel // 2}, groups={c}, bias={w.chance(0.3)})"
    return w.emit(f"$conv({v})", conv=made)


def average(w: Writer, v: str, stride: int) -> str:
    """An average pool of a stride: ResNet-D's, or a blur."""
    w.features.add("average pool")
    dims = w.dims
    more = w.pick(
        "2, 2, ceil_mode=True, count_include_pad=False", "3, 2, 1", "3, 2, 1, count_include_pad=False", "2, 2"
    )
    if stride == 1:
        more = w.pick("3, 1, 1", "3, 1, 1, count_include_pad=False", "1", "5, 1, 2")
    elif stride > 2:
        more = f"{stride}, {stride}"
    return w.emit(f"$pool({v})", pool=f"nn.AvgPool{dims}d({more})")


def blur(w: Writer, v: str, stride: int) -> str:
    """A fixed blur: a depthwise conv whose weight is a buffer."""
    w.features.add("blur")
    c, dims = w.channels(v), w.dims
    edge = "torch.tensor([1.0, 2.0, 1.0]) / 4"
    weight = {1: edge, 2: f"torch.outer({edge}, {edge})", 3: "torch.ones(3, 3, 3) / 27"}[dims]
    weight = f"nn.Buffer(({weight}).expand({(c, 1, *[3] * dims)}).clone())"
    mode = w.r.choice(["reflect", "replicate", "constant"])
    padded = w.emit(f"F.pad({v}, {(1, 1) * dims}, mode={mode!r})")
    return w.emit(f"F.conv{dims}d({padded}, $blur, stride={stride}, groups={c})", blur=weight)
