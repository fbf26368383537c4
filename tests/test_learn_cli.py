"""``rmfx train`` and ``rmfx finetune``: real data, killed and resumed, results on standard output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from learning import FACTORY
from safetensors.torch import load_file

import rmfx
from rmfx import cli, zoo
from rmfx.errors import ModelNameError

ARGUMENTS = ("net.py:net", "--data", "digits", "--batch", "64", "--lr", "0.05", "--ema", "0.9", "--device", "cpu")


class Command:
    """Calls the console script's function in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["rmfx", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        captured = self._capsys.readouterr()
        return int(leaving.value.code or 0), captured.out, captured.err


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    (tmp_path / "net.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


def history_of(folder: str) -> list[dict[str, object]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": 0} for line in lines]


def stop(sent: signal.Signals, after: int, *arguments: str) -> tuple[int, str]:
    """Send a signal to a training in its own process once ``after`` epochs are told; its exit code and messages."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rmfx", "train", *ARGUMENTS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
    )
    metrics = Path("run/metrics.jsonl")
    deadline = time.monotonic() + 60
    while process.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= after):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert out == "" and "Traceback" not in err, err
    return process.returncode, err


def test_a_training_that_was_stopped_twice_goes_on_bit_by_bit(command: Command) -> None:
    """By Ctrl-C, then by a signal that no program sees."""
    epochs = 12
    options = ("--epochs", str(epochs), "-o", "run")
    code, err = stop(signal.SIGINT, 2, *options)
    assert code == 130, err
    done = len(history_of("run"))
    code, err = stop(signal.SIGKILL, done + 2, *options, "--resume")
    assert code == -signal.SIGKILL, err
    assert done + 2 <= len(history_of("run")) < epochs and not Path("run/model.safetensors").exists()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    resumed = command("train", *ARGUMENTS, *options, "--resume")
    whole = command("train", *ARGUMENTS, "--epochs", epochs, "-o", "whole")
    torch.set_num_threads(threads)
    assert resumed[0] == whole[0] == 0, resumed[2] + whole[2]
    assert history_of("run") == history_of("whole") and len(history_of("run")) == epochs
    first, second = (load_file(f"{folder}/model.safetensors") for folder in ("run", "whole"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_train_then_finetune_then_convert(command: Command) -> None:
    code, out, err = command("train", *ARGUMENTS, "--epochs", 2, "-o", "a/run")
    assert code == 0, err
    assert "test accuracy after 2 epochs: " in out and "with averaged weights\nwrote a/run/model.safetensors\n" in out
    assert "training ...\nepoch 1: loss " in err  # a slow machine says before that it opens the data
    assert len([line for line in err.splitlines() if line.startswith("epoch ")]) == 2

    tuning = ("finetune", "net.py:net", "--weights", "a/run/model.safetensors", "--data", "digits", "--epochs", 1)
    code, out, err = command(*tuning, "-o", "tuned", "--json", "--device", "cpu")
    assert code == 0, err
    document = json.loads(out)
    assert document["start"]["same"] == document["start"]["images"] == 450
    assert [record["epoch"] for record in document["history"]] == [0, 1]
    assert document["recipe"]["learning_rate"] == 0.01
    assert rmfx.report(rmfx.load("tuned/model.rmfx")).count("removed") == 1
    code, out, err = command(*tuning, "-o", "folded", "--fold-bn", "--device", "cpu")
    assert code == 0, err
    assert out.startswith("after conversion: 450 of 450 predictions as before, test accuracy ")
    for source in (("tuned/model.rmfx",), ("net.py:net", "--weights", "a/run/model.safetensors")):
        code, _, err = command("convert", *source, "--input-shape", "1,8,8", "-o", "plain.onnx")
        assert code == 0, err


def test_a_teacher_is_built_by_name(command: Command) -> None:
    Path("net.py").write_text(
        "import rmfx.models\nfrom learning import tiny as teacher\n"
        "def student():\n    shape = dict(widths=(4, 4, 4, 4), stem='cifar', num_classes=10, in_channels=1)\n"
        "    return rmfx.models.fading_resnet((1, 1, 1, 1), **shape)\n"
    )
    code, _, err = command(
        *("train", "net.py:student", "--teacher", "net.py:teacher", "--data", "digits"),
        *("--epochs", 1, "-o", "run", "--device", "cpu"),
    )
    assert code == 0, err
    assert json.loads(Path("run/recipe.json").read_text())["teacher"] == "Sequential"
    assert load_file("run/model.safetensors")["_extra_state"].item() == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", *ARGUMENTS), "--output"),
        (("train", *ARGUMENTS, "-o", "net.py"), "net.py: this is a file; name a folder"),
        (("train", *ARGUMENTS, "-o", "run", "--epochs", 3, "--warmup", 3), "warmup must be shorter than the 3 epochs"),
        (("train", *ARGUMENTS, "-o", "run", "--resume"), "no run/checkpoint.pt to go on from"),
        (("train", *ARGUMENTS, "-o", "run", "--precision", "fp16"), "precision fp16 needs CUDA"),
        (("train", *ARGUMENTS, "-o", "run", "--teacher-weights", "w.pt"), "are of no use without --teacher"),
        (("train", "net.py:net", "--data", "letters", "-o", "run"), "there is no dataset 'letters'"),
        (("train", "torchvision:resnet18", "-o", "run"), "does not take images of digits, [1, 8, 8]"),
        (("finetune", "net.py:net", "--data", "digits", "-o", "run", "--weights", "w.pt"), "no weights file w.pt"),
    ],
)
def test_bad_requests_leave_with_2_before_any_file_is_written(
    command: Command, arguments: tuple[object, ...], message: str
) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, ""), err
    assert message in " ".join(err.replace("│", " ").split())
    assert not Path("run").exists()


def test_builders_get_the_classes_and_channels_of_the_data() -> None:
    for name in ("rmfx:resnet34_cifar", "torchvision:resnet18", "timm:resnet10t"):
        model = zoo.build(name, arguments=zoo.arguments_for(name, 3, 7)).eval()
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert zoo.arguments_for("rmfx:resnet34", 1, 7) == {"num_classes": 7, "in_channels": 1}
    with pytest.raises(ModelNameError, match="rmfx has no network 'resnet21'"):
        zoo.arguments_for("rmfx:resnet21", 3, 7)
