"""rmfx.lower: from a plain network back to one that costs what the original did, with the same function."""

from __future__ import annotations

import copy
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import BLOCKS
from front import Lambda, hostile
from nets import NETS, build, conv
from oracle import assert_equivalent, assert_equivalent_on
from torch import Tensor, fx, nn

import rmfx
from rmfx.algebra.affine import scaled
from rmfx.algebra.widened import identity_norm, is_identity_at
from rmfx.errors import RmfxError, VerificationError
from rmfx.graph.cost import network_macs, network_parameters
from rmfx.graph.facts import annotate
from rmfx.hostile import randomise
from rmfx.layout.runs import Run
from rmfx.layout.stack import NEGATIONS, ROWS
from rmfx.lower import lower

# Sums of linear branches become one layer for good: there is nothing to carry.
MERGED = {"repvgg", "repvgg_strided", "acnet", "diracnet", "dbb", "mobileone"}
CARRIED = [name for name in NETS if name not in MERGED]
GATES = (
    "se after the middle",
    "se after the last",
    "se inline",
    "se of linear layers",
    "se, hard sigmoid",
    "eca",
    "1d",
)
CARRIERS: dict[str, dict[str, Any]] = {
    "auto": {},
    "split": {"carrier": "split"},
    "applied first": {"downsample": "conv"},
    "applied last": {"downsample": "input"},
}
# ReLU6 cannot be split.
UNSPLIT = {"inverted_relu6"}
# Applied first, the projection and the 3x3 layer beside it make the stride that the last layer made before.
CHEAPER = {"bottleneck_stride_3"}


def cost(gm: fx.GraphModule, x: Tensor) -> tuple[int, int]:
    """MACs and parameters."""
    counted = copy.deepcopy(gm)
    annotate(counted, (x,))
    macs = network_macs(counted)
    assert macs is not None
    return macs, network_parameters(counted)


def merged_biases(original: fx.GraphModule, x: Tensor) -> int:
    """One bias for each channel of a sum of two layers: the lowered network has both in one."""
    counted = copy.deepcopy(original)
    annotate(counted, (x,))
    sums = [node for node in counted.graph.nodes if node.target is operator.add]
    return sum(node.meta["shape"][1] for node in sums)


@pytest.mark.slow
@pytest.mark.parametrize("how", CARRIERS.values(), ids=list(CARRIERS))
@pytest.mark.parametrize("name", CARRIED)
def test_there_and_back_costs_what_it_did(name: str, how: dict[str, Any]) -> None:
    if name in UNSPLIT and "carrier" in how:
        pytest.skip("ReLU6 cannot be split")
    model, x = build(name)
    original, plain = rmfx.convert(model, x, policy=[]), rmfx.convert(model, x, **how)
    lowered = lower(plain, x)
    macs, parameters = cost(lowered, x)
    assert cost(plain, x)[0] >= macs
    assert (
        (macs < cost(original, x)[0])
        if name in CHEAPER and how == CARRIERS["applied first"]
        else (macs == cost(original, x)[0])
    )
    assert cost(original, x)[1] - merged_biases(original, x) <= parameters <= cost(original, x)[1]
    assert_equivalent(model, lowered, x)
    again = lower(lowered, x)
    assert again.code == lowered.code and rmfx.report(again).passes[0].applied == 0


@pytest.mark.parametrize("name", GATES)
def test_gates(name: str) -> None:
    model, x = block(f"gate: {name}")
    original, lowered = rmfx.convert(model, x, policy=[]), lower(rmfx.convert(model, x), x)
    assert cost(lowered, x) == cost(original, x)
    assert_equivalent(model, lowered, x)


def block(name: str) -> tuple[nn.Module, Tensor]:
    """A block in float64 with hostile weights, and a hostile input."""
    torch.manual_seed(0)
    x = hostile(*BLOCKS[name].shape)
    return randomise(BLOCKS[name].build().double(), x / 8), x


@pytest.mark.parametrize("name", CARRIED)
def test_at_other_sizes(name: str) -> None:
    model, x = build(name)
    lowered = lower(rmfx.convert(model))
    if x.dim() > 2:
        assert_equivalent_on(model, lowered, tuple(x.shape))
    else:
        assert_equivalent(model, lowered, x)


@pytest.mark.parametrize("name", list(NETS))
def test_a_network_with_its_shortcuts_stays_as_it_is(name: str) -> None:
    model, x = build(name)
    original = rmfx.convert(model, x, policy=[])
    same = lower(original, x)
    assert same.code == original.code
    assert rmfx.report(same).notes == () and rmfx.report(same).passes[0].applied == 0
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), same.parameters(), strict=True))


