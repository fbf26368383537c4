"""Recipes, learning rates, averaged weights, and what a teacher adds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from learning import small, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from rmfx.errors import RmfxError
from rmfx.learn import Distillation, Recipe, train
from rmfx.learn.averaging import Average
from rmfx.learn.schedule import rate_at
from rmfx.models.resdistill import fading_resnet


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs must be above 0, got 0"),
        ("epochs", 1.5, "epochs must be a whole number, got 1.5"),
        ("batch", -1, "batch must be above 0"),
        ("learning_rate", float("nan"), "learning_rate must be above 0"),
        ("momentum", 1.0, "momentum must be below 1"),
        ("weight_decay", -1e-4, "weight_decay must not be negative"),
        ("schedule", "linear", "schedule must be one of ('cosine', 'step'), got 'linear'"),
        ("precision", "int8", "precision must be one of"),
        ("step_every", 0, "step_every must be above 0"),
        ("step_factor", float("inf"), "step_factor must be above 0"),
        ("warmup", 30, "warmup must be shorter than the 30 epochs, got 30"),
        ("smoothing", 1.0, "smoothing must be below 1"),
        ("ema", 1.0, "ema must be between 0 and 1"),
        ("clip", 0.0, "clip must be above 0"),
        ("seed", -1, "seed must not be negative"),
    ],
)
def test_senseless_recipes_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(RmfxError) as refused:
        Recipe(**{field: value})
    assert message in str(refused.value)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(RmfxError, match="nesterov needs momentum"):
        Recipe(nesterov=True, momentum=0.0)


def test_rates_agree_with_the_schedulers_of_torch() -> None:
    recipe = Recipe(epochs=6, learning_rate=0.3, warmup=1.5, step_every=2, step_factor=0.5)
    steps, rising = 4, 6
    optimiser = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 6 * steps - rising)
    for step in range(6 * steps):
        if step < rising:
            assert rate_at(recipe, step, steps) == pytest.approx(0.3 * (step + 1) / rising)
            continue
        assert rate_at(recipe, step, steps) == pytest.approx(cosine.get_last_lr()[0])
        optimiser.step()
        cosine.step()
    stepped = Recipe(epochs=6, learning_rate=0.3, schedule="step", step_every=2, step_factor=0.5)
    assert [rate_at(stepped, epoch * steps, steps) for epoch in range(6)] == [0.3, 0.3, 0.15, 0.15, 0.075, 0.075]


def test_the_average_follows_weights_and_statistics_and_leaves_whole_numbers() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    average = Average(model, 0.5)
    weights, means = [model[0].weight.detach().clone()], [model[1].running_mean.clone()]
    for step in range(3):
        with torch.no_grad():
            model[0].weight.add_(step + 1)
        model(torch.randn(4, 2, dtype=torch.float64))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        weights.append(decay * weights[-1] + (1 - decay) * model[0].weight.detach())
        means.append(decay * means[-1] + (1 - decay) * model[1].running_mean)
    own = copy.deepcopy(model.state_dict())
    with average.applied():
        torch.testing.assert_close(model[0].weight, weights[-1], check_dtype=False)
        torch.testing.assert_close(model[1].running_mean, means[-1])
        assert model[1].num_batches_tracked == 3
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_distillation_is_the_divergence_times_the_squared_temperature() -> None:
    student, taught = torch.randn(2, 5, 3, dtype=torch.float64)
    teacher = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        teacher.weight.copy_(torch.eye(3))
    distillation = Distillation(teacher, weight=0.7, temperature=2.0)
    distillation.start(teacher)
    p, q = (taught / 2).softmax(1), (student / 2).softmax(1)
    expected = 0.25 + 0.7 * 4 * (p * (p / q).log()).sum(1).mean()
    assert distillation.loss(torch.tensor(0.25), student, taught).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"temperature": 0.0}, {"fading": 1.5}, {"shape": "square"}])
def test_senseless_distillation_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RmfxError, match="distillation: "):
        Distillation(nn.Linear(1, 1), **wrong)


def test_a_student_loses_its_shortcuts_and_the_teacher_stays() -> None:
    student = fading_resnet((1, 1, 1, 1), widths=(4, 4, 8, 8), stem="cifar", num_classes=10, in_channels=1)
    strengths: list[float] = []

    class Watching(Distillation):
        def loss(self, cross_entropy: Tensor, logits: Tensor, images: Tensor) -> Tensor:
            strengths.append(student.strength)
            return super().loss(cross_entropy, logits, images)

    teacher = tiny(dropout=0.5)
    before = copy.deepcopy(teacher.state_dict())
    recipe = Recipe(epochs=2, batch=64, learning_rate=0.05, ema=0.9)
    history = train(student, small(), recipe, objective=Watching(teacher, fading=0.5, shape="cosine"))
    assert strengths[0] == 1.0 and strengths == sorted(strengths, reverse=True) and 0 < strengths[2] < 1
    assert strengths[4:] == [0.0] * 4 and student.strength == 0.0
    assert history[-1].loss is not None and history[-1].loss > F.cross_entropy(torch.eye(2), torch.arange(2)).item()
    assert teacher.training and all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
