"""Pruning in rounds, and the command: budgets are met, files are whole, a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rmfx
from rmfx.cli import learning
from rmfx.cli.app import app
from rmfx.demo import DigitNet
from rmfx.errors import RmfxError
from rmfx.learn import Recipe, open_data, prune_in_rounds, train
from rmfx.learn.evaluate import answers
from rmfx.learn.rounds import batches_of

RECIPE = Recipe(epochs=1, batch=64, learning_rate=0.02)


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def macs_of(path: Path) -> int:
    network = rmfx.load(path)
    totals = rmfx.report(rmfx.convert(network, torch.zeros(1, 1, 8, 8), policy=[], verify=False)).totals
    assert totals.macs_after is not None
    return totals.macs_after


def test_rounds_reach_the_budget_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    data = open_data("digits")
    model = DigitNet()
    train(model, data, Recipe(epochs=3, batch=64))
    wish = {"rounds": 2, "macs": 0.4, "folder": tmp_path}
    told: list[int] = []

    def stop(number: int, record: object) -> None:
        told.append(number)
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_in_rounds(model, data, RECIPE, **wish, on_round=stop)  # type: ignore[arg-type]
    network, done = prune_in_rounds(model, data, RECIPE, **wish, resume=True)  # type: ignore[arg-type]
    assert told == [1, 2] and len(done) == 2
    first, last = (each.pruned["macs"] for each in done)
    assert last[1] <= 0.4 * first[0] and first[1] == last[0], "each round begins where the one before ended"
    assert 0.55 < first[1] / first[0] <= 0.4**0.5, "in equal ratios"
    assert done[-1].history[-1].test_accuracy > 0.8
    saved = rmfx.load(tmp_path / "round-2" / "model.rmfx")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(saved(x), network(x)) and macs_of(tmp_path / "round-2" / "model.rmfx") == last[1]
    with pytest.raises(RmfxError, match="rounds must be at least 1 and macs between 0 and 1, got 0 and 0.5"):
        prune_in_rounds(model, data, RECIPE, rounds=0, macs=0.5, folder=tmp_path)


def test_each_round_begins_with_norms_that_fit_its_network(tmp_path: Path) -> None:
    data, model = open_data("digits"), DigitNet()
    train(model, data, Recipe(epochs=1, batch=64))
    prune_in_rounds(model, data, RECIPE, rounds=1, macs=0.4, folder=tmp_path)
    network = rmfx.load(tmp_path / "round-1" / "pruned.rmfx").train()
    last = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)][-1]
    assert last.running_mean is not None
    found, seen = last.running_mean.clone(), []
    with last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean((0, 2, 3)))), torch.no_grad():
        for images, _ in batches_of(data, network, RECIPE.batch, 16, RECIPE.seed):
            network(images)
    torch.testing.assert_close(found, torch.stack(seen).mean(0))


def test_rounds_can_begin_with_least_squares(tmp_path: Path) -> None:
    data, model = open_data("digits"), DigitNet()
    train(model, data, Recipe(epochs=2, batch=64))
    found = []
    for solve in (False, True):
        folder = tmp_path / str(solve)
        prune_in_rounds(model, data, RECIPE, rounds=1, macs=0.2, folder=folder, reconstruct=solve)
        network = rmfx.load(folder / "round-1" / "pruned.rmfx")
        told = answers(network, data.test, 500, torch.device("cpu"))
        found.append(sum(int((logits.argmax(1) == labels).sum()) for logits, labels in told) / len(data.test))
    assert found[1] > found[0] + 0.05, "before it is trained on"


@pytest.mark.parametrize("drop", [False, True])
def test_rounds_keep_constants_or_leave_them_out(drop: bool, tmp_path: Path) -> None:
    output = tmp_path / "small.rmfx"
    options = ("--rounds", 1, "--macs", 0.3, "--epochs", 1, "--json", *["--drop-constants"] * drop)
    [record] = json.loads(run("prune", "rmfx:resnet20", output, *options))["rounds"]
    constants = sum(width["constants"] for width in record["widths"])
    assert (constants == 0) == drop


def test_of_several_processes_one_writes_and_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    @contextmanager
    def silent(what: learning.Asked) -> Iterator[bool]:
        asked.append(what)
        yield False

    monkeypatch.setattr(learning, "processes", silent)
    output = tmp_path / "small.rmfx"
    assert run("prune", "rmfx:resnet20", output, "--rounds", 1, "--macs", 0.3, "--epochs", 1, "--json") == ""
    assert not output.exists() and [what.folder for what in asked] == [tmp_path / "small-rounds"]


@pytest.mark.slow
def test_the_command_prunes_what_was_trained_and_trains_what_was_pruned(tmp_path: Path) -> None:
    run("train", "rmfx:resnet20", "-o", tmp_path / "trained", "--epochs", 1)
    weights = tmp_path / "trained" / "model.safetensors"
    pruned, again = tmp_path / "pruned.rmfx", tmp_path / "again.rmfx"
    told = json.loads(run("prune", "rmfx:resnet20", pruned, "--weights", weights, "--macs", 0.5, "--json"))
    assert told["macs"][1] <= 0.5 * told["macs"][0] and macs_of(pruned) == told["macs"][1]
    coupled = json.loads(
        run("prune", "rmfx:resnet20", again, "--weights", weights, "--macs", 0.5, "--residual", "--json")
    )
    assert len(coupled["widths"]) < len(told["widths"]) and "add" in rmfx.load(again).code
    options = ("--weights", weights, "--macs", 0.5, "--reconstruct", "--json")
    assert json.loads(run("prune", "rmfx:resnet20", again, *options))["error"] < told["error"]
    options = ("--weights", weights, "--amount", 0.2, "--lower", "--json")
    lowered = json.loads(run("prune", "rmfx:resnet20", again, *options))
    assert "add" in rmfx.load(again).code and lowered["macs"][1] == macs_of(again) < lowered["macs"][0]
    assert "wrote" in run("train", pruned, "-o", tmp_path / "more", "--epochs", 1)
    assert macs_of(tmp_path / "more" / "model.rmfx") == told["macs"][1]
    text = run("prune", tmp_path / "more" / "model.rmfx", again, "--amount", 0.2, "--layerwise", "--importance", "l2")
    assert "channels" in text and f"wrote {again}" in text


def test_the_command_trains_with_sparsity_and_says_how_far_it_reaches(tmp_path: Path) -> None:
    arguments = ["train", "rmfx:resnet20", "-o", str(tmp_path), "--epochs", "1"]
    done = CliRunner().invoke(app, [*arguments, "--sparsity", "1e-2", "--shortcut-sparsity", "0.5"])
    assert done.exit_code == 0, done.output
    told = done.stderr.splitlines()
    [norms] = [line for line in told if line.startswith("L1 brings scales of norms that nothing holds down by")]
    [shortcuts] = [line for line in told if line.startswith("L1 brings scales of shortcuts")]
    assert "too little to get from 1 to 0" in norms and "too little" not in shortcuts
    network = rmfx.load(tmp_path / "model.rmfx")
    scales = [p for name, p in network.named_parameters() if "shortcut_scale" in name]
    assert scales and max(float(scale.detach().max()) for scale in scales) < 0.9


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        (("--rounds", 2), "--rounds go with --macs PART"),
        (("--rounds", 2, "--macs", 0.5, "--amount", 0.1), "none of the other measures"),
        (("--rounds", 2, "--macs", 0.5, "--layerwise"), "none of the other measures, --layerwise or --lower"),
        (("--rounds", 2, "--macs", 0.5, "--lower"), "none of the other measures, --layerwise or --lower"),
    ],
)
def test_the_command_says_what_does_not_go_together(wish: tuple[object, ...], told: str, tmp_path: Path) -> None:
    arguments = ["prune", "rmfx:resnet20", str(tmp_path / "a.rmfx"), *map(str, wish)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and told in " ".join(done.output.split()) and not (tmp_path / "a.rmfx").exists()
