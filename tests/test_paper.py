"""The scripts of benchmarks/paper: what is measured is kept and read back, and no network is left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rmfx
from benchmarks.paper import __main__ as paper
from benchmarks.paper import figure5, figure7, figure9, published, table1, table2, table3, table4
from benchmarks.paper.counts import count, deployed
from benchmarks.paper.jobs import RUNS, Job, accuracies, jobs_for, rows_of
from benchmarks.paper.networks import FIGURE5_DEPTHS, FULL_WIDTH, NETWORKS
from benchmarks.paper.output import changed_predictions
from benchmarks.paper.setting import Setting, setting
from benchmarks.paper.speed import Protocol, Speed, paper_protocol, timed
from benchmarks.paper.store import rows_in
from rmfx.models import resnet

TINY = ("--data", "digits", "--images", "64", "--batch", "32", "--width", "4", "--epochs", "1", "--device", "cpu")


def tiny(folder: Path, *more: str) -> Setting:
    return setting("", [*TINY, "--threads", "1", "--folder", str(folder), *more])


def test_every_network_is_built_for_any_images_and_classes() -> None:
    for name, network in NETWORKS.items():
        with torch.device("meta"):
            built = network.build(1, 100, FULL_WIDTH).eval()
        assert built(torch.zeros(2, 1, 32, 32, device="meta")).shape == (2, 100), name


def test_figure_5_compares_networks_of_equal_depth_and_width() -> None:
    for depth in FIGURE5_DEPTHS:
        with torch.device("meta"):
            pair = [NETWORKS[f"{family} {depth}"].build(3, 10, FULL_WIDTH) for family in figure5.FAMILIES]
        assert len({network.fc.in_features for network in pair}) == 1
        blocks = [len(network.stages) for network in pair]  # an RMNet's have three layers each
        assert blocks[1] == 3 * blocks[0]


def test_scripts_train_and_print_every_network_of_the_paper(tmp_path: Path) -> None:
    given = tiny(tmp_path)
    assert {job.network for job in table1.jobs(given)} == set(published.CIFAR10)
    assert set(table1.IMAGENET) == set(published.IMAGENET)
    assert {job.network for job in table3.jobs(given)} == set(published.TABLE_3)
    assert set(table2.forms("cpu")) == set(published.TABLE_2)
    assert {NETWORKS[job.network].finetuned for job in figure9.jobs(given)} == {True}
    seeds = [job.recipe.seed for job in figure5.jobs(tiny(tmp_path, "--seeds", "3"))]
    assert sorted(set(seeds)) == [0, 1, 2]


def test_a_training_is_done_once_and_its_teachers_row_comes_with_it(tmp_path: Path) -> None:
    given = tiny(tmp_path)
    student, teacher = jobs_for(given, ("ResDistill 34", "ResNet 34"), epochs=9)
    assert student.teacher == teacher and teacher.teacher is None
    rows = rows_of([student, teacher], given)
    assert [row["job"]["network"] for row in rows] == ["ResDistill 34", "ResNet 34"]
    assert rows == rows_of([student, teacher], given)
    assert len(rows_in(tmp_path / RUNS)) == 2
    for row in rows:
        assert row["converted"]["predictions"] == 450 and 0 <= row["accuracy"] <= 1
        assert [record["epoch"] for record in row["history"]] == [1]
        assert row["provenance"]["device"] == "cpu"
    assert all(figure.reached for figure in changed_predictions(rows))
    assert rows[0]["converted"]["sums_removed"] == 0 and rows[1]["converted"]["sums_removed"] == 16
    assert set(rows[1]["finetuned"]) == set(figure9.VARIANTS) and "finetuned" not in rows[0]
    assert [record["epoch"] for record in rows[1]["finetuned"]["with_bn"]] == [0, 1, 2]
    assert accuracies(rows, "ResNet 34") == [rows[1]["accuracy"]]


def test_trainings_can_be_done_alone_and_for_some_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[list[str], Setting]] = []
    monkeypatch.setattr(paper, "rows_of", lambda jobs, given: asked.append(([job.network for job in jobs], given)))
    # Whatever stands behind --only, other options keep their values.
    monkeypatch.setattr(sys, "argv", ["", "--trainings-only", "--only", "table2", *TINY, "--folder", str(tmp_path)])
    paper.main()
    [(networks, given)] = asked
    assert networks == ["MobileNetV2", "MobileNetV1"] and given == tiny(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["", "--only", "table9"])
    with pytest.raises(SystemExit):
        paper.main()


def test_a_training_that_diverges_is_a_result(tmp_path: Path) -> None:
    given = tiny(tmp_path)
    (job,) = jobs_for(given, ("RMNet 26",), epochs=1)
    hot = Job(job.network, rmfx.learn.Recipe(epochs=1, batch=32, learning_rate=1e30), job.width)
    (row,) = rows_of([hot], given)
    assert row["accuracy"] is None and row["diverged"].startswith("the loss is nan in epoch 1")
    assert accuracies([row], "RMNet 26") == [] and changed_predictions([row]) == []


def test_jobs_that_differ_have_different_rows(tmp_path: Path) -> None:
    given, narrow = tiny(tmp_path), tiny(tmp_path, "--width", "8")
    keys = [
        json.dumps(job.key(each))
        for each in (given, narrow, tiny(tmp_path, "--images", "128"), tiny(tmp_path, "--data", "digits32"))
        for job in jobs_for(each, NETWORKS, epochs=1)
    ]
    assert len(set(keys)) == len(keys) == 4 * len(NETWORKS)


def test_speeds_are_measured_once(tmp_path: Path) -> None:
    networks = {"small": lambda: nn.Conv2d(3, 2, 1), "large": lambda: nn.Conv2d(3, 256, 7)}
    protocol = Protocol("cpu", 2, 1, 8)
    first = timed("convs", networks, (3, 32, 32), protocol, tiny(tmp_path))
    assert first == timed("convs", networks, (3, 32, 32), protocol, tiny(tmp_path))
    assert [len(first[name]["eager"].seconds) for name in networks] == [8, 8]
    assert first["small"]["eager"].over(first["large"]["eager"])[0] > 1
    timed("convs", networks, (3, 32, 32), Protocol("cpu", 4, 1, 8), tiny(tmp_path))
    timed("convs", {"small": networks["small"]}, (3, 32, 32), protocol, tiny(tmp_path))
    assert len(rows_in(tmp_path / "speeds.jsonl")) == 3


def test_a_speed_up_compares_images_per_second_round_by_round() -> None:
    fast, slow = Speed(8, (1.0, 2.0, 1.0, 2.0)), Speed(4, (2.0, 4.0, 2.0, 4.0))
    assert fast.over(slow) == (4.0, 4.0, 4.0)
    assert slow.over(fast)[0] == 0.25
    assert (fast.images_per_second, slow.images_per_second) == (8 / 1.5, 4 / 3)


def test_the_papers_protocol_has_50_batches_to_warm_up_and_50_timed() -> None:
    for networks in (1, 3, 16):
        protocol = paper_protocol("cpu", torch.float32, networks, graph=True)
        assert networks * protocol.warm_up >= 50 and protocol.timed == 50 and protocol.batch == 128
        assert protocol.modes == ("eager",)
    assert paper_protocol("cuda", torch.float32, 1, graph=True).modes == ("eager", "graph")


def test_counts_are_those_of_the_network_that_runs() -> None:
    def build() -> nn.Module:
        return resnet((1, 1, 1, 1), widths=(4, 8, 8, 8), stem="cifar", num_classes=10)

    for keeps in (False, True):
        network = deployed(build, keeps)
        assert sum(p.numel() for p in network.parameters()) == count(build, keeps, (3, 32, 32)).parameters
        assert rmfx.report(network).count("removed") == (0 if keeps else 4)
    assert count(build, False, (3, 32, 32)).macs > count(build, True, (3, 32, 32)).macs


def test_figure_7_varies_one_thing_at_a_time(tmp_path: Path) -> None:
    for more in ((), ("--quick",)):
        middle, points = figure7.points(tiny(tmp_path, *more))
        for parameter, value, point in points:
            differing = {name for name in vars(middle) if getattr(point, name) != getattr(middle, name)}
            assert differing <= {parameter} and getattr(point, parameter) == value
            with torch.device("meta"):
                point.build()


def test_table_4_is_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["table4", "--folder", str(tmp_path), "--threads", "1"])
    with pytest.raises(SystemExit) as leaving:
        table4.main()
    assert leaving.value.code == 0
    written = json.loads((tmp_path / "table4.json").read_text())
    assert all(figure["reached"] for figure in written["figures"]) and len(written["layers"]) == 53
