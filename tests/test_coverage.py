"""The coverage benchmark: its classes, its reading of reports, its figures, and one network from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rmfx
from benchmarks.coverage import row as row_module
from benchmarks.coverage import store
from benchmarks.coverage.classes import Census, ResidualSum
from benchmarks.coverage.figures import figures
from benchmarks.coverage.models import matching
from benchmarks.coverage.row import Order, measure
from benchmarks.coverage.sums import UNMENTIONED, Outcome, countable, outcomes, recording, tally
from benchmarks.coverage.weights import fill, uninitialised
from rmfx.errors import PartialConversionWarning
from rmfx.front.trace import trace
from rmfx.graph.facts import annotate
from rmfx.passes.normalise import normalise
from rmfx.report import Report

C = 4


def conv(kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(C, C, kernel, padding=kernel // 2, **options)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(C)


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.squeeze(x)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C // 2, C // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat((first, self.conv(second).relu()), 1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.place = conv(1), conv(1), conv(1), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)
        logits = q.transpose(1, 2) @ k + (q.transpose(1, 2) @ self.place(x).flatten(2))
        return (v @ logits.softmax(-1)).view(x.shape)


class Star(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(1), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).relu() * self.second(x)


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cos", torch.rand(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return x * self.cos + torch.cat((-second, first), 1) * self.cos


class Net(nn.Module):
    """``start``, then ``branch(x) + shortcut(x)``."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, start: nn.Module | None = None) -> None:
        super().__init__()
        self.start, self.branch = start or chain(conv(), nn.ReLU()), branch
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        return self.branch(x) + self.shortcut(x)


def sums_of(model: nn.Module) -> list[ResidualSum]:
    gm = normalise(trace(model.eval()))
    annotate(gm, (torch.zeros(2, C, 8, 8),))
    return list(Census(gm).sums())


NETS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "basic": ("A", lambda: Net(chain(conv(), norm(), nn.ReLU(), conv(), norm()))),
    "conv shortcut": ("B", lambda: Net(chain(conv(), norm(), nn.ReLU(), conv(), norm()), conv(1))),
    "both signs": ("C", lambda: Net(chain(conv(), norm(), nn.ReLU6(), conv()), start=conv())),
    "gelu": ("D", lambda: Net(chain(conv(), norm(), nn.GELU(), conv()))),
    "gate": ("E", lambda: Net(chain(conv(), norm(), nn.ReLU(), conv(), Gate()))),
    "pre-activation": ("F", lambda: Net(chain(norm(), nn.ReLU(), conv(), norm(), nn.ReLU(), conv()))),
    "linear": ("G", lambda: Net(chain(conv(), norm()), conv(1))),
    "sample norm": ("H", lambda: Net(chain(nn.GroupNorm(1, C), conv(1), nn.GELU(), conv(1)))),
    "attention": ("I", lambda: Net(Attention())),
    "slices": ("J", lambda: Net(chain(conv(), Halves(), conv()))),
    "linear layers": ("H", lambda: Net(chain(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))),
    "max pool beside": ("K", lambda: Net(chain(conv(), nn.ReLU(), conv()), nn.MaxPool2d(3, 1, 1))),
    "average pool on it": ("K", lambda: Net(chain(conv(), nn.ReLU(), nn.AvgPool2d(3, 1, 1), conv()))),
    "a product that is no gate": ("K", lambda: Net(chain(conv(), Star(), conv()))),
    "two nonlinear": ("merge", lambda: Net(chain(conv(), nn.ReLU(), conv()), chain(conv(), nn.ReLU()))),
}


@pytest.mark.parametrize("name", NETS)
def test_each_class_is_recognised(name: str) -> None:
    kind, make = NETS[name]
    assert [item.kind for item in sums_of(make())] == [kind]


def test_sums_that_are_no_residuals_are_not_counted() -> None:
    assert sums_of(chain(conv(), Rotary())) == []


