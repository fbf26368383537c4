"""What is installed here, what really works, and the command that fixes what does not."""

from __future__ import annotations

import dataclasses
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch.torch_version import TorchVersion

from rmfx.deploy.providers import Provider, probe
from rmfx.vision import extension_loads

TESTED_TORCH = ("2.13", "2.14")  # from, and below

# What each package is for, and the command that installs it.
PURPOSES = {
    "torch": ("the network itself", "pip install 'torch>=2.13,<2.14'"),
    "numpy": ("arrays", "pip install rmfx"),
    "ml_dtypes": ("files in bf16", "pip install rmfx"),
    "safetensors": ("rmfx.save and rmfx.load", "pip install rmfx"),
    "onnx": ("rmfx.export", "pip install rmfx"),
    "onnx-ir": ("rmfx.export and rmfx.from_onnx", "pip install rmfx"),
    "onnxscript": ("rmfx.export and rmfx.from_onnx", "pip install rmfx"),
    "rich": ("the command line", "pip install rmfx"),
    "typer": ("the command line", "pip install rmfx"),
    "onnxruntime": ("running and comparing ONNX files on the CPU", "pip install 'rmfx[cpu]'"),
    "onnxruntime-gpu": ("running and comparing ONNX files on an NVIDIA GPU", "pip install 'rmfx[gpu]'"),
    "torchvision": ("networks named torchvision:...", "pip install 'rmfx[zoo]'"),
    "timm": ("networks named timm:...", "pip install 'rmfx[zoo]'"),
    "scikit-learn": ("rmfx demo", "pip install 'rmfx[demo]'"),
    "accelerate": ("rmfx train, rmfx finetune and rmfx prune --rounds", "pip install 'rmfx[train]'"),
}
_CORE = ("torch", "numpy", "ml_dtypes", "safetensors", "onnx", "onnx-ir", "onnxscript", "rich", "typer")
_OPTIONAL = ("torchvision", "timm", "scikit-learn", "accelerate")


@dataclass(frozen=True)
class Package:
    """One package: its version, ``None`` when it is not installed, and what rmfx uses it for."""

    name: str
    version: str | None
    purpose: str


@dataclass(frozen=True)
class Finding:
    """Something missing or broken, and the command or step that fixes it.

    ``serious`` findings stop the main job; the others only limit what can be done.
    """

    what: str
    fix: str
    serious: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found."""

    rmfx: str
    python: str
    platform: str
    packages: tuple[Package, ...]
    devices: tuple[str, ...]
    providers: tuple[Provider, ...]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether converting, saving and exporting can work."""
        return not any(finding.serious for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON-able dictionaries and lists, with ``healthy``."""
        return {**dataclasses.asdict(self), "healthy": self.healthy}


def diagnose() -> Diagnosis:
    """Look at versions, devices and execution providers; open a tiny session on each provider.

    >>> found = diagnose()
    >>> [package.version for package in found.packages if package.name == "torch"] == [torch.__version__]
    True
    """
    packages = tuple(Package(name, _version(name), purpose) for name, (purpose, _) in PURPOSES.items())
    versions = {package.name: package.version for package in packages}
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    cpu = f"CPU: {platform.machine()}, {torch.get_num_threads()} torch threads"
    providers = probe()
    return Diagnosis(
        rmfx=_version("rmfx") or "not installed (running from its sources)",
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        devices=(cpu, *(f"GPU: {gpu}" for gpu in gpus)),
        providers=providers,
        findings=(
            *_missing(versions),
            *_torch_findings(versions["torch"], bool(gpus), shutil.which("nvidia-smi") is not None),
            *_runtime_findings(versions, providers, bool(gpus)),
            *_torchvision_findings(versions["torchvision"]),
        ),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _missing(versions: dict[str, str | None]) -> list[Finding]:
    return [
        Finding(f"{name} is not installed (needed for: {PURPOSES[name][0]})", PURPOSES[name][1], name in _CORE)
        for name in (*_CORE, *_OPTIONAL)
        if versions[name] is None
    ]


def _torch_findings(version: str | None, has_gpu: bool, has_driver: bool) -> list[Finding]:
    findings = []
    oldest, too_new = TESTED_TORCH
    if version is not None and not oldest <= TorchVersion(version) < too_new:
        what = f"torch {version} is outside the versions that rmfx is tested with (>={oldest},<{too_new})"
        findings.append(Finding(what, PURPOSES["torch"][1], serious=True))
    if has_driver and not has_gpu:
        what = "this machine has an NVIDIA driver, but torch sees no GPU"
        findings.append(Finding(what, "install a CUDA build of torch: https://pytorch.org/get-started/locally"))
    return findings


def _runtime_findings(versions: dict[str, str | None], providers: tuple[Provider, ...], has_gpu: bool) -> list[Finding]:
    cpu, gpu = versions["onnxruntime"], versions["onnxruntime-gpu"]
    if cpu is None and gpu is None:
        what = "no onnxruntime is installed: rmfx.export cannot run and compare the files it writes"
        return [Finding(what, PURPOSES["onnxruntime-gpu" if has_gpu else "onnxruntime"][1], serious=True)]
    if cpu is not None and gpu is not None:
        what = "onnxruntime and onnxruntime-gpu are both installed: they overwrite each other's files"
        fix = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'rmfx[gpu]' or 'rmfx[cpu]'"
        return [Finding(what, fix, serious=True)]
    if gpu is None and has_gpu:
        what = "there is a GPU, but the installed onnxruntime only runs on the CPU"
        return [Finding(what, "pip uninstall -y onnxruntime, then pip install 'rmfx[gpu]'")]
    dead = [p for p in providers if p.name == "CUDAExecutionProvider" and not p.active]
    fix = "make the CUDA and cuDNN libraries match onnxruntime-gpu: pip install 'onnxruntime-gpu[cuda,cudnn]'"
    return [Finding(f"onnxruntime's CUDA provider does not start: {p.reason}", fix) for p in dead]


def _torchvision_findings(version: str | None) -> list[Finding]:
    if version is None or extension_loads():
        return []
    what = (
        f"torchvision {version} has no compiled operators that fit torch {torch.__version__}: classification "
        "networks work, detection networks do not"
    )
    return [Finding(what, "install torch and torchvision from the same index, both for CPU or both for CUDA")]
