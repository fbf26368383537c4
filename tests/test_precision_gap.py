"""What is less than IEEE float32: kept out of verification, measured by precision_gaps, simulated where need be."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from front import Lambda
from nets import build, cbr, conv
from test_cli import Runner, nets, rmfx_command
from torch import Tensor, fx, nn
from torch.nn import functional as F

import rmfx
from rmfx import RmfxError, UnsupportedModelError, VerificationError
from rmfx.check.compare import float32_arithmetic
from rmfx.check.precisions import precision, round_to_tf32

__all__ = ["nets", "rmfx_command"]  # fixtures

CPU = torch.device("cpu")


def pair(name: str = "basic_chain") -> tuple[nn.Module, fx.GraphModule, Tensor]:
    model, x = build(name)
    model, x = model.float(), x.float() / 8
    return model, rmfx.convert(model, x), x


# -- verification runs in IEEE arithmetic -----------------------------------------------------------------------------

SETTINGS = [
    "pass",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.set_float32_matmul_precision('medium'); b.mkldnn.matmul.fp32_precision = 'ieee'",
    "b.cuda.matmul.allow_tf32 = True",
    "b.cudnn.allow_tf32 = False",
    "b.fp32_precision = 'tf32'",
    "b.fp32_precision = 'ieee'",
    "b.cudnn.fp32_precision = 'tf32'",
    "b.cudnn.conv.fp32_precision = 'ieee'",
    "b.cudnn.conv.fp32_precision = 'tf32'",
    "b.mkldnn.matmul.fp32_precision = 'bf16'",
]
# Settings that were never given cannot be given back, so each case needs a process in which they were not.
SCRIPT = """
import os, torch
from rmfx.check.compare import float32_arithmetic
b = torch.backends
levels = [b, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn]

