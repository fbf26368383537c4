"""Reports: what is in them, how they print, that JSON keeps them, and that explain foretells them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from front import Lambda, hostile
from nets import NETS, Residual, build, conv
from torch import nn

import rmfx
from rmfx import Report, RmfxError
from rmfx.hostile import randomise
from rmfx.report import Entry, PassLine, Totals

OPTIONS: list[dict[str, Any]] = [
    {},
    {"carrier": "split"},
    {"downsample": "conv", "fuse": "always"},
    {"max_growth": 1.9},
    {"policy": ["1.1"]},
    {"keep_bn": True},
]
FOUR = ("fold_norm", "merge_branches", "remove_residual", "fuse_convs")


def mixed() -> tuple[nn.Module, torch.Tensor]:
    """One connection that is removed, one that a policy keeps, one that cannot be removed, with a size condition."""
    sized = Residual(nn.Sequential(nn.Conv2d(4, 6, 4, 2, 1), nn.ReLU(), conv(6, 6)), conv(4, 6, 1, 2))
    kept, refused = (Residual(nn.Sequential(conv(6, 6), act, conv(6, 6))) for act in (nn.ReLU(), nn.GroupNorm(2, 6)))
    x = hostile(2, 4, 8, 8)
    return randomise(nn.Sequential(sized, kept, refused).double(), x / 8), x


# -- contents ---------------------------------------------------------------------------------------------------------


def test_an_entry_says_where_what_and_how_much() -> None:
    model, x = build("basic_projection")
    (entry,) = rmfx.report(rmfx.convert(model, x)).entries
    assert (entry.place, entry.node, entry.name, entry.kind) == ("1", "add", "1", "projection")
    assert (entry.status, entry.carrier, entry.reason) == ("removed", "direct", None)
    before = 6 * 10 * 9 + 10 * 10 * 9 + 6 * 10
    after = 6 * 16 * 9 + 16 * 10 * 9
    assert (entry.macs_before, entry.macs_after) == (before * 16, after * 16)
    assert (entry.params_before, entry.params_after) == (before + 3 * 10, after + 16 + 10)  # norms are folded


def test_without_inputs_macs_are_unknown_and_parameters_are_not() -> None:
    model, x = build("basic_projection")
    report, sized = rmfx.report(rmfx.convert(model)), rmfx.report(rmfx.convert(model, x))
    (entry,), (other,) = report.entries, sized.entries
    assert (entry.macs_before, entry.macs_after) == (None, None)
    assert (report.totals.macs_before, report.totals.macs_after) == (None, None)
    assert (entry.params_before, entry.params_after) == (other.params_before, other.params_after)
    assert "MACs" not in report.summary() and "MACs" in sized.summary()


@pytest.mark.parametrize("name", NETS)
def test_totals_are_those_of_the_networks(name: str) -> None:
    model, x = build(name)
    converted = rmfx.convert(model, x, verify=False)
    totals = rmfx.report(converted).totals
    assert totals.params_before == sum(p.numel() for p in model.parameters())
    assert totals.params_after == sum(p.numel() for p in converted.parameters())
    for network, counted in ((model, totals.macs_before), (converted, totals.macs_after)):
        assert counted == macs(network, x)


def macs(network: nn.Module, x: torch.Tensor) -> int:
    """Multiply-accumulates per sample, counted while running."""
    total = 0

    def count(module: nn.Module, _: object, y: torch.Tensor) -> None:
        nonlocal total
        total += y.numel() // y.shape[0] * module.weight[0].numel()

    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return total


def test_every_pass_has_a_line() -> None:
    model, x = mixed()
    report = rmfx.report(rmfx.convert(model, x))
    assert tuple(line.name for line in report.passes) == FOUR
    lines = {line.name: line for line in report.passes}
    assert lines["remove_residual"].applied == 2
    ((place, reason),) = lines["remove_residual"].refused
    assert place.startswith("2") and "a GroupNorm" in reason


def test_norms_that_stay_are_told_with_their_reason() -> None:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()).eval()
    report = rmfx.report(rmfx.convert(model))
    lines = {line.name: line for line in report.passes}
    assert [reason for _, reason in lines["fold_norm"].refused] == [
        "batch norm without running statistics normalises by the statistics of each batch"
    ]


# -- the parameter map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_parameter_map_covers_every_tensor_of_the_model(options: dict[str, Any]) -> None:
    model, x = build("basic_chain")
    converted = rmfx.convert(model, x, **options)
    found = rmfx.report(converted).parameter_map
    assert list(found) == list(model.state_dict())
    targets = {target for names in found.values() for target in names}
    assert targets <= set(converted.state_dict())
    for name, names in found.items():
        assert names or name.endswith("num_batches_tracked"), name
    made = {
        name for name, module in converted.named_modules() if isinstance(module, nn.PReLU) or name.endswith(".carry")
    }
    left = set(converted.state_dict()) - targets
    assert all(name.rpartition(".")[0] in made or name.endswith("num_batches_tracked") for name in left), left


def test_the_parameter_map_says_where_weights_went() -> None:
    model, x = build("basic_projection")
    found = rmfx.report(rmfx.convert(model, x)).parameter_map
    assert found["0.0.weight"] == ("0.0.weight", "0.0.bias")  # the norm behind it gave it a bias
    last = ("1.branch.1.0.weight", "1.branch.1.0.bias")
    for source in ("1.branch.1.0.weight", "1.branch.1.1.running_var", "1.shortcut.0.weight", "1.shortcut.1.bias"):
        assert found[source] == last


def test_a_shared_weight_goes_where_each_user_goes() -> None:
    model = Lambda(lambda m, x: m.b(m.a(x).relu()).relu(), a=conv(4, 4), b=conv(4, 4))
    model.b.weight = model.a.weight
    found = rmfx.report(rmfx.convert(model.eval())).parameter_map
    assert list(found) == ["a.weight", "b.weight"]
    assert {name for names in found.values() for name in names} == {"a.weight", "b.weight"}


def test_tensors_without_a_layer_are_mapped_too() -> None:
    model = Lambda(lambda m, x: torch.maximum(m.a(x), m.floor), a=conv(4, 4), floor=torch.zeros(1)).eval()
    assert rmfx.report(rmfx.convert(model)).parameter_map == {"floor": ("floor",), "a.weight": ("a.weight",)}


# -- printing and JSON ------------------------------------------------------------------------------------------------


def test_the_table() -> None:
    model, x = mixed()
    report = rmfx.report(rmfx.convert(model, x, policy=lambda entry: entry.place != "1"))
    text = str(report)
    lines = text.splitlines()
    assert lines[0].split() == [
        "place",
        "kind",
        "status",
        "carrier",
        "MACs",
        "before",
        "after",
        "params",
        "before",
        "after",
    ]
    assert lines[2].split()[:4] == ["0", "projection", "removed", "masked"] and "(8, 8)" in lines[2]
    assert lines[3].split()[:4] == ["1", "identity", "kept", "direct"] and "not asked for by policy" in lines[3]
    assert lines[4].split()[:3] == ["2", "other", "refused"] and "a GroupNorm" in lines[4]
    assert report.summary() in lines
    assert report.summary().startswith("1 residual sums removed, 1 kept, 1 refused; parameters ")
    for name in FOUR:
        assert any(line.startswith(f"{name}: ") for line in lines)
    assert lines[0].index("kind") == lines[2].index("projection")


def test_large_counts_are_shortened() -> None:
    entry = Entry("layer1.0", "add", "identity", "removed", "direct", None, 999, 1_500, 2_500_000, 3_210_000_000)
    text = str(Report((entry,), Totals(10, 25)))
    for shown in ("999", "1.50 k", "2.50 M", "3.21 G", "10 -> 25 (2.50x)"):
        assert shown in text


def test_an_empty_report() -> None:
    report = rmfx.report(rmfx.convert(nn.Sequential(nn.ReLU()).eval()))
    assert report.entries == () and str(report).startswith("no residual sums found\n")
    assert "0 residual sums removed, 0 kept, 0 refused; parameters 0 -> 0" in str(report)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_json_keeps_everything(options: dict[str, Any]) -> None:
    model, x = build("basic_chain")
    report = rmfx.report(rmfx.convert(model, x, **options))
    text = json.dumps(report.to_dict())
    again = Report.from_dict(json.loads(text))
    assert again == report and str(again) == str(report)
    assert again.to_dict() == report.to_dict()


def test_json_keeps_reasons_conditions_and_notes() -> None:
    model, x = mixed()
    report = rmfx.report(rmfx.convert(model, x, policy=lambda entry: entry.place != "1"))
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report
    assert again.entries[0].size_conditions and again.entries[0].carried_taps and again.entries[2].reason
    assert isinstance(again.passes[0], PassLine) and isinstance(again.totals, Totals)


# -- explain ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_explain_is_the_report_of_convert(options: dict[str, Any], sized: bool) -> None:
    model, x = build("basic_chain")
    inputs = x if sized else None
    assert rmfx.explain(model, inputs, **options) == rmfx.report(rmfx.convert(model, inputs, **options))


@pytest.mark.parametrize("name", NETS)
def test_explain_is_the_report_of_convert_for_every_network(name: str) -> None:
    model, x = build(name)
    assert rmfx.explain(model, x) == rmfx.report(rmfx.convert(model, x, verify=False))


def test_explain_with_size_conditions() -> None:
    model, x = mixed()
    assert rmfx.explain(model, x) == rmfx.report(rmfx.convert(model, x))


def test_explain_computes_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from rmfx.algebra import kernels

    def touched(*_: object) -> None:
        raise AssertionError("a weight was computed")

    for name in ("norm_scale_shift", "regroup", "spread", "compose_weights", "compose_bias", "place_block"):
        monkeypatch.setattr(kernels, name, touched)
    model, x = build("basic_chain")
    assert rmfx.explain(model, x).count("removed") == 3
    with pytest.raises(AssertionError, match="a weight was computed"):
        rmfx.convert(model, x)


def test_explain_works_on_the_meta_device() -> None:
    model, x = build("basic_chain")
    assert rmfx.explain(model.to("meta"), x.to("meta")) == rmfx.explain(build("basic_chain")[0], x)


def test_explain_reads_weights_where_dead_channels_are_to_go() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    with torch.no_grad():
        model[2].weight[:, :6] = 0
    x = torch.randn(1, 3, 8, 8)
    told = rmfx.explain(model, x, drop_dead_channels=True)
    assert told == rmfx.report(rmfx.convert(model, x, drop_dead_channels=True))
    assert told.totals.params_after < told.totals.params_before
    with pytest.raises(RmfxError, match="on the meta device, where weights have no values"):
        rmfx.explain(model.to("meta"), x, drop_dead_channels=True)


def test_there_is_no_report_on_other_modules() -> None:
    with pytest.raises(RmfxError, match="^ReLU carries no rmfx report: pass the module that rmfx.convert or rmfx.load"):
        rmfx.report(nn.ReLU())  # type: ignore[arg-type]