# Several of these keep something carried: stacks that runs cross, pools that carried channels go through.
@pytest.mark.parametrize("name", list(BLOCKS))
def test_every_block_is_the_same_function_and_never_dearer(name: str) -> None:
    model, x = block(name)
    plain = rmfx.convert(model, x)
    lowered = lower(plain, x)
    assert cost(lowered, x) <= cost(plain, x)
    for tensor in (x, hostile(*BLOCKS[name].shape, seed=1)):
        assert_equivalent(plain, lowered, tensor)
    again = lower(lowered, x)
    assert again.code == lowered.code


def float32(name: str) -> tuple[nn.Module, Tensor, tuple[int, int]]:
    """A network in float32, an input, and what its original form costs."""
    model, x = build(name)
    model, x = model.float(), x.float()
    return model, x, cost(rmfx.convert(model, x, policy=[]), x)


ONE_OF_EACH = (
    "basic_chain",
    "bottleneck_stride_2",
    "resnext",
    "inverted_relu6",
    "inverted_hardswish",
    "pre_activation",
)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_from_a_file(name: str, tmp_path: Path) -> None:
    model, x, original = float32(name)
    plain = rmfx.convert(model, x)
    rmfx.save(plain, tmp_path / "plain.rmfx")
    lowered = lower(rmfx.load(tmp_path / "plain.rmfx"), x)
    assert cost(lowered, x)[0] == original[0]
    assert_equivalent(plain, lowered, x)
    rmfx.save(lowered, tmp_path / "lowered.rmfx")
    assert torch.equal(rmfx.load(tmp_path / "lowered.rmfx")(x), lowered(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_from_onnx(name: str, tmp_path: Path) -> None:
    model, x, original = float32(name)
    rmfx.export(rmfx.convert(model, x), tmp_path / "plain.onnx", x)
    imported = rmfx.from_onnx(tmp_path / "plain.onnx")
    lowered = lower(imported, x)
    assert cost(lowered, x)[0] == original[0]
    assert_equivalent(imported, lowered, x)


def carrying(plain: fx.GraphModule) -> tuple[nn.Conv2d, nn.Conv2d]:
    """The two layers of the plain basic block."""
    *_, first, last = (layer for layer in plain.modules() if isinstance(layer, nn.Conv2d))
    return first, last


@pytest.mark.parametrize(
    ("gone", "shortcut"),
    [([1, 4], {"ChannelAffine"}), ([0, 1, 2], {"ChannelSlice", "ChannelPad"}), ([5], {"ChannelPad"})],
)
def test_a_pruned_network_gets_what_is_left_of_its_shortcut(gone: list[int], shortcut: set[str]) -> None:
    model, x = build("basic_identity")
    plain = rmfx.convert(model, x)
    original = rmfx.convert(model, x, policy=[])
    first, last = carrying(plain)
    with torch.no_grad():
        for channel in gone:
            first.weight[6 + channel] = 0.0
            last.weight[:, 6 + channel] = 0.0
    lowered = lower(plain, x)
    assert shortcut <= {type(module).__name__ for module in lowered.modules()}
    assert cost(lowered, x) == cost(original, x)
    assert_equivalent(plain, lowered, x)


def test_channels_that_were_cut_out() -> None:
    """Pruning tools make layers narrower instead of filling them with zeros."""
    model, x = build("basic_identity")
    plain = rmfx.convert(model, x)
    first, last = carrying(plain)
    kept = [0, 1, 2, 4, 5, 6, 7, 9, 11]
    with torch.no_grad():
        first.weight, first.bias = nn.Parameter(first.weight[kept]), nn.Parameter(first.bias[kept])
        last.weight = nn.Parameter(last.weight[:, kept])
    first.out_channels = last.in_channels = len(kept)
    lowered = lower(plain, x)
    assert {type(module).__name__ for module in lowered.modules()} >= {"ChannelAffine"}
    assert_equivalent(plain, lowered, x)
    assert cost(lowered, x)[0] < cost(plain, x)[0]


def norms_of(network: nn.Module) -> list[Any]:
    return [layer for layer in network.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]


@pytest.mark.parametrize("name", CARRIED)
def test_norms_stay_and_carried_channels_do_not(name: str) -> None:
    model, x = build(name)
    if not norms_of(model):
        pytest.skip("it has no norms to keep")
    plain = rmfx.convert(model, x, keep_bn=True)
    if rmfx.report(plain).carried_norms:
        rmfx.calibrate(plain, [hostile(*x.shape)])
    lowered = lower(plain, x)
    assert bool(norms_of(lowered)) == bool(norms_of(plain))
    assert_equivalent(model, lowered, x)
    assert rmfx.report(lowered).passes[0].applied == rmfx.report(lower(rmfx.convert(model, x), x)).passes[0].applied


@pytest.mark.parametrize("training", [False, True])
def test_dropouts_stay(training: bool) -> None:
    model, x = build("basic_chain")
    model = nn.Sequential(model, nn.Dropout(0.25)).train(training)
    plain = rmfx.convert(model, x, keep_bn=True)
    lowered = lower(plain, x)
    assert [layer.p for layer in lowered.modules() if isinstance(layer, nn.Dropout)] == [0.25]
    assert rmfx.report(lowered).passes[0].applied > 0
    assert all(layer.training is training for layer in lowered.modules())
    assert_equivalent(model.eval(), lowered.eval(), x)


def test_norms_of_single_precision_are_compared_as_if_they_were_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("basic_chain")
    plain = rmfx.calibrate(rmfx.convert(model.float(), x.float(), keep_bn=True), [hostile(*x.shape).float()])
    lowered = lower(plain, x.float())
    assert rmfx.report(lowered).passes[0].applied == 3 and norms_of(lowered)
    exact = Run.exit.fget
    with monkeypatch.context() as patched, pytest.raises(VerificationError):
        patched.setattr(Run, "exit", property(lambda run: scaled(exact(run), 1 + 1e-6, 1.0)))
        lower(plain, x.float())
    name, channels = next(iter(rmfx.report(plain).carried_norms.items()))
    with torch.no_grad():
        plain.get_submodule(name).weight[list(channels)] *= 1 + 1e-6  # not the identity any more
    assert rmfx.report(lower(plain, x.float())).passes[0].applied == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_norm_that_is_almost_the_identity_is_not_taken_for_it(dtype: torch.dtype) -> None:
    norm = identity_norm(nn.BatchNorm2d(3), 3).to(dtype)
    assert is_identity_at(norm).tolist() == [True, True, True]
    with torch.no_grad():
        norm.weight[0] *= 1 + torch.finfo(dtype).eps
        norm.bias[1] = torch.finfo(dtype).tiny
    assert is_identity_at(norm).tolist() == [False, False, True]


def test_known_values_let_a_shift_be_undone() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        return torch.sigmoid(m.head(x + m.narrow(m.wide(x).relu())))

    torch.manual_seed(0)
    layers = {"wide": conv(4, 12, 1, bias=True), "narrow": conv(12, 4, 1, bias=True), "head": conv(4, 5, 1, bias=True)}
    model, x = Lambda(forward, **layers).double().eval(), hostile(2, 4, 7, 8)
    plain = rmfx.convert(model, x, carrier="shift", value_ranges={"x": (-64.0, 64.0)}, shift_bits=8, fuse="never")
    assert rmfx.report(plain).count("removed") == 1 and not any(isinstance(m, nn.PReLU) for m in plain.modules())
    assert cost(lower(plain, x), x) == cost(plain, x)
    lowered = lower(plain, x, value_ranges={"x": (-64.0, 64.0)})
    assert cost(lowered, x) == cost(rmfx.convert(model, x, policy=[]), x)
    assert_equivalent(plain, lowered, x.clamp(-64, 64))


def test_the_network_is_left_as_it_was_and_the_result_is_its_own() -> None:
    model, x = build("basic_identity")
    plain = rmfx.convert(model, x)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    code = plain.code
    lowered = lower(plain, x)
    assert plain.code == code and all(torch.equal(before[name], t) for name, t in plain.state_dict().items())
    mine = {t.untyped_storage().data_ptr() for t in plain.state_dict().values()}
    assert not mine & {t.untyped_storage().data_ptr() for t in lowered.state_dict().values()}
    assert not any({ROWS, NEGATIONS, "affine"} & node.meta.keys() for node in lowered.graph.nodes)


def test_the_report_tells_what_was_lowered() -> None:
    model, x = build("basic_chain")
    plain = rmfx.convert(model, x)
    report = rmfx.report(lower(plain, x))
    assert report.passes[0].name == "lower_carried" and report.passes[0].applied == len(report.notes) == 3
    assert all("are a shortcut again" in note for note in report.notes)
    assert (report.totals.macs_before, report.totals.params_before) == cost(plain, x)
    assert set(report.parameter_map) == set(plain.state_dict())
    assert all(report.parameter_map.values())


def test_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("basic_identity")
    plain = rmfx.convert(model, x)
    with pytest.raises(RmfxError, match="verify=True needs example_inputs"):
        lower(plain, verify=True)
    exact = Run.exit.fget
    monkeypatch.setattr(Run, "exit", property(lambda run: scaled(exact(run), 1 + 1e-6, 1.0)))
    with pytest.raises(VerificationError):
        lower(plain, x)
    assert rmfx.report(lower(plain, x, verify=False)).passes[0].applied == 1
    assert rmfx.report(lower(plain)).passes[0].applied == 1
