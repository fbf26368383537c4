"""Fine-tuning begins with the function of the residual network, and goes on from there."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learning import small, tiny
from torch import Tensor, nn

import rmfx
from rmfx.check.compare import float32_arithmetic
from rmfx.errors import RmfxError, VerificationError
from rmfx.learn import Recipe, finetune, train
from rmfx.learn.finetune import _compare
from rmfx.learn.metrics import Epoch

RECIPE = Recipe(epochs=2, batch=64, learning_rate=0.01)


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    model = tiny()
    train(model, small(1280, 320), Recipe(epochs=4, batch=64, learning_rate=0.05))
    return model


@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_begins_as_the_original_and_learns(trained: nn.Sequential, fold_bn: bool, dtype: torch.dtype) -> None:
    model, data = copy.deepcopy(trained).to(dtype).requires_grad_(False), small(1280, 320)
    before = copy.deepcopy(model.state_dict())
    said: list[Epoch] = []
    tuned = finetune(model, data, RECIPE, fold_bn=fold_bn, on_epoch=said.append)
    assert tuned.start.same == tuned.start.images == 320
    assert tuned.start.accuracy == tuned.start.original_accuracy == tuned.history[0].test_accuracy > 0.8
    assert [epoch.epoch for epoch in tuned.history] == [0, 1, 2] and tuned.history[0].loss is None
    assert len(said) == 2 and tuned.history[2].test_accuracy > 0.8
    assert any(isinstance(module, nn.BatchNorm2d) for module in tuned.network.modules()) != fold_bn
    assert rmfx.report(tuned.network).count("removed") == 1
    assert all(parameter.requires_grad for parameter in tuned.network.parameters())
    assert {parameter.dtype for parameter in tuned.network.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_parameter_is_trained(trained: nn.Sequential) -> None:
    data = small()
    still = finetune(trained, data, replace(RECIPE, epochs=1, learning_rate=1e-30)).network
    moved = finetune(trained, data, replace(RECIPE, epochs=1)).network
    untrained = {name for name, value in moved.named_parameters() if torch.equal(value, still.get_parameter(name))}
    assert untrained <= {"3.conv2.bias", "7.bias"}  # the norms behind them take them away: their gradients are 0


def test_calibration_takes_batches_at_even_distances(trained: nn.Sequential) -> None:
    data = small()
    seen: list[int] = []

    class Counting:
        def __len__(self) -> int:
            return len(data.train)

        def batches(self, size: int, **options: object) -> object:
            for index, batch in enumerate(data.train.batches(size, **options)):  # type: ignore[arg-type]
                if options.get("order") is None:
                    seen.append(index)
                yield batch

    counted = replace(data, train=Counting())  # type: ignore[arg-type]
    finetune(trained, counted, replace(RECIPE, epochs=1), calibration=2)
    assert seen == [0, 1, 2]  # of four; the first and the third are used
    seen.clear()
    finetune(trained, counted, replace(RECIPE, epochs=1))
    assert seen == [0, 1, 2, 3]


def test_it_goes_on_from_a_checkpoint(trained: nn.Sequential, tmp_path: Path) -> None:
    data = small()
    expected = finetune(trained, data, RECIPE, device="cpu")

    def stop(epoch: Epoch) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(trained, data, RECIPE, device="cpu", folder=tmp_path, on_epoch=stop)
    resumed = finetune(trained, data, RECIPE, device="cpu", folder=tmp_path, resume=True)
    assert [replace(e, seconds=0.0) for e in resumed.history] == [replace(e, seconds=0.0) for e in expected.history]
    for name, value in expected.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]


def test_a_plain_network_is_refused() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(), nn.Linear(4, 10))
    with pytest.raises(RmfxError, match="conversion removes nothing from this network"):
        finetune(plain, small(), RECIPE)


def test_a_changed_prediction_is_an_error(trained: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, *arguments: object, **options: object) -> nn.Module:
        plain = rmfx.convert(model, torch.zeros(1, 1, 8, 8), keep_bn=True)
        with torch.no_grad():
            next(p for name, p in plain.named_parameters() if name.endswith("10.bias"))[3] += 5.0
        return plain

    monkeypatch.setattr(sys.modules["rmfx.learn.finetune"], "convert", broken)
    with pytest.raises(VerificationError, match="gives a test image another class than the original"):
        finetune(trained, small(), RECIPE)


def test_predictions_are_compared_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all operations, not of convolutions alone; what else is set stays."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    seen = set()

    class Watching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.add((matmul.fp32_precision, cudnn.benchmark))
            return super().forward(x.flatten(1))

    network = Watching(64, 10)
    with float32_arithmetic("tf32"):
        start = _compare(network, network, small().test, 64, torch.device("cpu"))
        assert matmul.fp32_precision == "tf32"
    assert seen == {("ieee", True)} and start.same == start.images
