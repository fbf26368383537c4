"""Pruning: what is taken out is what a network with those weights at 0 computes, and nothing else changes."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from nets import CONVS, NETS, build
from oracle import assert_equivalent
from torch import Tensor, fx, nn

import rmfx
from rmfx import account, models
from rmfx.errors import RmfxError
from rmfx.graph.facts import module_of
from rmfx.graph.linear import mixes
from rmfx.hostile import randomise
from rmfx.prepare import prepare
from rmfx.pruning.constants import scales_of
from rmfx.pruning.coupling import Coupling, couple
from rmfx.pruning.importance import scores
from rmfx.pruning.prune import Pruned, prune
from rmfx.pruning.removal import remove, settle
from rmfx.rewrite import finished

X, Y = torch.ones(2, 3, 16, 16), torch.tensor([1, 2])
FORMS = ("residual", "plain", "plain with norms")


def headed(name: str) -> tuple[nn.Module, Tensor]:
    """The network of that name with a layer behind it, so that what the network gives may be pruned, too."""
    model, x = build(name)
    with torch.no_grad():
        width = model(x).shape[1]
    dims = x.dim() - 2
    head = CONVS[dims](width, 5, 3, padding=1) if dims else nn.Linear(width, 5)
    return nn.Sequential(model, head.double()).eval(), x


def in_form(form: str, model: nn.Module, x: Tensor) -> nn.Module:
    if form == "residual":
        return model
    return rmfx.convert(model, x, keep_bn=form == "plain with norms", drop_dead_channels=False)


def some_of(coupling: Coupling, part: float, seed: int) -> Tensor:
    """A random choice of sets, never all that a node has."""
    dropped = coupling.free & (torch.rand(coupling.count, generator=torch.Generator().manual_seed(seed)) < part)
    for channels in coupling.channels.values():
        if bool(dropped[channels.sets].all()):
            dropped[channels.sets[0]] = False
    return dropped


def with_weights_at_zero(model: nn.Module, x: Tensor, dropped: Tensor) -> fx.GraphModule:
    """The same network with every weight at 0 that leads into a dropped channel."""
    prepared = prepare(copy.deepcopy(model), x, {}, keep_bn=True)
    coupling = couple(prepared.gm)
    gm = finished(prepared, account.report_of(prepared.before, (), prepared.gm, ()), False)
    with torch.no_grad():
        for node in gm.graph.nodes:
            module, channels = module_of(node), coupling.channels.get(node)
            layer = None if module is None else module if mixes(node) else scales_of(module)
            if layer is not None and channels is not None:
                layer.weight[dropped[channels.sets]] = 0
    return gm


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETS)
def test_what_goes_leaves_its_constant(name: str, form: str) -> None:
    model, x = headed(name)
    model = in_form(form, model, x)
    prepared = prepare(model, x, {}, keep_bn=True)
    coupling = couple(prepared.gm)
    dropped = some_of(coupling, 0.4, seed=len(name))
    assert bool(dropped.any())
    expected = with_weights_at_zero(model, x, dropped)
    removal = settle(prepared.gm, coupling, dropped)
    remove(prepared.gm, coupling, removal)
    pruned = finished(prepared, account.report_of(prepared.before, (), prepared.gm, ()), False)
    assert removal.lost == 0 and torch.equal(removal.gone | removal.homes, dropped)
    assert_equivalent(expected, pruned, x)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (model, pruned)]
    assert sizes[1] < sizes[0] or not bool(removal.gone.any())


def dead_net(seed: int = 0) -> tuple[nn.Module, Tensor, int]:
    """A ResNet of which a third of all norm scales are 0, an input, and how many channels inside blocks those are."""
    torch.manual_seed(seed)
    x = 8 * torch.randn(2, 3, 17, 15, dtype=torch.float64)
    model = randomise(models.resnet20().double().eval(), x / 8, seed)
    inside = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and name.endswith("branch.1"):
            dead = torch.rand(module.num_features) < 1 / 3
            module.weight.data[dead] = 0
            inside += int(dead.sum())
    return model, x, inside


@pytest.mark.parametrize("form", FORMS)
def test_dead_channels_go_and_nothing_changes(form: str) -> None:
    model, x, inside = dead_net()
    network = in_form(form, model, x)
    pruned = prune(network, x, threshold=1e-9, importance="l2" if form == "plain" else "bn")
    assert_equivalent(model, pruned.network, x)
    gone = sum(width.before - width.after for width in pruned.widths)
    assert inside > 100 and inside - 9 <= gone <= inside, "one channel of a block may stay for its constant"
    assert pruned.error < 1e-12 and pruned.lost == 0


def test_constants_can_be_left_out_and_the_error_is_told() -> None:
    model, x, _ = dead_net()
    options = {"threshold": 1e-9, "importance": "bn"}
    kept, left = (prune(model, x, keep_constants=keep, **options) for keep in (True, False))  # type: ignore[arg-type]
    assert kept.error < 1e-12 and left.error > 1e-4
    assert any(width.constants for width in kept.widths) and not any(width.constants for width in left.widths)
    with torch.no_grad():
        expected, actual = model(x), left.network(x)
    assert math.isclose(left.error, float((expected - actual).abs().max() / expected.abs().max()), rel_tol=1e-9)


NARROW = partial(models.rmnet_by_depth, 26, 3, 8, widths=(16, 32, 64, 128))


def classifier() -> tuple[nn.Module, Tensor, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    model = randomise(NARROW().eval(), x, 0)
    return model, x, [(x, torch.randint(0, 10, (16,)))]


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["taylor", "bn", "l1", "l2"])
def test_the_budget_is_met_and_the_model_left_alone(importance: str) -> None:
    model, x, data = classifier()
    plain = rmfx.convert(model, x, keep_bn=True)
    before = copy.deepcopy(plain.state_dict())
    pruned = prune(plain, x, budget={"macs": 0.5}, importance=importance, data=data)
    assert 0.45 < pruned.macs[1] / pruned.macs[0] <= 0.5 and pruned.parameters[1] < pruned.parameters[0]
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert all(p.grad is None for p in plain.parameters())
    assert pruned.network(x).shape == (16, 10) and 0 < pruned.error < 2


def test_carried_channels_go_one_by_one() -> None:
    model, x, data = classifier()
    alone = prune(rmfx.convert(model, x), x, amount=0.3, data=data)
    together = prune(model, x, amount=0.3, data=data)
    assert len(alone.widths) > len(together.widths), "a residual network has fewer choices"


@pytest.mark.parametrize("keep_bn", [False, True])
def test_what_is_left_of_shortcuts_can_be_shortcuts_again(keep_bn: bool) -> None:
    model, x = build("basic_chain")
    plain = rmfx.convert(model, x, keep_bn=keep_bn)
    left, back = (prune(plain, x, amount=0.2, importance="l1", lower=lower) for lower in (False, True))
    assert "add" not in left.network.code and "add" in back.network.code
    assert_equivalent(left.network, back.network, x)
    assert back.macs[0] == left.macs[0] and back.macs[1] < left.macs[1] and back.parameters[1] < left.parameters[1]
    assert back.error == pytest.approx(left.error)
    report = rmfx.report(back.network)
    assert (report.totals.macs_before, report.totals.macs_after) == back.macs
    assert any("channels are gone" in note for note in report.notes) and any(
        "shortcut" in note for note in report.notes
    )


@pytest.mark.parametrize("round_to", [4, 8])
@pytest.mark.parametrize("wish", [{"amount": 0.4}, {"budget": {"macs": 0.5}}, {"amount": 0.4, "scope": "layer"}])
def test_widths_are_multiples(wish: dict[str, object], round_to: int) -> None:
    model, x, data = classifier()
    pruned = prune(rmfx.convert(model, x), x, data=data, round_to=round_to, **wish)  # type: ignore[arg-type]
    changed = [width for width in pruned.widths if width.after < width.before]
    assert changed and all(width.after % round_to == 0 and width.after > 0 for width in changed)


def test_the_cheapest_per_mac_go_first() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 4), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    alike = lambda gm, coupling: torch.ones(coupling.count)  # noqa: E731
    pruned = prune(model, x, amount=0.25, importance=alike, per_mac=True)
    assert [(width.before, width.after) for width in pruned.widths] == [(8, 4), (8, 8)]
    each = prune(model, x, amount=0.25, importance=alike, scope="layer")
    assert [width.after for width in each.widths] == [6, 6]


def test_taylor_is_the_change_of_the_loss() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double().eval()
    seen: list[Tensor] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets).sum()  # linear: the first order is all there is

    def spy(gm: fx.GraphModule, coupling: Coupling) -> Tensor:
        seen.append(scores(gm, coupling, "taylor", [(x, torch.ones(5, 1))], loss))
        return seen[0]

    prune(model, x, amount=0.2, importance=spy)
    hidden = model[1](model[0](x))
    left = torch.relu(model[0].bias)
    expected = ((hidden - left) * model[2].weight).square().mean(0)
    assert torch.allclose(seen[0][4:10], expected, rtol=1e-9), "inputs come first, then the hidden channels"


def test_everything_a_layer_type_needs_is_narrowed() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 12, 3, padding=1)
            self.norm = nn.BatchNorm2d(12)
            self.slopes = nn.PReLU(12)
            self.squeeze, self.spread = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
            self.left, self.right = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 6, 3, padding=1)
            self.shuffle = nn.ChannelShuffle(2)
            self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=2)
            self.depthwise = nn.Conv2d(24, 48, 3, padding=1, groups=24)
            self.head = nn.Linear(48 * 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.slopes(self.norm(self.stem(x)))
            x = x * torch.sigmoid(self.spread(torch.relu(self.squeeze(x.mean([2, 3], keepdim=True)))))
            x = torch.relu(torch.cat([self.left(x), self.right(x)], 1))
            x = torch.relu(self.depthwise(torch.relu(self.grouped(self.shuffle(x)))))
            return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))

    torch.manual_seed(0)
    x = 8 * torch.randn(2, 3, 12, 12, dtype=torch.float64)
    model = randomise(Many().double().eval(), x / 8, 0)
    coupling = couple(prepare(model, x, {}).gm)
    dropped = some_of(coupling, 0.5, seed=1)
    choice = lambda gm, coupling: torch.where(dropped, 0.0, 1.0)  # noqa: E731
    pruned = prune(model, x, threshold=0.5, importance=choice)
    assert_equivalent(with_weights_at_zero(model, x, dropped), pruned.network, x)
    assert pruned.fixed == {"head": "it is an output of the network"}
    assert all(width.after < width.before for width in pruned.widths), str(pruned.widths)


def test_what_cannot_be_pruned_says_why() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with pytest.raises(
        RmfxError, match=r"nothing of this network can be pruned: .*GroupNorm\) does not treat channels"
    ):
        prune(model, x, amount=0.5, importance="l2")
    longer = nn.Sequential(model, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    pruned = prune(longer, x, amount=0.5, importance="l2")
    assert "GroupNorm" in pruned.fixed["0.0"] and [width.layer for width in pruned.widths] == ["0.3"]


def test_what_follows_something_unknown_is_pruned_again() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.LayerNorm(8)
            self.wide, self.back, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            tokens = self.back(torch.relu(self.wide(self.norm(x.permute(0, 2, 3, 1)))))
            return self.head(x + tokens.permute(0, 3, 1, 2))

    torch.manual_seed(0)
    model, x = Tokens().double().eval(), 8 * torch.randn(2, 3, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        model.wide.weight[::2] = 0
    pruned = prune(model, x, threshold=1e-9, importance="l2")
    assert [(width.layer, width.before, width.after) for width in pruned.widths] == [("wide", 16, 8)]
    assert_equivalent(model, pruned.network, x)
    assert "does not treat channels one by one" in pruned.fixed["stem"]


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ({}, "give one of amount, threshold and budget, got 0"),
        ({"amount": 0.1, "threshold": 0.1}, "got 2 of them"),
        ({"amount": 1.0}, "from 0 to less than 1, got 1.0"),
        ({"budget": {"flops": 0.5}}, "budget must be"),
        ({"budget": {"macs": 0.0}}, "a part above 0"),
        ({"budget": {"macs": 1e-6}}, "with all gone that may, "),
        ({"amount": 0.1, "scope": "block"}, "scope must be 'global' or 'layer', got 'block'"),
        ({"threshold": 0.1, "scope": "layer"}, "scope='layer' is for amount"),
        ({"amount": 0.1, "round_to": 0}, "round_to must be at least 1"),
        (
            {"amount": 0.1, "lower": True, "calibration": []},
            "least squares .* change the Dirac filters that lower=True",
        ),
        ({"amount": 0.1, "importance": "l3"}, "unknown importance 'l3': choose 'taylor', 'bn', 'l1', 'l2'"),
        ({"amount": 0.1, "importance": "taylor"}, "needs data="),
        ({"amount": 0.1, "importance": "taylor", "data": []}, "data holds no batch"),
        ({"amount": 0.1, "importance": lambda gm, coupling: torch.ones(3)}, "one per set, got"),
        ({"amount": 0.1, "importance": lambda gm, coupling: [1.0]}, "one per set, got a list"),
        ({"amount": 0.1, "importance": lambda gm, c: torch.full((c.count,), torch.nan)}, "gives NaN for .* sets"),
        ({"amount": "x"}, "amount must be a number, got 'x'"),
        ({"threshold": "x"}, "threshold must be a number, got 'x'"),
        ({"threshold": math.nan}, "threshold must be a number, got nan"),
        ({"budget": 0.5}, "budget must be .*, got 0.5"),
        ({"budget": {"macs": "0.5"}}, "budget must be"),
        ({"budget": {"latency_ms": "5", "target": "eager"}}, "budget must be"),
        ({"amount": 0.1, "round_to": 2.5}, "a whole number, got 2.5"),
        ({"amount": 0.1, "importance": "taylor", "data": [X]}, "data must hold pairs .*, got a Tensor"),
        ({"amount": 0.1, "importance": "taylor", "data": [(X * math.nan, Y)]}, "'taylor' gives NaN for"),
        (
            {"amount": 0.1, "importance": "taylor", "data": [(X, Y)], "loss": lambda out, labels: out.sum(1)},
            r"loss must give one number, .*, got a tensor \(2,\)",
        ),
        (
            {"amount": 0.1, "importance": "taylor", "data": [(X, Y)], "loss": lambda out, labels: torch.ones(())},
            "the loss does not depend on the network",
        ),
    ],
)
def test_bad_requests_say_what_to_do(wish: dict[str, object], told: str) -> None:
    model = models.resnet20().eval()
    with pytest.raises(RmfxError, match=told):
        prune(model, torch.randn(2, 3, 16, 16), **{"importance": "l2", **wish})  # type: ignore[arg-type]


def test_an_empty_example_is_refused_and_a_prune_that_prunes_nothing_says_so() -> None:
    model = models.resnet20().eval()
    with pytest.raises(RmfxError, match="one of them is empty"):
        prune(model, X[:0], amount=0.3, importance="l2")
    [note] = rmfx.report(prune(model, X, amount=0.3, importance="l2", round_to=1000).network).notes
    assert "pruned: 0 of" in note and "no chunk of round_to channels" in note


@pytest.mark.slow
def test_a_latency_is_met_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = classifier()
    taken: list[int] = []

    def time_of(network: nn.Module, inputs: object, target: object) -> object:
        taken.append(sum(p.numel() for p in network.parameters()))
        return taken[-1]

    monkeypatch.setattr("rmfx.pruning.prune.runner", time_of)
    monkeypatch.setattr("rmfx.pruning.prune.sample", float)  # as many milliseconds as parameters
    whole = sum(p.numel() for p in model.parameters())
    pruned = prune(model, x, budget={"latency_ms": 0.4 * whole, "target": "eager"}, importance="l2")
    assert 0.35 * whole < pruned.parameters[1] <= 0.4 * whole and 4 < len(taken) < 12
    with pytest.raises(RmfxError, match="the budget is 1 ms on eager:cpu; with all gone that may, it takes"):
        prune(model, x, budget={"latency_ms": 1, "target": "eager"}, importance="l2")


def test_norms_are_needed_to_rank_by_norms() -> None:
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(RmfxError, match="no batch norm; convert with keep_bn=True"):
        prune(rmfx.convert(models.resnet20().eval(), x), x, amount=0.1, importance="bn")
    with pytest.raises(RmfxError, match="prune needs example_inputs"):
        prune(models.resnet20().eval(), None, amount=0.1, importance="l2")


def test_a_pruned_network_is_a_network_as_any(tmp_path: Path) -> None:
    model, x, data = classifier()
    pruned = prune(rmfx.convert(model, x), x, budget={"macs": 0.6}, data=data, round_to=4)
    assert isinstance(pruned, Pruned) and "channels" in str(pruned) and pruned.to_dict()["macs"] == pruned.macs
    rmfx.save(pruned.network, tmp_path / "net.rmfx")
    assert torch.equal(rmfx.load(tmp_path / "net.rmfx")(x), pruned.network(x))
    lowered = rmfx.lower(pruned.network.double(), x.double())
    assert rmfx.report(lowered).totals.macs_after <= pruned.macs[1]  # type: ignore[operator]
    again = prune(pruned.network.float(), x, budget={"macs": 0.5}, data=data)
    assert again.macs[0] == pruned.macs[1] and again.macs[1] <= 0.5 * again.macs[0]
