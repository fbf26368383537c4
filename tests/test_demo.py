"""The demo on few epochs, and its promise: a single changed prediction is an error."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch

from rmfx import demo
from rmfx.cli.demo import _verdict
from rmfx.demo import DemoResult
from rmfx.errors import RuntimeUnavailableError, VerificationError
from rmfx.measure.paired import Comparison, compare


@pytest.fixture(scope="module")
def digits() -> demo.Digits:
    return demo.load_digits()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return demo.run(tmp_path_factory.mktemp("demo"), epochs=2, pairs=5)


def test_digits_are_split_without_overlap(digits: demo.Digits) -> None:
    assert digits.train_images.shape == (1347, 1, 8, 8)
    assert digits.test_images.shape == (450, 1, 8, 8)
    assert digits.test_images.min() == -1
    assert digits.test_images.max() == 1
    assert set(digits.test_labels.tolist()) == set(range(10))
    both = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert len(torch.unique(both, dim=0)) == len(both)


def test_training_is_seeded_and_learns(digits: demo.Digits) -> None:
    steps: list[tuple[str, int, int]] = []
    first = demo.train(digits, epochs=1, on_step=lambda *step: steps.append(step))
    second = demo.train(digits, epochs=1)
    assert steps == [("training", 1, 1)]
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not first.training
    correct = (first(digits.test_images).argmax(1) == digits.test_labels).double().mean()
    assert correct > 0.8


def test_nothing_changes(result: DemoResult) -> None:
    assert result.same_in_torch == result.same_in_onnxruntime == result.test_images == 450
    assert result.float64_difference < 1e-12
    assert result.accuracy > 0.9
    assert [entry.status for entry in result.report.entries] == ["removed"] * 4


def test_files_hold_both_networks(result: DemoResult) -> None:
    sums = [
        sum(node.op_type == "Add" for node in onnx.load(path).graph.node)
        for path in (result.onnx_original, result.onnx_plain)
    ]
    assert sums == [4, 0]


def test_the_result_serialises(result: DemoResult) -> None:
    data = json.loads(json.dumps(result.to_dict()))
    assert [latency["label"] for latency in data["latencies"]] == ["torch", "onnxruntime"]
    assert Path(data["onnx_plain"]).name == "digits_plain.onnx"


def test_a_changed_prediction_is_an_error() -> None:
    logits = torch.eye(3)
    assert demo._check_same("torch", logits, 2 * logits) == 3
    with pytest.raises(
        VerificationError, match="2 of 3 test images change their class in the plain network run by torch"
    ):
        demo._check_same("torch", logits, logits[[1, 0, 2]])


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'rmfx\[demo\]'"):
        demo.load_digits()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'rmfx\[cpu\]'"):
        demo.run(tmp_path)


def test_compare_tells_slower_from_faster() -> None:
    result = compare("sleep", lambda: time.sleep(0.001), lambda: time.sleep(0.004), pairs=4)
    low, high = result.interval
    assert result.first_ms < result.second_ms
    assert 1 < low <= result.ratio <= high
    with pytest.raises(ValueError, match="pairs must be at least 2, got 1"):
        compare("sleep", int, int, pairs=1)


def test_whose_turn_it_was_before_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    now, before = 0.0, ""

    def call(who: str) -> None:
        nonlocal now, before
        now += 1.2 if who != before else 1.0  # the caches are full of the other's data
        before = who

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    ratios = compare("turns", partial(call, "a"), partial(call, "b"), pairs=7).ratios
    assert len(ratios) == 7 and all(abs(ratio - 1) < 1e-12 for ratio in ratios)


def test_the_verdict_is_what_was_measured() -> None:
    slower = Comparison("torch", (1.0, 1.0), (2.0, 1.9))
    equal = Comparison("onnxruntime", (1.0, 1.0), (0.9, 1.1))
    faster = Comparison("a GPU", (2.0, 2.0), (1.0, 1.1))
    said = _verdict((slower, equal, faster))
    assert said == "Here the plain network is slower in torch, as fast in onnxruntime, faster in a GPU."
