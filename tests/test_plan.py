"""Plans: priced, deterministic, saved, followed again, and never another function."""

from __future__ import annotations

import copy
import json
import operator
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nets import build
from oracle import assert_equivalent
from torch import Tensor, nn

import rmfx
from rmfx import models
from rmfx.errors import PlanError, PriceCacheWarning, RmfxError
from rmfx.graph.cost import network_macs
from rmfx.hostile import randomise
from rmfx.measure.target import RUNTIMES, Target
from rmfx.models.mobilenet_v1_shaped import PartialResidual
from rmfx.modules import ChannelsLast
from rmfx.plan import auto
from rmfx.plan.cache import Pair, PriceCache
from rmfx.plan.roofline import cost
from rmfx.plan.value import Choice, Plan
from rmfx.prepare import prepare

IMAGE = (2, 3, 17, 15)


def resnet(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A small ResNet in float64 with hostile statistics, and an input."""
    torch.manual_seed(seed)
    x = 8 * torch.randn(*IMAGE, dtype=torch.float64)
    return randomise(models.cifar_resnet(8).double().eval(), x / 8, seed), x


def shaped() -> tuple[nn.Module, Tensor]:
    """The network whose seams pay, and an input."""
    torch.manual_seed(0)
    x = 8 * torch.randn(2, 3, 32, 32, dtype=torch.float64)
    return randomise(models.mobilenet_v1_shaped(width_multiple=0.25).double().eval(), x / 8, 0), x


def removing_all(model: nn.Module, x: Tensor, **more: object) -> Plan:
    """A plan that removes every sum."""
    entries = rmfx.explain(model, x).entries
    choices = tuple(Choice("remove_residual", entry.node, entry.place, True) for entry in entries)
    return Plan(Target(), (tuple(x.shape),), choices, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("make", [resnet, pytest.param(shaped, marks=pytest.mark.slow)])
def test_a_planned_network_computes_the_same(runtime: str, make: object) -> None:
    model, x = make()  # type: ignore[operator]
    before = copy.deepcopy(model.state_dict())
    planned = rmfx.convert(model, x, policy="auto", target=runtime, measure=False)
    kept = x.clone()
    assert_equivalent(model, planned, x)
    assert_equivalent(model, planned, x)  # what is written in place is not what is kept
    assert torch.equal(x, kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_planning_is_deterministic() -> None:
    model, x = resnet()
    first, second = (rmfx.make_plan(model, x, measure=False) for _ in range(2))
    assert first == second and first.choices


@pytest.mark.slow
def test_dear_sums_stay_and_seams_pay() -> None:
    model, x = resnet()
    assert rmfx.make_plan(model, x, target="onnxruntime", measure=False).count("remove_residual") == 0
    torch.manual_seed(0)
    network, images = models.mobilenet_v1_shaped().eval(), torch.randn(8, 3, 32, 32)
    plan = rmfx.make_plan(network, images, target="eager", measure=False)
    assert plan.count("remove_residual") > 3 and plan.count("fuse_convs") > 3


def test_a_plan_survives_a_file(tmp_path: Path) -> None:
    model, x = resnet()
    plan = rmfx.make_plan(model, x, measure=False)
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert "remove_residual" in str(plan)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "no plan"), ("[]", "no plan"), ('{"version": 99}', "another version"), ('{"version": 1}', "no plan")],
)
def test_what_is_no_plan_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=reason):
        Plan.from_json(text)
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(tmp_path / "missing.json")


def test_a_plan_fits_another_checkpoint() -> None:
    (model, x), (other, _) = resnet(), resnet(1)
    plan = removing_all(model, x)
    plain = rmfx.apply_plan(plan, other, x)
    assert rmfx.report(plain).count("removed") == 3
    assert_equivalent(other, plain, x)


def test_a_plan_names_what_it_cannot_do() -> None:
    model, x = resnet()
    plan = removing_all(model, x)
    missing = replace(plan.choices[0], node="add_99")
    with pytest.raises(PlanError, match=r"add_99 \(remove_residual\): the model has no such place"):
        rmfx.apply_plan(replace(plan, choices=(missing,)), model, x)
    shifted = replace(plan.choices[0], variant={"carrier": "direct"})
    signed = models.mobilenet_v1_shaped(width_multiple=0.25).double().eval()  # ReLU acts on what is carried
    signed_plan = removing_all(signed, x)
    choices = tuple(replace(choice, variant=shifted.variant) for choice in signed_plan.choices)
    with pytest.raises(PlanError, match="cannot be followed at"):
        rmfx.apply_plan(replace(signed_plan, choices=choices), signed, x)
    unknown = replace(plan.choices[0], variant={"colour": "red"})
    with pytest.raises(PlanError, match="options it does not have, at add"):
        rmfx.apply_plan(replace(plan, choices=(unknown,)), model, x)


def test_to_do_nothing_is_a_plan() -> None:
    model, x = resnet()
    same = rmfx.apply_plan(Plan(Target(), original=True), model, x)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in same.modules())
    assert_equivalent(model, same, x)


def test_layouts_are_finished_exactly(tmp_path: Path) -> None:
    model, x = resnet()
    plan = removing_all(model, x, channels_last=True, in_place=True)
    finished = rmfx.apply_plan(plan, model, x)
    convs = [layer for layer in finished.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)
    assert any(isinstance(layer, ChannelsLast) for layer in finished.modules())
    assert any(getattr(layer, "inplace", False) for layer in finished.modules())
    assert_equivalent(model, finished, x)
    again = rmfx.load(rmfx.save(finished, tmp_path / "net.rmfx"))
    assert torch.equal(again(x), finished(x))
    assert not any(isinstance(layer, ChannelsLast) for layer in rmfx.convert(finished, x).modules())


def test_sums_write_in_place_only_over_what_nobody_reads() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return (y + x).relu(), y

    model, x = Twice().double().eval(), torch.randn(*IMAGE, dtype=torch.float64)
    finished = rmfx.apply_plan(Plan(Target(), in_place=True), model, x)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(finished(x), model(x), strict=True))


def test_a_sum_of_two_types_is_not_written_in_place() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + x.double()

    model, x = Mixed().eval(), torch.randn(*IMAGE)
    finished = rmfx.apply_plan(Plan(Target(), in_place=True), model, x)
    assert finished(x).dtype == model(x).dtype == torch.float64
    assert torch.equal(finished(x), model(x))


def test_an_activation_behind_a_sum_writes_in_place() -> None:
    model, x = resnet()
    finished = rmfx.apply_plan(Plan(Target(), in_place=True), model, x)
    sums = [node for node in finished.graph.nodes if node.target in (operator.add, operator.iadd)]
    assert all(node.target is operator.iadd for node in sums)
    activations = [finished.get_submodule(str(next(iter(node.users)).target)) for node in sums]
    assert all(getattr(activation, "inplace", False) for activation in activations)


def test_a_plan_is_followed_with_what_is_known_of_values() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, image: Tensor) -> Tensor:
            return image + self.second(self.first(image).relu())

    model, x = Block().double().eval(), 2 * torch.rand(2, 4, 9, 7, dtype=torch.float64) - 1
    add = rmfx.explain(model, x).entries[0].node
    plan = Plan(Target(), choices=(Choice("remove_residual", add, "", True, {"carrier": "shift"}),))
    with pytest.raises(PlanError, match="pass value_ranges"):
        rmfx.apply_plan(plan, model, x)
    plain = rmfx.apply_plan(plan, model, x, value_ranges={"image": (-1.0, 1.0)})
    assert rmfx.report(plain).entries[0].carrier == "shift"
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)


def test_plans_take_concats(tmp_path: Path) -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.last(torch.cat((x, self.conv(x).relu()), 1))

    model, x = Dense().double().eval(), 8 * torch.randn(*IMAGE, dtype=torch.float64)
    concat = next(node.name for node in prepare(model, x, {}).gm.graph.nodes if node.target is torch.cat)
    plan = Plan(Target(), choices=(Choice("remove_residual", concat, "", True, {"concat": True}),))
    plain = rmfx.apply_plan(Plan.load(plan.save(tmp_path / "plan.json")), model, x)
    assert not any(node.target is torch.cat for node in plain.graph.nodes)
    assert_equivalent(model, plain, x)


def test_costs_count_what_layers_do() -> None:
    model, x = resnet()
    model = rmfx.convert(model, x, policy=[])  # sums behind convolutions, as runtimes fuse them
    gm = prepare(model, x, {}).gm
    eager, fused = (cost(gm.graph.nodes, Target(runtime)) for runtime in ("eager", "onnxruntime"))
    macs = network_macs(gm)
    assert macs is not None and eager.macs == fused.macs == len(x) * macs
    assert eager.kernels > fused.kernels + 5 and eager.activation_bytes > fused.activation_bytes
    assert eager.parameters == sum(p.numel() for p in model.parameters())


def test_measured_prices_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_TRIAL_SECONDS", 0.1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *(PartialResidual(16, 12, 16, 1, 4) for _ in range(2))).eval()
    x = 8 * torch.randn(2, 3, 16, 16)
    first: list[str] = []
    plan = rmfx.make_plan(model, x, measure=600, cache=tmp_path, on_step=first.append)
    assert any(choice.measured for choice in plan.choices) and any("whole network" in step for step in first)
    assert any("whole network" in note for note in plan.notes)
    second: list[str] = []
    rmfx.make_plan(model, x, measure=600, cache=tmp_path, on_step=second.append)
    assert all("whole network" in step for step in second), "places were measured again"
    assert_equivalent(model.double(), rmfx.apply_plan(plan, model, x.double()), x.double())


@pytest.mark.slow
def test_int8_has_prices_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_TRIAL_SECONDS", 0.1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *(PartialResidual(16, 12, 16, 1, 4) for _ in range(2))).eval()
    x = 8 * torch.randn(2, 3, 16, 16)
    timed: dict[str, list[str]] = {}
    for runtime in ("onnxruntime", "onnxruntime-int8"):
        plan = rmfx.make_plan(
            model, x, target=runtime, measure=600, cache=tmp_path, on_step=timed.setdefault(runtime, []).append
        )
        assert_equivalent(model.double(), rmfx.apply_plan(plan, model, x.double()), x.double())
        model.float()
    assert all(any("layers on" in step for step in steps) for steps in timed.values()), (
        "a price was taken from the other"
    )


def test_a_damaged_price_is_measured_again(tmp_path: Path) -> None:
    cache, pair = PriceCache(tmp_path), Pair(1.0, 0.5, 0.4, 0.6)
    cache.put(("a",), pair)
    assert PriceCache(tmp_path).get(("a",)) == pair and PriceCache(tmp_path).get(("b",)) is None
    for file in tmp_path.iterdir():
        file.write_text("{")
    assert PriceCache(tmp_path).get(("a",)) is None


@pytest.mark.parametrize("home", ["XDG_CACHE_HOME", "HOME"])
def test_prices_lie_where_the_user_keeps_caches(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # counts for nothing, by the XDG specification
    monkeypatch.setenv(home, str(tmp_path))
    PriceCache().put(("a",), Pair(1.0, 0.5, 0.4, 0.6))
    folder = tmp_path / "rmfx" if home == "XDG_CACHE_HOME" else tmp_path / ".cache" / "rmfx"
    assert len([*(folder / "prices").iterdir()]) == 1


def test_a_cache_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache, pair = PriceCache(tmp_path / "file" / "below"), Pair(1.0, 0.5, 0.4, 0.6)
    with pytest.warns(PriceCacheWarning, match="measured again next time: .*Not a directory") as told:
        cache.put(("a",), pair)
        cache.put(("b",), pair)
    assert len(told) == 1 and cache.get(("a",)) == cache.get(("b",)) == pair


def test_without_a_home_prices_are_kept_in_memory() -> None:
    code = (
        "import pwd, warnings\n"
        "def nobody(user): raise KeyError(user)\n"
        "pwd.getpwuid = nobody\n"
        "import rmfx\n"
        "from rmfx.plan.cache import Pair, PriceCache\n"
        "cache, pair = PriceCache(), Pair(1.0, 0.5, 0.4, 0.6)\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    cache.put(('a',), pair)\n"
        "    cache.put(('b',), pair)\n"
        "print(cache.get(('a',)) == pair, [str(each.message).partition(':')[0] for each in told])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "True ['prices are measured again next time']\n", done.stderr


def test_bad_requests_say_what_to_do() -> None:
    model, x = resnet()
    with pytest.raises(PlanError, match="needs example_inputs"):
        rmfx.convert(model, policy="auto")
    with pytest.raises(RmfxError, match="unknown runtime 'tvm': choose one of eager, inductor, onnxruntime"):
        rmfx.convert(model, x, policy="auto", target="tvm")
    with pytest.raises(RmfxError, match="int8 kernels for the CPU only, not for cuda: choose cpu"):
        rmfx.convert(model, x, policy="auto", target="onnxruntime-int8:cuda")
    with pytest.raises(RmfxError, match="unknown device 'tpu'"):
        rmfx.make_plan(model, x, target="eager:tpu")
    with pytest.raises(RmfxError, match="keep_bn=True is for training"):
        rmfx.convert(model, x, policy="auto", keep_bn=True)
    with pytest.raises(RmfxError, match="fuse, max_growth and drop_dead_channels have no say where a plan decides"):
        rmfx.convert(model, x, policy="auto", max_growth=1.0)
    with pytest.raises(RmfxError, match="measure must be"):
        rmfx.convert(model, x, policy="auto", measure=-1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"node": ["add"]}, r"node is \['add'\]"),
        ({"before_ms": "1"}, "before_ms is '1'"),
        ({"variant": [1]}, r"variant is \[1\]"),
        ({"applied": "no"}, "applied is 'no'"),
    ],
)
def test_a_plan_of_other_types_is_no_plan(changes: dict[str, object], told: str) -> None:
    plan = Plan(Target("eager"), ((1, 3, 8, 8),), (Choice("remove_residual", "add", "", True),))
    data = json.loads(plan.to_json())
    data["choices"][0] |= changes
    with pytest.raises(PlanError, match=told):
        Plan.from_json(json.dumps(data))


def test_only_plans_with_options_that_exist_are_applied() -> None:
    model, x = build("basic_identity")
    for other in ("plan.json", None):
        with pytest.raises(PlanError, match="apply_plan takes a plan"):
            rmfx.apply_plan(other, model, x)  # type: ignore[arg-type]
    [entry] = rmfx.explain(model, x).entries
    bogus = Choice("remove_residual", entry.node, entry.place, True, {"carrier": "bogus"})
    with pytest.raises(PlanError, match="a bad option, at add: carrier must be one of .*, got 'bogus'"):
        rmfx.apply_plan(Plan(Target("eager"), choices=(bogus,)), model, x)
