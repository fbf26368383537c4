"""Gates: what multiplies a branch by something computed from it."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.random_networks.layers import activation
from benchmarks.random_networks.program import weighted
from benchmarks.random_networks.writer import MisfitError, Writer

SQUASHED = ("torch.sigmoid({v})", "{v}.sigmoid()", "F.hardsigmoid({v})", "F.relu6({v} + 3) / 6", "torch.tanh({v})")


def gate(w: Writer, v: str, source: str | None = None) -> str:
    """``v`` times a gate computed from ``source``, or from itself."""
    if not w.dims:
        return _linear_gate(w, v, source or v)
    kinds: dict[str, float] = {"squeeze-excite": 5, "inline squeeze-excite": 2, "ECA": 1, "spatial gate": 1, "CBAM": 1}
    recipes: dict[str, Callable[[Writer, str, str], str]] = {
        "squeeze-excite": _squeeze_excite,
        "inline squeeze-excite": _inline,
        "ECA": _eca,
        "spatial gate": _spatial,
        "CBAM": _cbam,
    }
    kind = weighted(w.r, kinds)
    w.features |= {"gate", kind}
    return recipes[kind](w, v, source or v)


def _squashed(w: Writer, v: str) -> str:
    if w.chance(0.5):
        made = w.pick("nn.Sigmoid()", "nn.Sigmoid()", "nn.Hardsigmoid()", "nn.Tanh()", "nn.ReLU6()", "nn.Softsign()")
        return w.emit(f"$gate({v})", gate=made)
    return w.emit(w.pick(*SQUASHED).format(v=v))


def _product(w: Writer, v: str, factor: str) -> str:
    spelling = w.pick(
        "{v} * {f}", "{v} * {f}", "{f} * {v}", "torch.mul({v}, {f})", "{v}.mul({f})", "{v} * {f}.expand_as({v})"
    )
    product = w.emit(spelling.format(v=v, f=factor))
    if w.shape(product) != w.shape(v):
        raise MisfitError("a gate changes the shape")
    return product


def _pooled(w: Writer, v: str) -> str:
    dims = w.dims
    axes = tuple(range(2, dims + 2))
    pooled = w.pick(f"F.adaptive_avg_pool{dims}d({v}, 1)", f"{v}.mean({axes}, keepdim=True)", "$pool", "$pool", "$most")
    if pooled == "$pool":
        return w.emit(f"$pool({v})", pool=f"nn.AdaptiveAvgPool{dims}d(1)")
    if pooled == "$most":
        return w.emit(f"$pool({v})", pool=f"nn.AdaptiveMaxPool{dims}d(1)")
    return w.emit(pooled)


def _squeeze_excite(w: Writer, v: str, source: str) -> str:
    """Pool, two 1x1 convs, sigmoid."""
    c, inner, dims = w.channels(source), w.some_channels(), w.dims
    squeezed = w.emit(f"$fc({_pooled(w, source)})", fc=f"nn.Conv{dims}d({c}, {inner}, 1)")
    squeezed = activation(w, squeezed)
    return _product(w, v, _squashed(w, w.emit(f"$fc({squeezed})", fc=f"nn.Conv{dims}d({inner}, {w.channels(v)}, 1)")))


def _inline(w: Writer, v: str, source: str) -> str:
    """Pool, flatten, two linear layers, view."""
    c, inner, axes = w.channels(source), w.some_channels(), tuple(range(2, w.dims + 2))
    flat = w.emit(w.pick(f"{source}.mean({axes})", f"F.adaptive_avg_pool{w.dims}d({source}, 1).flatten(1)"))
    flat = w.emit(f"F.relu($fc({flat}))", fc=f"nn.Linear({c}, {inner})")
    flat = _squashed(w, w.emit(f"$fc({flat})", fc=f"nn.Linear({inner}, {w.channels(v)})"))
    ones = ", 1" * w.dims
    view = w.pick(f"{flat}.view({flat}.size(0), -1{ones})", f"{flat}.view({v}.shape[0], {v}.shape[1]{ones})")
    return _product(w, v, w.emit(view if w.dims != 2 else w.pick(view, f"{flat}[:, :, None, None]")))


def _eca(w: Writer, v: str, source: str) -> str:
    """Pool, a conv over channels, sigmoid."""
    if w.channels(source) != w.channels(v):
        source = v
    axes, tail = tuple(range(2, w.dims + 2)), ".unsqueeze(-1)" * w.dims
    conv = f"nn.Conv1d(1, 1, {w.pick('3, padding=1', '5, padding=2')}, bias=False)"
    mixed = w.emit(f"$eca({source}.mean({axes}).unsqueeze(1)).squeeze(1)", eca=conv)
    return _product(w, v, w.emit(f"torch.sigmoid({mixed}){tail}"))


def _spatial(w: Writer, v: str, source: str) -> str:
    """One factor for each position."""
    if w.sizes(source) != w.sizes(v):
        source = v
    dims = w.dims
    out = w.pick("1", str(w.channels(v)))
    mixed = w.emit(f"$mask({source})", mask=f"nn.Conv{dims}d({w.channels(source)}, {out}, 3, 1, 1)")
    return _product(w, v, _squashed(w, mixed))


def _cbam(w: Writer, v: str, source: str) -> str:
    """A shared MLP of mean and maximum, then a map of mean and maximum over channels."""
    dims, c = w.dims, w.channels(v)
    mlp = f"nn.Sequential(nn.Conv{dims}d({c}, 2, 1), nn.ReLU(), nn.Conv{dims}d(2, {c}, 1))"
    axes = tuple(range(2, dims + 2))
    code = f"torch.sigmoid($mlp({v}.mean({axes}, keepdim=True)) + $mlp({v}.amax({axes}, keepdim=True)))"
    v = _product(w, v, w.emit(code, mlp=mlp))
    both = w.emit(f"torch.cat([{v}.mean(1, keepdim=True), {v}.amax(1, keepdim=True)], 1)")
    mask = w.emit(f"torch.sigmoid($mask({both}))", mask=f"nn.Conv{dims}d(2, 1, 3, padding=1)")
    return _product(w, v, mask)


def _linear_gate(w: Writer, v: str, source: str) -> str:
    w.features |= {"gate", "linear gate"}
    return _product(
        w, v, _squashed(w, w.emit(f"$fc({source})", fc=f"nn.Linear({w.channels(source)}, {w.channels(v)})"))
    )
