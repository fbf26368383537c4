"""Networks by name: what is built, and what is said when a name, a file or a package is wrong."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from rmfx import vision, zoo
from rmfx.errors import ModelNameError

FACTORIES = """
from torch import nn
from neighbour import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(5, WIDTH, 3)
    def forward(self, x):
        return self.conv(x)

ready = Net()
def small():
    return Net()
def number():
    return 3
def broken():
    raise KeyError("width")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 7\n")
    path = tmp_path / "nets_of_mine.py"
    path.write_text(FACTORIES)
    return path


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "rmfx:rmnet26x3_32"])
def test_builds_in_eval_mode_with_the_published_input_size(name: str) -> None:
    model = zoo.build(name)
    assert not any(module.training for module in model.modules())
    x = zoo.example_input(name, model)
    assert x.shape == ((1, 3, 32, 32) if name.startswith("rmfx") else (1, 3, 224, 224))
    assert x.min() < 0 < x.max()


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    first = zoo.build("rmfx:rmnet26x3_32", seed=1).state_dict()
    assert torch.equal(torch.rand(1), expected_next)  # the global generator is as it was
    second = zoo.build("rmfx:rmnet26x3_32", seed=1).state_dict()
    other = zoo.build("rmfx:rmnet26x3_32", seed=2).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_timm_input_size_is_the_one_of_its_configuration() -> None:
    assert zoo.input_shape("timm:efficientnet_b3", zoo.build("timm:efficientnet_b3")) == (3, 288, 288)


def test_example_input_takes_size_shape_batch_dtype() -> None:
    model = zoo.build("rmfx:rmnet26x3_32").double()
    x = zoo.example_input("rmfx:rmnet26x3_32", model, 40, batch=2)
    assert x.shape == (2, 3, 40, 40)
    assert x.dtype == torch.float64
    assert zoo.example_input("rmfx:rmnet26x3_32", model, (3, 8, 9)).shape == (1, 3, 8, 9)
    assert torch.equal(x, zoo.example_input("rmfx:rmnet26x3_32", model, 40, batch=2))


@pytest.mark.parametrize("factory", ["small", "ready"])
def test_builds_from_a_file_with_a_neighbour(file: Path, factory: str) -> None:
    before = list(sys.path)
    model = zoo.build(f"{file}:{factory}")
    assert isinstance(model, nn.Module)
    assert model.conv.out_channels == 7
    assert not model.training
    assert sys.path == before
    assert zoo.example_input(f"{file}:{factory}", model, 12).shape == (1, 5, 12, 12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet19", "torchvision has no network 'resnet19'; did you mean torchvision:resnet18"),
        ("timm:resnet18x.a1_in1k", "timm has no network 'resnet18x'; did you mean timm:resnet18"),
        ("rmfx:zzz", "rmfx has no network 'zzz'; no name is close"),
        ("resnet18", "did you mean torchvision:resnet18?"),
        ("keras:resnet18", "there is no source 'keras'; write torchvision:NAME, timm:NAME, rmfx:NAME"),
        ("torchvision:", "names no network"),
        ("missing.py:net", "missing.py does not exist"),
    ],
)
def test_wrong_names_get_advice(name: str, message: str) -> None:
    with pytest.raises(ModelNameError) as error:
        zoo.build(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("tiny", "has no function 'tiny'; it defines Net, number, ready, small"),
        ("number", "number gave int: it must give a torch.nn.Module"),
        ("broken", "broken raised KeyError: 'width'"),
    ],
)
def test_wrong_factories_get_advice(file: Path, factory: str, message: str) -> None:
    with pytest.raises(ModelNameError) as error:
        zoo.build(f"{file}:{factory}")
    assert message.replace("Net, number", "Net, broken, number") in str(error.value)


def test_a_file_that_is_no_python_says_so(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def net(:\n")
    with pytest.raises(ModelNameError, match="bad.py:net raised SyntaxError: "):
        zoo.build(f"{path}:net")


def test_a_file_has_a_module_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataclass looks up its module by name, also where another one has the file's."""
    monkeypatch.setitem(sys.modules, "shadow", ModuleType("shadow"))
    (tmp_path / "shadow.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, fields\n"
        "from typing import ClassVar as Shared\n"
        "from torch import nn\n"
        "@dataclass\n"
        "class Sizes:\n"
        "    all: Shared[int] = 3\n"
        "    width: int = 5\n"
        "def net():\n"
        "    return nn.Linear(1, sum(field.default for field in fields(Sizes)))\n"
    )
    model = zoo.build(f"{tmp_path / 'shadow.py'}:net")
    assert isinstance(model, nn.Linear) and model.out_features == 5
    assert not hasattr(sys.modules["shadow"], "net")


def test_a_file_that_fails_leaves_no_module(tmp_path: Path) -> None:
    path = tmp_path / "failing.py"
    path.write_text("raise KeyError('width')\n")
    before = set(sys.modules)
    with pytest.raises(ModelNameError, match="failing.py:net raised KeyError: 'width'"):
        zoo.build(f"{path}:net")
    assert set(sys.modules) == before


def test_pretrained_and_weights_exclude_each_other() -> None:
    with pytest.raises(ModelNameError, match="exclude each other"):
        zoo.build("rmfx:rmnet26x3_32", weights=Path("w.pt"), pretrained=True)


def test_rmfx_publishes_no_weights() -> None:
    with pytest.raises(ModelNameError, match="rmfx:rmnet26x3_32 has no published weights"):
        zoo.build("rmfx:rmnet26x3_32", pretrained=True)


def test_a_failed_download_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    models = vision.import_torchvision().models

    def offline(name: str, weights: str | None) -> nn.Module:
        raise OSError("name or service not known")

    monkeypatch.setattr(models, "get_model", offline)
    with pytest.raises(ModelNameError) as error:
        zoo.build("torchvision:resnet18", pretrained=True)
    assert str(error.value) == (
        "the pretrained weights of torchvision:resnet18 cannot be had: name or service not known; "
        "give a local file with --weights"
    )


@pytest.mark.parametrize(("call", "package"), [("import_torchvision", "torchvision"), ("import_timm", "timm")])
def test_a_missing_package_says_how_to_install_it(call: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ModelNameError) as error:
        getattr(vision, call)()
    assert str(error.value) == f"{package} is not installed: pip install 'rmfx[zoo]'"


def test_torchvision_runs_in_a_fresh_process_whether_or_not_its_operators_load() -> None:
    code = (
        "from rmfx.vision import import_torchvision; import torch; "
        "print(*import_torchvision().models.resnet18().eval()(torch.zeros(1, 3, 32, 32)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1 1000\n"), done.stderr


def test_names_lists_each_source() -> None:
    assert "resnet18" in zoo.names("torchvision")
    assert "resnet18" in zoo.names("timm")
    assert "rmnet26x3_32" in zoo.names("rmfx")
    assert "rmnet" not in zoo.names("rmfx")  # it has arguments without defaults
    with pytest.raises(ModelNameError, match="no source of networks is called 'hub'"):
        zoo.names("hub")


def test_unknown_sizes_are_asked_for(file: Path) -> None:
    model = zoo.build(f"{file}:small")
    with pytest.raises(ModelNameError, match="give --size 32 or --input-shape 3,32,32"):
        zoo.example_input(f"{file}:small", model)
    with pytest.raises(ModelNameError, match="no convolution to tell the input channels from: give --input-shape"):
        zoo.example_input("net.rmfx", nn.Linear(2, 3), 8)
    with pytest.raises(ModelNameError, match="input sizes must be positive"):
        zoo.example_input(f"{file}:small", model, (5, 0, 4))