def test_a_sum_with_a_constant_is_none() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = nn.Parameter(torch.randn(1, C, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x.sigmoid() + self.place

    assert sums_of(Shifted()) == []


def test_the_branch_is_told_in_words() -> None:
    (item,) = sums_of(Net(chain(conv(), norm(), nn.ReLU(), conv()), conv(1)))
    assert (item.shortcut, item.branch) == ("conv", "conv bn relu conv")


def test_sums_are_paired_with_the_report() -> None:
    model = Net(chain(conv(), norm(), nn.ReLU(), conv())).eval()
    with recording() as recorded:
        report = rmfx.explain(model, torch.zeros(2, C, 8, 8))
    (outcome,) = recorded.outcomes
    assert (outcome.item.kind, outcome.status, outcome.reason) == ("A", "removed", "")
    assert recorded.entered(report) == "fx"
    (missing,) = outcomes([outcome.item], Report(entries=(), totals=report.totals))
    assert (missing.status, missing.reason) == ("missing", UNMENTIONED)


def test_parts_of_a_network_are_paired_each_with_its_own_report() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Net(chain(conv(), norm(), nn.ReLU(), conv()))
            self.second = Net(Attention())

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y) if float(y.sum()) > 0 else y

    model = Opaque().eval()
    with recording() as recorded, pytest.warns(PartialConversionWarning):
        report = rmfx.explain(model, torch.zeros(2, C, 8, 8))
    assert recorded.entered(report) == "partial"
    assert [(o.item.node, o.item.kind, o.status) for o in recorded.outcomes][0] == ("add", "A", "removed")


def test_a_recording_ends() -> None:
    model = Net(conv()).eval()
    with recording() as recorded:
        pass
    rmfx.explain(model)
    assert recorded.outcomes == [] and not recorded.doors


def test_reasons_lose_what_differs_between_networks() -> None:
    one = "'mul_3' (in layer1.0.se) stands on a branch: a mul of 2 tensors, read by relu_1, add_2"
    two = "'mul' (in layers.7) stands on a branch: a mul of 3 tensors, read by relu_17, add_2, conv_9"
    assert countable(one) == countable(two) == "~ stands on a branch: a mul of ~ tensors, read by ~"
    assert countable("a layer_norm stands here, a Conv2d there") == "a layer_norm stands here, a Conv2d there"


def test_a_tally_counts_classes_and_ranks_reasons() -> None:
    a, j = ResidualSum("add", "A", "", "conv"), ResidualSum("add_1", "J", "", "conv")
    found = [Outcome(a, "removed", ""), *(Outcome(j, "refused", reason) for reason in "xyx")]
    assert tally(found) == ({"A": {"removed": 1}, "J": {"refused": 3}}, [("J", "x", 2), ("J", "y", 1)])


def row(name: str, status: str = "right", **more: object) -> store.Row:
    sums = {"A": {"removed": 98, "refused": 2}, "J": {"removed": 6, "refused": 4}}
    reasons = [["A", "why", 2], ["J", "why", 4]]
    measured = {"difference": 1e-13, "noise": None, "entered": "fx", "sums": sums, "reasons": reasons}
    return {"model": name, "source": name.partition(":")[0], "status": status, **measured, **more}


def misses(*rows: store.Row, names: list[str] | None = None) -> set[str]:
    found = figures({r["model"]: r for r in rows}, names or [r["model"] for r in rows])
    return {figure.name for figure in found if not figure.reached}


FULL = {"A": {"removed": 5}, "J": {"removed": 1}}


def test_figures_are_reached_at_their_bounds() -> None:
    assert misses(row("torchvision:a", sums=FULL, reasons=[]), row("timm:a")) == set()


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        ([row("timm:a", "wrong", difference=1.0)], "networks that end in a wrong result"),
        ([row("timm:a", "crashed")], "networks that crash"),
        ([row("timm:a", "timeout")], "networks that crash"),
        ([row("timm:a", "counted")], "networks executed and compared in float64"),
        ([row("timm:a", "counted")], "sums of classes A to G removed exactly"),
        ([row("timm:a", "wrong", difference=1.0)], "sums of class J removed exactly"),
        ([row("timm:a", entered="none")], "networks that enter by some front door"),
        ([row("torchvision:a")], "the same in torchvision"),
        ([row("timm:a", reasons=[["A", "", 1]])], "remaining sums with a specific reason"),
        ([row("timm:a", reasons=[["A", UNMENTIONED, 1]])], "remaining sums with a specific reason"),
        ([row("timm:a", difference=1e-10)], "executed networks further off than 1e-11 and 100x noise"),
        ([row("timm:a", difference=float("nan"))], "executed networks further off than 1e-11 and 100x noise"),
    ],
)
def test_each_figure_can_be_missed(rows: list[store.Row], missed: str) -> None:
    assert missed in misses(*rows, row("torchvision:full", sums=FULL, reasons=[]))


