"""The command line: results on standard output, exit codes, and messages a person can act on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import onnx
import pytest
import torch

import rmfx
from rmfx import cli, zoo
from rmfx.cli import console, options
from rmfx.errors import (
    DivergedError,
    ExportError,
    FileFormatError,
    ModelNameError,
    NormalFormError,
    NotPlainError,
    RmfxError,
    RuntimeUnavailableError,
    TraceError,
    UnsupportedModelError,
    VerificationError,
)
from rmfx.report import Totals

NETS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, activation=nn.ReLU, last=nn.ReLU):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.last = activation(), last()
    def forward(self, x):
        return self.last(x + self.b(self.act(self.a(x))))

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), Block(), Block())

class Gated(nn.Module):
    def forward(self, x):
        return x + torch.softmax(x, dim=1)

def refusing():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Block(), Gated())

class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def leaving():
    raise SystemExit(7)

def untraceable():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Branching())
"""

SLOW = """
import sys
import time

from rmfx import cli
from rmfx.files import archive

def slow(tensors, target, metadata):
    target.write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)

archive.save_file = slow
cli.main()
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


class Runner:
    """Calls the console script's function in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Done:
        self._monkeypatch.setattr(sys, "argv", ["rmfx", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        captured = self._capsys.readouterr()
        return Done(int(leaving.value.code or 0), captured.out, captured.err)


@pytest.fixture
def rmfx_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    monkeypatch.setenv("RMFX_DEBUG", "")
    return Runner(monkeypatch, capsys)


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``nets.py`` in it, made the current one."""
    (tmp_path / "mine.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_version_and_help(rmfx_command: Runner) -> None:
    assert rmfx_command("--version") == Done(0, f"rmfx {metadata.version('rmfx')}\n", "")
    done = rmfx_command("--help")
    assert done.code == 0
    for command in ("explain", "convert", "verify", "export", "demo", "doctor", "Exit codes: 0 done; 1"):
        assert command in done.out


def test_explain_prints_the_report_and_changes_nothing(rmfx_command: Runner, nets: Path) -> None:
    done = rmfx_command("explain", "mine.py:net", "--size", 9)
    assert done.code == 0, done.err
    assert "2 residual sums removed, 0 kept, 0 refused" in done.out
    assert sorted(path.name for path in nets.iterdir() if path.suffix) == ["mine.py"]


def test_explain_json_is_one_document(rmfx_command: Runner, nets: Path) -> None:
    done = rmfx_command("explain", "mine.py:net", "--input-shape", "3,9,11", "--batch", 2, "--json")
    data = json.loads(done.out)
    assert data["input_shape"] == [2, 3, 9, 11]
    report = rmfx.Report.from_dict(data["report"])
    assert [entry.status for entry in report.entries] == ["removed", "removed"]


def test_convert_verify_export(rmfx_command: Runner, nets: Path) -> None:
    done = rmfx_command("convert", "mine.py:net", "--size", 9, "-o", "plain.rmfx")
    assert done.code == 0, done.err
    assert done.out.endswith("wrote plain.rmfx\n")

    done = rmfx_command("verify", "mine.py:net", "plain.rmfx", "--size", 9)
    assert done.code == 0, done.err
    done = rmfx_command("verify", "plain.rmfx", "mine.py:net", "--size", 9, "--json")
    assert json.loads(done.out)["converted"] == "mine.py:net"

    done = rmfx_command("export", "plain.rmfx", "--size", 9, "-o", "plain.onnx")
    assert done.code == 0, done.err
    assert "onnxruntime on cpu agrees with torch" in done.out
    assert _onnx_sums("plain.onnx") == 0

    done = rmfx_command("export", "mine.py:net", "--size", 9, "-o", "original.onnx", "--original", "--json")
    assert json.loads(done.out)["bytes"] == Path("original.onnx").stat().st_size
    assert _onnx_sums("original.onnx") == 2


def _onnx_sums(path: str) -> int:
    return sum(node.op_type in ("Add", "Sum") for node in onnx.load(path).graph.node)


def test_convert_writes_onnx_directly(rmfx_command: Runner, nets: Path) -> None:
    done = rmfx_command("convert", "mine.py:net", "--size", 9, "-o", "plain.onnx", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["output"] == "plain.onnx"
    assert _onnx_sums("plain.onnx") == 0


def test_convert_takes_weights_policy_and_dtype(rmfx_command: Runner, nets: Path) -> None:
    state = zoo.build("mine.py:net", seed=3).state_dict()
    torch.save({"state_dict": state}, "w.pt")
    arguments = ("--size", 9, "--weights", "w.pt", "--dtype", "float64")
    done = rmfx_command("convert", "mine.py:net", *arguments, "--policy", "2", "-o", "plain.rmfx")
    assert done.code == 0, done.err
    plain = rmfx.load(Path("plain.rmfx"))
    assert [entry.status for entry in rmfx.report(plain).entries] == ["removed", "kept"]
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float64}
    assert rmfx_command("verify", "mine.py:net", "plain.rmfx", *arguments).code == 0


def test_verify_leaves_with_1_when_networks_differ(rmfx_command: Runner, nets: Path) -> None:
    assert rmfx_command("convert", "mine.py:net", "--size", 9, "--seed", 1, "-o", "other.rmfx").code == 0
    done = rmfx_command("verify", "mine.py:net", "other.rmfx", "--size", 9)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    told = rmfx_command("verify", "mine.py:net", "other.rmfx", "--size", 9, "--json")
    assert (told.code, told.err) == (1, done.err)
    assert json.loads(told.out)["verification"] is None
    assert f"error: {json.loads(told.out)['difference']}\n" == done.err


def test_strict_leaves_with_3_when_a_sum_is_refused(rmfx_command: Runner, nets: Path) -> None:
    arguments = ("explain", "mine.py:refusing", "--size", 9)
    assert rmfx_command(*arguments).code == 0
    done = rmfx_command(*arguments, "--strict")
    assert done.code == 3
    assert "1 refused" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "resnet18"), "did you mean torchvision:resnet18?"),
        (("explain", "mine.py:nett", "--size", 9), "mine.py has no function 'nett'; it defines "),
        (("explain", "mine.py:net"), "the input size of mine.py:net is not known: give --size 32 or"),
        (("explain", "mine.py:net", "--size", 9, "--weights", "no.pt"), "there is no weights file no.pt"),
        (("explain", "mine.py:untraceable", "--size", 9), "mine.py"),
        (("verify", "mine.py:net", "no.rmfx", "--size", 9), "there is no file no.rmfx"),
        (("export", "bad.rmfx", "--size", 9, "-o", "x.onnx"), "bad.rmfx"),
        (("explain", "mine.py:net", "--input-shape", "3,a"), "'3,a' is no shape"),
        (("explain", "mine.py:net", "--input-shape", "3,0,4"), "holds a size below 1"),
        (("explain", "mine.py:net", "--input-shape", "3,4,4", "--size", 4), "exclude each other"),
        (("explain", "mine.py:net", "--weights", "w.pt", "--pretrained"), "exclude each other"),
        (("convert", "mine.py:net", "-o", "plain.txt"), "the name must end in .rmfx or .onnx"),
        (("convert", "mine.py:net", "-o", "nowhere/plain.rmfx"), "nowhere; create it first"),
        (("convert", "mine.py:net", "-o", "a" * 251 + ".rmfx"), "File name too long"),
        (("convert", "mine.py:net", "-o", "folder.rmfx"), "it is a folder; give the name of a file"),
        (("convert", "mine.py:net"), "--output"),
        (("explain", "mine.py:net", "--carrier", "pigeon"), "pigeon"),
        (("explain", "mine.py:net", "--size", 9, "--policy", "layer9"), "policy names 'layer9'"),
        (("demo", "-o", "nowhere"), "the folder does not exist"),
        (("explain", "mine.py:leaving", "--size", 9), "mine.py:leaving raised SystemExit: 7"),
        (("convert", "mine.py:net", "x.rmfx", "--plan", "p", "--carrier", "auto"), "leave out --carrier"),
        (
            ("convert", "mine.py:net", "x.rmfx", "--plan", "p", "--policy", "none", "--target", "eager"),
            "--policy, --ta",
        ),
        (("prune", "mine.py:net", "x.rmfx"), "give one goal: --macs and"),
        (("prune", "mine.py:net", "x.rmfx", "--amount", "0.1", "--macs", "0.5"), "give one goal: --macs and"),
        (("prune", "mine.py:net", "x.rmfx", "--macs", "1.5"), "--macs is above 0 and up to 1"),
        (("prune", "mine.py:net", "x.rmfx", "--macs", "0.5", "--layerwise"), "--layerwise is for --amount"),
        (("prune", "mine.py:net", "x.rmfx", "--amount", "0.5", "--rounds", 2), "--rounds go with --macs PART"),
        (("expalin", "mine.py:net"), "expalin"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_requests_leave_with_2_and_one_message(
    rmfx_command: Runner, nets: Path, arguments: tuple[object, ...], message: str
) -> None:
    Path("bad.rmfx").write_bytes(b"not a network")
    Path("folder.rmfx").mkdir()
    before = sorted(nets.iterdir())
    done = rmfx_command(*arguments)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert done.out == ""
    assert [path for path in sorted(nets.iterdir()) if path.name != "__pycache__"] == before


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (VerificationError, 1),
        (DivergedError, 1),
        (ExportError, 1),
        (NotPlainError, 1),
        (NormalFormError, 1),
        (RmfxError, 2),
        (ModelNameError, 2),
        (UnsupportedModelError, 2),
        (TraceError, 2),
        (FileFormatError, 2),
        (RuntimeUnavailableError, 2),
    ],
)
def test_every_error_has_its_code(
    rmfx_command: Runner, monkeypatch: pytest.MonkeyPatch, error: type[RmfxError], code: int
) -> None:
    def fail() -> None:
        raise error("what [failed] and why")

    monkeypatch.setattr("rmfx.cli.doctor.diagnose", fail)
    assert rmfx_command("doctor") == Done(code, "", "error: what [failed] and why\n")


def test_debug_shows_the_traceback(rmfx_command: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMFX_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["rmfx", "explain", "resnet18"])
    with pytest.raises(ModelNameError):
        cli.main()
    monkeypatch.setenv("RMFX_DEBUG", "yes")
    done = rmfx_command("doctor")
    assert done.code == 2
    assert done.err == "error: RMFX_DEBUG='yes' is not understood: set it to 1 to see tracebacks, or to 0\n"


def test_doctor_prints_text_and_json(rmfx_command: Runner) -> None:
    done = rmfx_command("doctor")
    assert done.code == 0
    assert f"torch            {torch.__version__}" in done.out
    assert "onnxruntime CPUExecutionProvider: active" in done.out
    assert json.loads(rmfx_command("doctor", "--json").out)["healthy"] is True


def test_the_report_is_a_table_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = (
        rmfx.Entry("layer1.0", "add", "identity", "removed", "direct", macs_before=10, macs_after=20),
        rmfx.Entry("layer1.[1]", "add_1", "identity", "refused", reason="a second reader"),
    )
    report = rmfx.Report(entries, Totals(100, 150))
    console.show_report(report)
    assert capsys.readouterr().out == f"{report}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    console.show_report(report)
    shown = capsys.readouterr().out
    assert "10 x 2.00" in shown
    assert "layer1.[1]: a second reader" in shown
    assert report.summary() in shown


def test_long_steps_speak_up_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_SILENT_SECONDS", 0.01)
    with console.step("waiting"):
        time.sleep(0.2)
        sys.stdout.write("chatter of a library\n")
    with console.step("not waiting"):
        pass
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "waiting ...\nchatter of a library\n"


def test_parsers() -> None:
    assert options.parse_shape("1x28x28") == (1, 28, 28)
    assert options.parse_policy("all") == "all"
    assert options.parse_policy("none") == []
    assert options.parse_policy("a.0,b") == ["a.0", "b"]


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_leaves_with_its_code_and_no_file(number: int, code: int, said: str, nets: Path) -> None:
    (nets / "slow.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, "-c", "import slow", "convert", "mine.py:net", "--size", "9", "-o", "out.rmfx"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=nets,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert process.stderr is not None
    assert "ready\n" in process.stderr  # printed by the file, kept off standard output
    assert [path.name for path in nets.iterdir() if path.name.startswith(".out.rmfx.")]
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    assert err.endswith(f"error: {said}\n")
    assert "Traceback" not in err
    assert sorted(path.name for path in nets.iterdir()) == ["mine.py", "slow.py"]


def test_ctrl_c_while_the_command_imports_is_told_alike(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    paths = os.pathsep.join((str(tmp_path), str(Path(rmfx.__file__).parent.parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*arguments: str) -> Done:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
        return Done(done.returncode, done.stdout, done.stderr)

    assert run("-m", "rmfx", "--version") == Done(130, "", "error: interrupted\n")
    assert run("-c", "import sys; sys.argv = ['/bin/rmfx']; import rmfx") == Done(130, "", "error: interrupted\n")
    assert "KeyboardInterrupt" in run("-c", "import rmfx").err  # a program of somebody else's


def test_the_console_script_is_installed() -> None:
    (script,) = (entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "rmfx")
    assert script.load() is cli.main


def test_a_plan_is_written_and_followed(rmfx_command: Runner, nets: Path) -> None:
    made = rmfx_command(
        "plan", "mine.py:net", "--size", 9, "--target", "onnxruntime", "--measure", "0", "-o", "plan.json", "--json"
    )
    assert json.loads(made.out)["plan"]["target"]["runtime"] == "onnxruntime"
    assert rmfx.Plan.load(nets / "plan.json").choices
    assert rmfx_command("convert", "mine.py:net", "kept.rmfx", "--size", 9, "--plan", "plan.json").code == 0
    assert rmfx.report(rmfx.load(nets / "kept.rmfx")).count("removed") == 0
    assert (
        rmfx_command("convert", "mine.py:net", "auto.rmfx", "--size", 9, "--policy", "auto", "--measure", "0").code == 0
    )
    assert rmfx_command("convert", "mine.py:net", "x.rmfx", "--size", 9, "--plan", "mine.py").code == 2
