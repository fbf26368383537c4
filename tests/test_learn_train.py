"""The training loop in one process: what it computes, what it writes, what it refuses."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learning import small, tiny
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import rmfx.learn
from rmfx.errors import RmfxError, RuntimeUnavailableError
from rmfx.learn import Data, Epoch, Objective, Recipe, train
from rmfx.learn.checkpoint import load_checkpoint
from rmfx.learn.metrics import Journal

RECIPE = Recipe(epochs=2, batch=64, learning_rate=0.05)


def alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks hold the same numbers, bit by bit."""
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def test_a_network_learns_and_comes_back_as_it_was() -> None:
    model, data = tiny(), small(1280, 320)
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    state = torch.get_rng_state()
    steps: list[tuple[str, int, int]] = []
    said: list[Epoch] = []
    recipe = replace(RECIPE, epochs=4, ema=0.9, warmup=0.5, clip=2.0, smoothing=0.1, nesterov=True)
    history = train(model, data, recipe, on_step=lambda *step: steps.append(step), on_epoch=said.append)
    assert [epoch.epoch for epoch in history] == [1, 2, 3, 4] and said == list(history)
    assert history[-1].test_accuracy > 0.8
    assert history[-1].ema_test_accuracy is not None and history[-1].ema_test_accuracy > 0.8
    assert steps == [("training", step, 80) for step in range(1, 81)]
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == names and [type(module) for module in model.modules()] == kinds
    assert not any(module.training for module in model.modules())
    assert (model(data.test.images).argmax(1) == data.test.labels).double().mean() == history[-1].ema_test_accuracy  # type: ignore[attr-defined]


def test_narrow_strided_pointwise_convs_have_right_gradients() -> None:
    # With channels last on a CPU, oneDNN has these wrong, or crashes, at times: see rmfx.learn.machine.layout_on.
    data, recipe = small(), replace(RECIPE, epochs=1, learning_rate=0.01)
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 1, stride=2), nn.Flatten())
    model = nn.Sequential(*first, nn.Linear(8 * 4 * 4, 10))
    exact = copy.deepcopy(model).double()
    contiguous: list[bool] = []
    model[2].register_forward_pre_hook(lambda _, inputs: contiguous.append(inputs[0].is_contiguous()))
    train(model, data, recipe, device="cpu")
    train(exact, data, recipe, device="cpu")
    assert contiguous and all(contiguous)
    for (name, value), truth in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (value - truth).abs().max() < 1e-5 * truth.abs().max(), name


def test_every_step_is_that_of_sgd_written_out() -> None:
    model, expected, data = tiny().double(), tiny().double(), small()
    recipe = replace(RECIPE, epochs=1, weight_decay=0.01, smoothing=0.1, clip=0.5)
    record = train(model, data, recipe, device="cpu")[0]
    moments = {name: torch.zeros_like(value) for name, value in expected.named_parameters()}
    losses = []
    for step, (images, labels) in enumerate(data.train.batches(64, order=0)):
        loss = F.cross_entropy(expected(images.double()), labels, label_smoothing=0.1)
        names, values = zip(*expected.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, values)
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        rate = 0.05 * (1 + torch.cos(torch.tensor(torch.pi * step / 4, dtype=torch.float64))) / 2
        with torch.no_grad():
            for name, value, gradient in zip(names, values, gradients, strict=True):
                decay = 0.01 if value.dim() > 1 else 0.0
                gradient = gradient * (0.5 / (norm + 1e-6)).clamp(max=1) + decay * value
                moments[name] = 0.9 * moments[name] + gradient
                value -= rate * moments[name]
        losses.append(loss.item())
    assert {value.dtype for value in model.parameters()} == {torch.float64}
    assert record.loss == pytest.approx(sum(losses) / 4, rel=1e-12)
    for name, value in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-9, atol=1e-12)


def test_the_folder_holds_everything(tmp_path: Path) -> None:
    model = tiny()
    folder = tmp_path / "new" / "run"
    history = train(model, small(), RECIPE, folder=folder)
    assert {"checkpoint.pt", "metrics.jsonl", "model.safetensors", "recipe.json"} <= {f.name for f in folder.iterdir()}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [epoch.to_dict() for epoch in history]
    assert json.loads((folder / "recipe.json").read_text())["learning_rate"] == 0.05
    other = tiny(seed=1)
    other.load_state_dict(load_file(folder / "model.safetensors"))
    assert alike(model, other)
    assert (folder / "tensorboard").is_dir() == (importlib.util.find_spec("tensorboard") is not None)
    with pytest.raises(RmfxError, match="holds a training already: go on with it"):
        train(tiny(), small(), RECIPE, folder=folder)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_going_on_is_as_if_it_had_never_stopped(tmp_path: Path, ema: float | None) -> None:
    recipe = replace(RECIPE, epochs=3, ema=ema)
    whole, stopped, resumed = tiny(dropout=0.3), tiny(dropout=0.3), tiny(dropout=0.3, seed=1)
    expected = train(whole, small(), recipe, device="cpu")

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, small(), recipe, device="cpu", folder=tmp_path, on_epoch=stop)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3}\n')  # as if it had been killed between this file and the checkpoint
    history = train(resumed, small(), recipe, device="cpu", folder=tmp_path, resume=True)
    assert [replace(e, seconds=0.0) for e in history] == [replace(e, seconds=0.0) for e in expected]
    assert alike(whole, resumed)
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3]
    again = train(tiny(seed=2), small(), recipe, device="cpu", folder=tmp_path, resume=True)
    assert again == history


