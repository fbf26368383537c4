"""Several processes train as one does: batch norms see the whole batch, and all end with the same network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
from learning import small, tiny
from torch import Tensor, nn

from rmfx.errors import RmfxError, UnsupportedModelError
from rmfx.learn import Objective, Recipe, train
from rmfx.learn.synced_norm import synced

RECIPE = Recipe(epochs=3, batch=64, learning_rate=0.05, ema=0.9, clip=1.0)
WORKER = """
import sys
from pathlib import Path
import torch, torch.distributed
from test_learn_processes import refuse_an_odd_batch, train_recording
refuse_an_odd_batch(Path(sys.argv[1]))
train_recording(Path(sys.argv[1]))
torch.distributed.destroy_process_group()
"""
NORMS = """
import sys
from pathlib import Path
import torch, torch.distributed
from test_learn_processes import normalise_share
normalise_share(Path(sys.argv[1]))
torch.distributed.destroy_process_group()
"""


class Recording(Objective):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def loss(self, cross_entropy: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        self.losses.append(cross_entropy.detach())
        return cross_entropy


def refuse_an_odd_batch(folder: Path) -> None:
    """Every process says why, and none waits for another: they go on afterwards."""
    with pytest.raises(RmfxError, match="a batch of 63 images cannot be shared out among 2 processes"):
        train(tiny(), small(), Recipe(batch=63), folder=folder / "odd", device="cpu")


def train_recording(folder: Path, name: str = "") -> None:
    """Train twice in one process, the second time on; write what came out under the rank, or under ``name``."""
    model, objective = tiny().double(), Recording()
    kinds = [type(module) for module in model.modules()]
    history = train(model, small(), RECIPE, objective=objective, device="cpu")
    history += train(model, small(), RECIPE, objective=objective, device="cpu")
    assert [type(module) for module in model.modules()] == kinds
    name = name or str(torch.distributed.get_rank())
    measured = [[e.loss, e.accuracy, e.test_loss, e.test_accuracy, e.ema_test_accuracy] for e in history]
    torch.save({"model": model.state_dict(), "losses": objective.losses, "history": measured}, folder / f"{name}.pt")


def relative(first: Tensor, second: Tensor) -> float:
    return float(((first - second).abs() / second.abs().clamp(min=1e-30)).max())


def launch(folder: Path, script: str, devices: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``script`` in two processes that see ``devices``."""
    (folder / "worker.py").write_text(script)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, str(folder / "worker.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": devices},
    )


def test_two_processes_train_as_one_and_refuse_what_they_cannot_share(tmp_path: Path) -> None:
    done = launch(tmp_path, WORKER)
    assert done.returncode == 0, done.stderr
    train_recording(tmp_path, "one")
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "0", "1"))
    steps = (torch.stack(first["losses"]) + torch.stack(second["losses"])) / 2
    assert len(steps) == 24 and relative(steps, torch.stack(one["losses"])) < 1e-12
    assert first["history"] == second["history"]
    history, expected = (torch.tensor(run["history"], dtype=torch.float64) for run in (first, one))
    assert relative(history, expected) < 1e-12
    for name, value in one["model"].items():
        assert torch.equal(first["model"][name], second["model"][name])
        torch.testing.assert_close(first["model"][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_norms_on_a_gpu_see_the_whole_batch(tmp_path: Path) -> None:
    done = launch(tmp_path, NORMS, devices="0")
    assert done.returncode == 0, done.stderr


def normalise_share(folder: Path) -> None:
    """One of two processes on one GPU, which NCCL refuses and gloo allows."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
    whole, norm = nn.BatchNorm2d(3).cuda(), nn.BatchNorm2d(3).cuda()
    expected, half = whole(x), slice(3 * rank, 3 * rank + 3)
    with synced(nn.Sequential(norm), torch.device("cuda")):
        actual = norm(x[half])
        (gradient,) = torch.autograd.grad(actual.square().sum() + actual.pow(3).sum(), [x])
    (wanted,) = torch.autograd.grad(expected.square().sum() + expected.pow(3).sum(), [x])
    torch.testing.assert_close(actual, expected[half])
    torch.testing.assert_close(gradient[half], wanted[half], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var, whole.running_var)
    assert type(norm) is nn.BatchNorm2d


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (6, 4)), (nn.BatchNorm2d, (3, 4, 5, 2))])
def test_a_synced_norm_is_a_batch_norm(
    kind: type[nn.BatchNorm2d], shape: tuple[int, ...], settings: dict[str, object]
) -> None:
    norm, other = (nn.Sequential(kind(4, **settings)).double() for _ in range(2))  # type: ignore[arg-type]
    names = list(norm.state_dict())
    for _ in range(2):
        x = torch.randn(shape, dtype=torch.float64).mul(3).add(5).requires_grad_()
        expected = other(x)
        with synced(norm, torch.device("cpu")):
            assert type(norm[0]) is not kind
            actual = norm(x)
        weights = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(actual, expected)
        (gradient,), (wanted,) = (torch.autograd.grad(y, [x], weights) for y in (actual, expected))
        torch.testing.assert_close(gradient, wanted)
    assert type(norm[0]) is kind and list(norm.state_dict()) == names
    for name, value in other.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value)
    with synced(norm.eval(), torch.device("cpu")):
        torch.testing.assert_close(norm(x), other.eval()(x))


def test_a_norm_of_its_own_class_is_refused() -> None:
    class Mine(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(2), Mine(2))
    with pytest.raises(UnsupportedModelError, match="the batch norm 1 is a Mine"), synced(model, torch.device("cpu")):
        pass
    assert type(model[0]) is nn.BatchNorm2d
