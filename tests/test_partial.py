"""Models that no front door follows as a whole: their parts are converted, and the report says what was left."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from front import hostile
from oracle import relative_difference
from torch import Tensor, nn

import rmfx
from rmfx import PartialConversionWarning, TraceError
from rmfx.hostile import randomise


class Block(nn.Module):
    """x + conv(relu(conv(x)))"""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b(torch.relu(self.a(x))))


class Opaque(nn.Module):
    """Decides by values, and holds a block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if y.mean() > 0 else -y


class Model(nn.Module):
    """Blocks in a list, called in an order that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.stages = nn.ModuleList([nn.Sequential(Block(), Block()), Opaque()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            if x.abs().max() > 1e30:
                break
        return self.head(x.mean((2, 3)))


def made() -> tuple[nn.Module, Tensor]:
    image = hostile(2, 3, 8, 7)
    return randomise(Model().double(), image / 8), image


def test_parts_are_converted_and_the_rest_is_listed() -> None:
    model, image = made()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(PartialConversionWarning, match=rf"only parts of Model were converted.*{__file__}:\d+"):
        converted = rmfx.convert(model, image)
    report = rmfx.report(converted)
    assert [(entry.place, entry.status) for entry in report.entries] == [
        ("stages.0.0", "removed"),
        ("stages.0.1", "removed"),
        ("stages.1.inner", "removed"),
    ]
    assert [part.place for part in report.left_out] == ["", "stages.1"]
    assert all(f"{__file__}:" in part.reason for part in report.left_out)
    assert "left out: stages.1: " in str(report)
    with torch.no_grad():
        for other in (image, hostile(1, 3, 5, 6)):
            assert relative_difference(model(other), converted(other)) < 1e-13
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert report.totals.params_after == sum(p.numel() for p in converted.parameters())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in converted.parameters()}
    assert not shared
    tensors = set(dict(converted.state_dict()))
    assert set(report.parameter_map) == set(model.state_dict())
    assert {name for names in report.parameter_map.values() for name in names} <= tensors


def test_explain_tells_the_same() -> None:
    model, image = made()
    with pytest.warns(PartialConversionWarning):
        report = rmfx.explain(model, image)
    with pytest.warns(PartialConversionWarning):
        converted = rmfx.report(rmfx.convert(model, image))
    assert report.entries == tuple(converted.entries) or [e.name for e in report.entries] == [
        e.name for e in converted.entries
    ]
    assert report.left_out == converted.left_out and report.totals == converted.totals


def test_without_example_inputs() -> None:
    model, image = made()
    with pytest.warns(PartialConversionWarning):
        converted = rmfx.convert(model)
    assert rmfx.report(converted).count("removed") == 3
    with torch.no_grad():
        assert relative_difference(model(image), converted(image)) < 1e-13


def test_partial_false_is_an_error() -> None:
    model, image = made()
    for function in (rmfx.convert, rmfx.explain):
        with pytest.raises(TraceError, match="cannot be followed"), warnings.catch_warnings():
            warnings.simplefilter("error")
            function(model, image, partial=False)


def test_places_of_a_policy_are_those_of_the_whole() -> None:
    model, image = made()
    with pytest.warns(PartialConversionWarning):
        listed = rmfx.convert(model, image, policy=["stages.0.1"])
    with pytest.warns(PartialConversionWarning):
        chosen = rmfx.convert(model, image, policy=lambda entry: entry.place == "stages.0.1")
    for converted in (listed, chosen):
        removed = [entry.place for entry in rmfx.report(converted).entries if entry.status == "removed"]
        assert removed == ["stages.0.1"]
        with torch.no_grad():
            assert relative_difference(model(image), converted(image)) < 1e-13
    with pytest.raises(rmfx.RmfxError, match="policy names 'stages.9'"):
        rmfx.convert(model, image, policy=["stages.9"])


def test_the_report_survives_copies() -> None:
    model, image = made()
    with pytest.warns(PartialConversionWarning):
        converted = rmfx.convert(model, image)
    report = rmfx.report(converted)
    assert rmfx.Report.from_dict(report.to_dict()) == report
    assert rmfx.report(copy.deepcopy(converted)) == report
    assert rmfx.report(pickle.loads(pickle.dumps(converted))) == report


def test_a_report_of_an_older_version_is_read() -> None:
    data = rmfx.report(rmfx.convert(Block().eval())).to_dict()
    del data["left_out"], data["size_conditions"]
    assert rmfx.Report.from_dict(data).left_out == ()


def test_nothing_to_convert_is_the_trace_error() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="cannot be followed"):
        rmfx.convert(Bare().eval(), torch.zeros(1, 2))


class Curious(Opaque):
    """Its own code reads an attribute of the part, which a converted one has no more."""

    def forward(self, x: Tensor) -> Tensor:
        self.inner.a.weight.requires_grad  # noqa: B018
        return super().forward(x) * self.inner.scale

    def __init__(self) -> None:
        super().__init__()
        self.inner.scale = 2.0


def test_code_that_looks_into_a_part_is_refused() -> None:
    image = hostile(2, 4, 5, 5)
    model = randomise(Curious().double(), image / 8)
    with pytest.raises(TraceError, match="looks into the parts"):
        rmfx.convert(model, image)


class Twice(nn.Module):
    """Calls one block at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return self.block(x[..., 1:]).sum() + y.sum() if y.sum() > 0 else y.mean()


def test_a_part_that_is_called_at_two_sizes() -> None:
    image = hostile(2, 4, 5, 6)
    model = randomise(Twice().double(), image / 8)
    with pytest.warns(PartialConversionWarning):
        converted = rmfx.convert(model, image)
    assert rmfx.report(converted).count("removed") == 1
    with torch.no_grad():
        assert relative_difference(model(image), converted(image)) < 1e-13


SOURCE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
    def forward(self, x):
        y = self.block(x)
        return y if y.sum() > 0 else -y

def net():
    return Net()
"""


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr("sys.argv", ["rmfx", *arguments])
    with pytest.raises(SystemExit) as left:
        rmfx_main()
    return left.value.code


def rmfx_main() -> None:
    from rmfx.cli import main

    main()


def test_the_command_line_leaves_with_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    model = ("mine.py:net", "--size", "8")
    assert run_command(monkeypatch, "explain", *model) == 4
    shown = capsys.readouterr()
    assert "1 residual sums removed" in shown.out and "left out: the model as a whole: " in shown.out
    assert "Warning" not in shown.err
    assert run_command(monkeypatch, "explain", *model, "--no-partial") == 2
    assert "cannot be followed" in capsys.readouterr().err
    assert run_command(monkeypatch, "convert", *model, "-o", "out.rmfx") == 2
    assert "only parts were converted" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.rmfx").exists()