def test_going_on_with_another_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RmfxError, match="there is no .*checkpoint.pt to go on from"):
        train(tiny(), small(), RECIPE, folder=tmp_path, resume=True)
    with pytest.raises(RmfxError, match="resume needs the folder"):
        train(tiny(), small(), RECIPE, resume=True)
    train(tiny(), small(), RECIPE, folder=tmp_path)

    class Other(Objective):
        def settings(self) -> dict[str, str | float]:
            return {"extra": 1.0}

    wider = tiny()
    wider[7], wider[8], wider[10] = nn.Linear(32, 17), nn.BatchNorm1d(17), nn.Linear(17, 10)
    cases: list[tuple[str, nn.Module, Data, Recipe, Objective | None]] = [
        ("epochs was 2 and is 3; seed was 0 and is 1", tiny(), small(), replace(RECIPE, epochs=3, seed=1), None),
        ("network was 'Sequential", wider, small(), RECIPE, None),
        ("data was 'small, 256", tiny(), small(128), RECIPE, None),
        ("extra was None and is 1.0", tiny(), small(), RECIPE, Other()),
    ]
    for message, model, data, recipe, objective in cases:
        with pytest.raises(RmfxError) as refused:
            train(model, data, recipe, folder=tmp_path, resume=True, objective=objective)
        assert f"is of another training: {message}" in str(refused.value)
    (tmp_path / "checkpoint.pt").write_bytes(b"half a fi")
    with pytest.raises(RmfxError, match="cannot be read as a checkpoint"):
        load_checkpoint(tmp_path, {})


def unfit(classes: int = 10, channels: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 8), nn.Flatten(), nn.Linear(4, classes))


class Two(nn.Module):
    """Gives a pair in training mode, as networks with auxiliary outputs do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = unfit()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.inner(x)
        return (y, y) if self.training else y


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (unfit(classes=9), {}, "the network's output is [9], and small has 10 classes"),
        (unfit(channels=3), {}, "the network does not take images of small, [1, 8, 8]: "),
        (Two(), {}, "the network gives a tuple in training mode"),
        (nn.Flatten(), {}, "the network has no parameters"),
        (unfit().requires_grad_(False), {}, "all parameters of the network are frozen"),
        (unfit(), {"batch": 257}, "a batch of 257 images is more than the 256"),
        (unfit(), {"learning_rate": 1e30}, "the loss is "),
        (unfit(), {"precision": "fp16"}, "precision fp16 needs CUDA"),
    ],
)
def test_what_cannot_be_trained_is_refused(model: nn.Module, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RmfxError) as refused:
        train(model, small(), replace(RECIPE, **changes), device="cpu")
    assert message in str(refused.value)


def test_devices_and_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RmfxError, match="device 'tpu' is not understood"):
        train(unfit(), small(), RECIPE, device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeUnavailableError, match="device cuda was asked for"):
        train(unfit(), small(), RECIPE, device="cuda")
    data = small()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'rmfx\[train\]'"):
        train(unfit(), data, RECIPE)


def test_bf16_on_a_cpu_keeps_weights_in_float32() -> None:
    model = tiny()
    history = train(model, small(), replace(RECIPE, precision="bf16"), device="cpu")
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert history[1].loss is not None and history[0].loss is not None and history[1].loss < history[0].loss
    exact = train(tiny(), small(), RECIPE, device="cpu")
    assert exact[1].loss != history[1].loss


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            written.append((name, value, epoch))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard" or None)
    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setattr("rmfx.learn.metrics.importlib.import_module", lambda name: module)
    Journal(tmp_path).add(Epoch(3, 0.1, 0.5, 0.9, 0.6, 0.8))
    assert ("test_accuracy", 0.8, 3) in written and written[-1][0] == "closed"
    assert not any(name == "ema_test_accuracy" for name, _, _ in written)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_gpu_trains_in_every_precision(precision: Any) -> None:
    model, data = tiny(), small(1280, 320)
    history = train(model, data, replace(RECIPE, epochs=3, precision=precision, ema=0.9, clip=5.0), device="cuda")
    assert history[0].loss is not None and history[-1].loss is not None and history[-1].loss < history[0].loss
    assert {value.device.type for value in model.parameters()} == {"cpu"}
    assert all(value.is_contiguous() for value in model.parameters())


@pytest.mark.gpu
def test_fine_tuning_on_a_gpu_begins_with_the_same_predictions() -> None:
    data = small(1280, 320)
    model = tiny()
    train(model, data, RECIPE, device="cuda")
    tuned = rmfx.learn.finetune(model, data, replace(RECIPE, epochs=1, learning_rate=0.01, precision="bf16"))
    assert tuned.start.same == tuned.start.images == 320