def legacy():
    found = []
    for read in (torch.get_float32_matmul_precision, torch._C._get_cublas_allow_tf32, torch._C._get_cudnn_allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("contradiction")
    return found

def state():
    return [level.fp32_precision for level in levels], legacy()

def later():
    found = []
    for wide in ("ieee", "tf32", "none"):
        b.fp32_precision = wide
        found.append(state()[0])
    return found

def check(setting, mode):
    exec(setting, globals())
    if mode:
        before = state()
        with float32_arithmetic(mode):
            assert set(state()[0]) == {mode}, (setting, mode, state())
            if mode == "ieee" or "contradiction" not in before[1]:
                assert legacy()[:2] == [{"ieee": "highest", "tf32": "high"}[mode], mode == "tf32"], (setting, legacy())
        assert state() == before, (setting, mode, before, state())
    return repr(later())

for setting in SETTINGS:
    outcomes = set()
    for mode in ("", "ieee", "tf32"):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.write(write, check(setting, mode).encode())
            os._exit(0)
        os.close(write)
        assert os.waitpid(child, 0)[1] == 0
        outcomes.add(os.read(read, 9999))
    assert len(outcomes) == 1, f"after {setting}, what is set later acts otherwise: {outcomes}"
print("all as before")
"""


def test_torchs_settings_are_put_back_and_later_ones_still_act() -> None:
    script = f"SETTINGS = {SETTINGS!r}\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ})
    assert done.stdout == "all as before\n", done.stderr


def test_verification_sees_ieee_arithmetic_only() -> None:
    backends, seen = torch.backends, set()

    class Watching(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            levels = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
            seen.update(level.fp32_precision for level in levels)
            return super().forward(x)

    model = Watching(2, 3, 3).eval()
    torch.set_float32_matmul_precision("medium")
    try:
        found = rmfx.verify(model, copy.deepcopy(model), torch.zeros(1, 2, 8, 8))
        assert backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {"ieee"} and 0 < found.float32_original < 1e-6


def test_autocast_does_not_reach_into_verification() -> None:
    model, plain, x = pair()
    expected = rmfx.verify(model, plain, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert rmfx.verify(model, plain, x) == expected
        assert torch.is_autocast_enabled("cpu")


# -- TF32 -------------------------------------------------------------------------------------------------------------


def test_rounding_to_tf32_is_to_nearest_with_ties_away_from_zero() -> None:
    x = torch.randn(4096) * torch.logspace(-30, 30, 4096)
    exponent = torch.frexp(x.double())[1]
    unit = torch.ldexp(torch.ones(4096, dtype=torch.float64), exponent - 11)
    scaled = x.double() / unit  # 11 bits before the point
    expected = scaled.sign() * (scaled.abs() + 0.5).floor() * unit
    assert torch.equal(round_to_tf32(x).double(), expected)
    assert torch.equal(round_to_tf32(round_to_tf32(x)), round_to_tf32(x))


def test_rounding_to_tf32_at_the_ends() -> None:
    largest = torch.finfo(torch.float32).max
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, largest, -largest, 2.0**-149, 1 - 2.0**-12])
    rounded = round_to_tf32(ends)
    assert rounded.tolist() == [0.0, 0.0, math.inf, -math.inf, math.inf, -math.inf, 0.0, 1.0]
    assert rounded[1].signbit() and round_to_tf32(torch.tensor([math.nan])).isnan()
    assert torch.equal(round_to_tf32(torch.ones(3, 4).T + 2**-11), torch.full((4, 3), 1 + 2**-10))


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "conv": lambda x, w: F.conv1d(x, w, torch.full((5,), 1 + 2**-20)),
    "transposed": lambda x, w: F.conv_transpose1d(x, w.transpose(0, 1)),
    "depthwise": lambda x, w: F.conv1d(x, w[:3, :1].expand(3, 1, 3), groups=3),
    "linear": lambda x, w: F.linear(x[..., :3], w[..., 0], torch.full((5,), 1 + 2**-20)),
    "matmul": lambda x, w: x.transpose(1, 2) @ w[0],
    "einsum": lambda x, w: torch.einsum("abc,dbe->acde", x, w),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_rounded_factors(name: str) -> None:
    x, w = torch.randn(3, 3, 7), torch.randn(5, 3, 3)
    tf32 = precision("tf32", CPU)
    with torch.no_grad(), tf32.arithmetic():
        actual = PRODUCTS[name](x, w)
    product = PRODUCTS[name]
    # the biases are float32 numbers that TF32 does not have: they must not be rounded
    truth = _double(product)(round_to_tf32(x).double(), round_to_tf32(w).double())
    assert float((actual - truth).abs().max()) < 1e-6 * float(truth.abs().max())
    assert float((product(x, w) - truth).abs().max()) > 1e-5 * float(truth.abs().max())


def _double(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x: Tensor, w: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            return product(x, w)
        finally:
            torch.set_default_dtype(torch.float32)

    return run


def test_attention_is_taken_apart() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    q, k = q / 100, k / 100  # even weights, so that only the rounding of v shows
    with torch.no_grad(), precision("tf32", CPU).arithmetic():
        actual = F.scaled_dot_product_attention(q, k, v)
    rounded = F.scaled_dot_product_attention(q.double(), k.double(), round_to_tf32(v).double())
    assert float((actual - rounded).abs().max()) < 4e-4 < float((round_to_tf32(v) - v).abs().max())
    assert not torch.equal(actual, F.scaled_dot_product_attention(q, k, v))


def test_what_cannot_be_simulated_is_refused() -> None:
    model = Lambda(lambda m, x: m.net(x)[0], net=nn.LSTM(4, 4)).eval()
    gaps = rmfx.precision_gaps(model, model, torch.randn(2, 3, 4))
    assert "TF32 cannot be simulated inside aten::" in str(gaps["tf32"].reason)
    assert gaps["float32"].reason is None and gaps["tf32"].original is None


def test_a_carried_number_is_rounded_once() -> None:
    """A Dirac filter is no identity in TF32, but two of them are as one."""
    dirac = conv(4, 4)
    nn.init.dirac_(dirac.weight)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad(), precision("tf32", CPU).arithmetic():
        once = dirac(x)
        twice = dirac(once)
    assert torch.equal(once, round_to_tf32(x)) and torch.equal(twice, once) and not torch.equal(once, x)


# -- the gaps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_errors_are_those_of_the_networks_in_that_dtype(name: str, dtype: torch.dtype) -> None:
    model, plain, x = pair()
    gap = rmfx.precision_gaps(model, plain, x, precisions=[name])[name]
    truth = copy.deepcopy(model).double()(x.to(dtype).double()).detach()
    for network, error in ((model, gap.original), (plain, gap.plain)):
        actual = copy.deepcopy(network).to(dtype)(x.to(dtype)).double().detach()
        assert error == float((actual - truth).abs().max() / truth.abs().max())
    assert gap.ratio is not None and 0.2 < gap.ratio < 5 and not gap.simulated


def test_every_precision_is_a_line() -> None:
    model, plain, x = pair()
    gaps = rmfx.precision_gaps(model, plain, x)
    lines = str(gaps).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["float64", "float32", "tf32", "bfloat16", "float16"]
    assert lines[0].split() == ["error", "in", "original", "plain", "ratio"] and "tf32 (simulated)" in lines[3]
    errors = {gap.precision: gap.plain for gap in gaps.gaps}
    assert errors["float64"] < errors["float32"] < 1e-5 < errors["float16"] < errors["bfloat16"] < 0.2
    assert 1e-5 < errors["tf32"] < 1e-2
    assert json.loads(json.dumps(gaps.to_dict(), allow_nan=False))["tf32"]["plain"] == errors["tf32"]
    with pytest.raises(KeyError):
        gaps["int8"]


def test_nothing_is_changed() -> None:
    model, plain, x = pair()
    before = [value.clone() for m in (model, plain) for value in (*m.state_dict().values(), x)]
    assert rmfx.precision_gaps(model, plain, x) == rmfx.precision_gaps(model, plain, x, example_kwargs={})
    after = [value for m in (model, plain) for value in (*m.state_dict().values(), x)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_overflow_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2) * 1e4)
        model[1].weight.copy_(torch.eye(2) * 1e-4)
    gentle = copy.deepcopy(model)
    with torch.no_grad():
        for layer in gentle:
            layer.weight.copy_(torch.eye(2))
    gaps = rmfx.precision_gaps(model, gentle, torch.full((1, 2), 100.0), precisions=["bfloat16", "float16"])
    assert gaps["float16"].original == math.inf and gaps["float16"].plain < 1e-7 and gaps["float16"].ratio is None
    assert str(gaps).splitlines()[2].split() == ["float16", "overflow", "2.5e-08", "-"]
    assert gaps.to_dict()["float16"]["original"] == "overflow"
    assert gaps["bfloat16"].original < 0.01
    inputs = rmfx.precision_gaps(model, gentle, torch.full((1, 2), 1e5), precisions=["float16"])
    assert str(inputs).splitlines()[1] == "float16             the inputs overflow in float16"


def test_overflow_inside_is_seen_per_layer() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval(), torch.full((1, 2), -100.0)
    with torch.no_grad():
        model[0].weight.fill_(1e4)  # - infinity in float16, which ReLU makes 0 of
    plain = rmfx.convert(model, x)
    gap = rmfx.precision_gaps(model, plain, x, precisions=["float16"], per_layer=True)["float16"]
    assert [layer.plain == math.inf for layer in gap.layers] == [True, False, False]
    assert gap.layers[0].own == gap.layers[0].original == math.inf
    assert gap.to_dict()["layers"][0]["own"] == "overflow" and gap.plain < 0.01


def test_code_that_insists_on_a_dtype_is_a_line_with_the_reason() -> None:
    model = Lambda(lambda m, x: m.net(x.double().to(x.dtype)) + (0 if x.dtype != torch.float16 else m.net(x.float())))
    model.net = nn.Linear(2, 2)
    gaps = rmfx.precision_gaps(model.eval(), model, torch.ones(1, 2), precisions=["float32", "float16"])
    assert str(gaps["float16"].reason).startswith("the original cannot be run: ") and gaps["float16"].plain is None
    assert "the original cannot be run: " in str(gaps).splitlines()[2] and gaps["float32"].reason is None


def test_integers_and_dictionaries_of_outputs() -> None:
    model = Lambda(lambda m, x: {"class": m.net(x).argmax(1), "logits": m.net(x)}, net=nn.Linear(3, 3)).eval()
    assert rmfx.precision_gaps(model, model, torch.randn(5, 3))["bfloat16"].ratio == 1


def test_errors() -> None:
    model, plain, x = pair()
    with pytest.raises(RmfxError, match="unknown precision 'int8': choose among float64, float32, tf32"):
        rmfx.precision_gaps(model, plain, x, precisions=["int8"])
    with pytest.raises(VerificationError, match="return different outputs"):
        rmfx.precision_gaps(model, nn.Sequential(plain, nn.Flatten()), x)
    with pytest.raises(VerificationError, match="infinities or NaN in float64"):
        rmfx.precision_gaps(model, plain, x * math.nan)
    with pytest.raises(UnsupportedModelError, match="cannot be run in float64 on these inputs"):
        rmfx.precision_gaps(model, plain, x[:, :2])
    with pytest.raises(RmfxError, match="need the GraphModule that rmfx.convert makes, not a Sequential"):
        rmfx.precision_gaps(model, model, x, per_layer=True)


# -- per layer --------------------------------------------------------------------------------------------------------


def test_errors_of_layers_and_sums() -> None:
    """Against the same numbers taken by hooks."""
    model, plain, x = pair()
    gap = rmfx.precision_gaps(model, plain, x, precisions=["bfloat16"], per_layer=True)["bfloat16"]
    rounded = x.bfloat16()
    low, exact = copy.deepcopy(plain).bfloat16(), copy.deepcopy(plain).double()
    values = [
        _outputs(network, rounded.to(dtype)) for network, dtype in ((low, torch.bfloat16), (exact, torch.float64))
    ]
    assert [layer.layer for layer in gap.layers] == list(values[0]) and len(gap.layers) > 10
    sums = {entry.node: entry.place for entry in rmfx.report(plain).entries}
    removed = {str(n.target): sums[n.meta["origin"]] for n in plain.graph.nodes if n.meta.get("origin") in sums}
    assert len(removed) == 3
    for layer in gap.layers:
        if layer.layer in removed:
            # what the original adds is what the activation behind the sum reads
            name = f"{removed[layer.layer]}.act"
            theirs = [_inputs(copy.deepcopy(model).to(d), rounded.to(d))[name] for d in (torch.bfloat16, torch.float64)]
            assert layer.place == removed[layer.layer] and layer.original == pytest.approx(_error(*theirs), rel=1e-6)
            assert layer.plain == pytest.approx(_error(values[0][layer.layer], theirs[1]), rel=1e-6)
        elif layer.original is None:
            assert layer.plain == pytest.approx(_error(*(v[layer.layer] for v in values)), rel=1e-6)
        assert layer.own <= 2**-7
    assert gap.layers[-1].plain == gap.plain and gap.layers[-1].original == gap.original
    assert all(layer.own == 0 for layer in gap.layers if isinstance(plain.get_submodule(layer.layer), nn.ReLU))


def _outputs(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, __, y, name=name: found.__setitem__(name, y))
    network(x)
    return found


def _inputs(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _, args, __, name=name: found.__setitem__(name, args[0]))
    network(x)
    return found


def _error(actual: Tensor, truth: Tensor) -> float:
    return float(((actual.double() - truth).abs().max() / truth.abs().max()).detach())


def test_the_layer_that_rounds_badly_is_the_one_with_an_error_of_its_own() -> None:
    """Differences of nearly equal numbers are lost in one layer; those behind it only pass them on."""
    model = nn.Sequential(*cbr(3, 4), *cbr(4, 4), *cbr(4, 4)).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        model[3].weight[:, 1] = -model[3].weight[:, 0]
        model[3].weight[:, :2] *= 300
        model[0].weight[1] = model[0].weight[0] * (1 + 2**-8)
    plain = rmfx.convert(model, x)
    gap = rmfx.precision_gaps(model, plain, x, precisions=["tf32"], per_layer=True)["tf32"]
    own = {layer.layer: layer.own for layer in gap.layers}
    gathered = {layer.layer: layer.plain for layer in gap.layers}
    assert max(own, key=lambda name: own[name]) == "3" and own["3"] > 20 * own["6"]
    assert gathered["6"] > 10 * own["6"]
    shown = str(rmfx.precision_gaps(model, plain, x, precisions=["tf32"], per_layer=True)).splitlines()
    assert shown[3].split() == ["tf32", "own", "plain", "original"] and len(shown) == 4 + len(gap.layers)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(rmfx_command: Runner, nets: Path) -> None:
    assert rmfx_command("convert", "mine.py:net", "--size", 9, "-o", "plain.rmfx").code == 0
    arguments = ("verify", "mine.py:net", "plain.rmfx", "--size", 9)
    done = rmfx_command(*arguments, "--gaps")
    lines = done.out.splitlines()
    assert done.code == 0 and lines[0].startswith("equal: ") and "tf32 (simulated)" in lines[4] and len(lines) == 7
    data = json.loads(rmfx_command(*arguments, "--gaps", "--per-layer", "--json").out)
    assert set(data["gaps"]) == {"float64", "float32", "tf32", "bfloat16", "float16"}
    shared = [layer["layer"] for layer in data["gaps"]["tf32"]["layers"] if layer["original"] is not None]
    assert {"2.b", "3.b"} <= set(shared) and "gaps" not in json.loads(rmfx_command(*arguments, "--json").out)
    done = rmfx_command(*arguments, "--per-layer")
    assert done.code == 2 and "--per-layer belongs to --gaps" in " ".join(done.err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(rmfx_command: Runner, nets: Path) -> None:
    done = rmfx_command("verify", "mine.py:net", "mine.py:net", "--size", 9, "--device", "cuda")
    assert done.code == 2 and "torch sees no CUDA device" in done.err


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_verification_on_a_gpu_is_ieee_whatever_is_set() -> None:
    model, plain, x = pair()
    model, plain, x = model.cuda(), plain.cuda(), x.cuda()
    torch.set_float32_matmul_precision("high")
    try:
        found = rmfx.verify(model, plain, x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.float32_original < 2e-6 and found.float32_converted < 2e-6


@pytest.mark.gpu
def test_simulated_tf32_is_that_of_the_device() -> None:
    factors = torch.randn(256, 256), torch.randn(256, 256)
    if not (chosen := precision("tf32", torch.device("cuda"))).simulated:
        with float32_arithmetic("tf32"):
            actual = factors[0].cuda() @ factors[1].cuda()
        a, b = (round_to_tf32(factor).double() for factor in factors)
        exact = factors[0].double() @ factors[1].double()
        rounding, rest = float((exact - a @ b).abs().max()), float((actual.cpu() - a @ b).abs().max())
        assert rest < rounding / 10, f"the device does not round factors this way: {rest} of {rounding}"
    assert chosen.simulated == (torch.cuda.get_device_capability()[0] < 8)


@pytest.mark.gpu
def test_gaps_on_a_gpu() -> None:
    model, plain, x = pair()
    simulated = rmfx.precision_gaps(model, plain, x)
    gaps = rmfx.precision_gaps(model.cuda(), plain.cuda(), x.cuda(), per_layer=True)
    assert gaps["float32"].plain < 2e-6 and gaps["tf32"].plain > 1e-5
    for name in ("tf32", "bfloat16", "float16"):
        assert 0.2 < gaps[name].plain / simulated[name].plain < 5
    assert all(len(gap.layers) == len(gaps["tf32"].layers) for gap in gaps.gaps)