def test_a_network_without_a_row_is_held_against_the_figures() -> None:
    full = row("torchvision:full", sums=FULL, reasons=[])
    missed = misses(full, row("timm:a"), names=["torchvision:full", "timm:a", "timm:b"])
    assert missed == {"networks executed and compared in float64", "networks that enter by some front door"}


def test_a_difference_within_the_noise_is_none() -> None:
    assert misses(row("torchvision:a", sums=FULL, reasons=[], difference=1e-9, noise=1e-10), row("timm:a")) == set()


def test_rows_survive_and_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for name, status in (("b", "crashed"), ("a", "right"), ("b", "right")):
        store.append(path, {"model": name, "status": status})
    store.compact(path, ["a", "b"])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"model": "a", "status": "right"},
        {"model": "b", "status": "right"},
    ]


def test_patterns_match_with_and_without_the_source() -> None:
    assert matching(["timm:a", "torchvision:a"], ["a"]) == ["timm:a", "torchvision:a"]
    assert matching(["timm:a", "torchvision:a"], ["timm:*"]) == ["timm:a"]


def test_initialisers_are_skipped_and_everything_is_filled() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128), nn.ReLU())
        model.table = nn.Parameter(nn.init.normal_(torch.full((100, 100), torch.nan)))
        return model.double()

    model, skipped = uninitialised(make)
    fill(model, torch.randn(2, 64, 8, 8, dtype=torch.float64), skipped)
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    weight = model[0].weight
    assert abs(float(weight.std()) * 24 - 1) < 0.05 and len(weight.unique()) == weight.numel()
    before = weight.clone()
    fill(model, torch.randn(2, 64, 8, 8, dtype=torch.float64), skipped)
    assert torch.equal(weight, before)
    fill(model, torch.randn(2, 64, 8, 8, dtype=torch.float64), skipped, seed=1)
    assert not torch.equal(weight, before)


def test_one_network_from_end_to_end() -> None:
    result = measure(Order("torchvision:mobilenet_v2", 2**33))
    assert (result["status"], result["sums"]) == ("right", {"C": {"removed": 10}})
    assert result["input"] == [2, 3, 96, 96] and 0 < result["difference"] < 1e-11
    json.dumps(result)


def test_a_network_too_big_is_counted_and_never_right() -> None:
    result = measure(Order("torchvision:squeezenet1_1", 2**20))
    assert result["status"] == "counted" and result["needs_bytes"] > 2**20 and "difference" not in result
    assert measure(Order("torchvision:squeezenet1_1", 2**20, last=False))["status"] == "later"


def test_what_runs_out_of_memory_is_counted_or_tried_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(row_module, "_compare", exhausted)
    counted = measure(Order("torchvision:squeezenet1_1", 2**33))
    assert counted["status"] == "counted" and "error" not in counted and counted["entered"] == "fx"
    assert measure(Order("torchvision:squeezenet1_1", 2**33, last=False))["status"] == "later"
    monkeypatch.setattr(row_module, "_compare", lambda *_: {}[0])
    assert measure(Order("torchvision:squeezenet1_1", 2**33))["status"] == "crashed"
