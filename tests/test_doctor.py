"""The doctor: what it finds here, and the fix it names for everything that can be missing."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from rmfx import doctor
from rmfx.deploy import providers
from rmfx.deploy.providers import Provider
from rmfx.doctor import Finding, diagnose

ALL = dict.fromkeys(doctor.PURPOSES, "1.0") | {"onnxruntime-gpu": None}
CPU = (Provider("CPUExecutionProvider", True),)


def test_this_machine_is_healthy_and_the_diagnosis_serialises() -> None:
    diagnosis = diagnose()
    assert diagnosis.healthy
    data = json.loads(json.dumps(diagnosis.to_dict()))
    assert data["healthy"] is True
    assert {package["name"]: package["version"] for package in data["packages"]}["torch"] == torch.__version__
    assert data["devices"][0].startswith("CPU: ")


def test_everything_that_is_asked_of_pip_is_known() -> None:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
    extras = ("cpu", "gpu", "zoo", "demo", "train")  # the others are for benchmarks and development
    asked = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    names = {re.split("[<>=]", line)[0] for text in asked for line in text.split("\n") if line and line[0] != "#"}
    assert names == set(doctor.PURPOSES)
    assert {name for name in names if doctor._missing({**ALL, name: None})} == names - {
        "onnxruntime",
        "onnxruntime-gpu",
    }


def test_probe_runs_a_session_on_the_cpu() -> None:
    assert Provider("CPUExecutionProvider", True) in providers.probe()


def test_probe_tells_listed_from_active(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = importlib.import_module("onnxruntime")
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["NoSuchExecutionProvider"])
    (found,) = providers.probe()
    assert (found.name, found.active) == ("NoSuchExecutionProvider", False)
    assert found.reason


def test_probe_without_onnxruntime_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert providers.probe() == ()


@pytest.mark.parametrize(
    ("absent", "serious", "fix"),
    [
        ("torch", True, "pip install 'torch>=2.13,<2.14'"),
        ("onnxscript", True, "pip install rmfx"),
        ("onnx-ir", True, "pip install rmfx"),
        ("accelerate", False, "pip install 'rmfx[train]'"),
        ("timm", False, "pip install 'rmfx[zoo]'"),
        ("scikit-learn", False, "pip install 'rmfx[demo]'"),
    ],
)
def test_a_missing_package_has_its_command(absent: str, serious: bool, fix: str) -> None:
    (finding,) = doctor._missing({**ALL, absent: None})
    assert (finding.serious, finding.fix) == (serious, fix)
    assert finding.what.startswith(f"{absent} is not installed (needed for: ")


@pytest.mark.parametrize(
    ("version", "fine"), [("2.13.0", True), ("2.13.1+cpu", True), ("2.12.0", False), ("2.14.0", False)]
)
def test_torch_must_be_a_tested_version(version: str, fine: bool) -> None:
    findings = doctor._torch_findings(version, has_gpu=False, has_driver=False)
    expected = f"torch {version} is outside the versions that rmfx is tested with (>=2.13,<2.14)"
    assert [(finding.what, finding.serious) for finding in findings] == ([] if fine else [(expected, True)])


def test_a_driver_without_a_gpu_in_torch_is_told() -> None:
    (finding,) = doctor._torch_findings("2.13.0", has_gpu=False, has_driver=True)
    assert finding.what == "this machine has an NVIDIA driver, but torch sees no GPU"
    assert not finding.serious


@pytest.mark.parametrize(
    ("cpu", "gpu", "has_gpu", "what", "fix"),
    [
        (None, None, False, "no onnxruntime is installed", "pip install 'rmfx[cpu]'"),
        (None, None, True, "no onnxruntime is installed", "pip install 'rmfx[gpu]'"),
        ("1", "1", True, "are both installed", "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install"),
        ("1", None, True, "only runs on the CPU", "pip uninstall -y onnxruntime, then pip install 'rmfx[gpu]'"),
    ],
)
def test_the_right_runtime_is_advised(cpu: str | None, gpu: str | None, has_gpu: bool, what: str, fix: str) -> None:
    (finding,) = doctor._runtime_findings({"onnxruntime": cpu, "onnxruntime-gpu": gpu}, CPU, has_gpu)
    assert what in finding.what
    assert fix in finding.fix


def test_a_runtime_that_fits_needs_no_advice() -> None:
    assert doctor._runtime_findings({"onnxruntime": "1", "onnxruntime-gpu": None}, CPU, has_gpu=False) == []


def test_a_cuda_provider_that_does_not_start_is_told() -> None:
    found = (Provider("CUDAExecutionProvider", False, "libcudnn.so.9 is missing"), *CPU)
    (finding,) = doctor._runtime_findings({"onnxruntime": None, "onnxruntime-gpu": "1"}, found, has_gpu=True)
    assert finding.what == "onnxruntime's CUDA provider does not start: libcudnn.so.9 is missing"
    assert "onnxruntime-gpu[cuda,cudnn]" in finding.fix


def test_torchvision_without_its_operators_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "extension_loads", lambda: False)
    (finding,) = doctor._torchvision_findings("0.28.0")
    assert "classification networks work, detection networks do not" in finding.what
    assert doctor._torchvision_findings(None) == []


def test_one_serious_finding_makes_it_unhealthy() -> None:
    diagnosis = diagnose()
    sick = doctor.Diagnosis(**{**vars(diagnosis), "findings": (Finding("broken", "mend it", serious=True),)})
    assert not sick.healthy


@pytest.mark.gpu_runtime
def test_cuda_is_active_where_there_is_a_gpu() -> None:
    assert Provider("CUDAExecutionProvider", True) in providers.probe()
