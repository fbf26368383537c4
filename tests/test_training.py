"""keep_bn and calibrate: batch norms that carry, a function that stays, a network that trains."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from front import hostile, operations
from nets import Residual, Sum, build, cbr, conv
from oracle import assert_equivalent, assert_equivalent_on, relative_difference
from torch import Tensor, fx, nn

import rmfx
from rmfx import RmfxError
from rmfx.algebra.widened import is_identity_at
from rmfx.hostile import randomise

BLOCKS = ("basic_identity", "basic_projection", "basic_signed", "basic_chain", "bottleneck_stride_2", "inverted_relu6",
          "pre_activation", "resnext_projection", "basic_1d", "basic_3d", "mlp", "nested")  # fmt: skip
SHAPE = (4, 3, 8, 8)


def batches(shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    """Batches whose statistics differ from one another and from mean 0 and variance 1."""
    return [hostile(*shape, seed=seed) * (0.2 + seed) + seed for seed in range(count)]


def norm(converted: fx.GraphModule, name: str) -> nn.BatchNorm2d:
    module = converted.get_submodule(name)
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    return module


def seen_by_norms(converted: fx.GraphModule, data: list[Tensor]) -> dict[str, Tensor]:
    """All values that reach each batch norm in eval mode, ``[channels, values]``."""
    values: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in converted.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            rows = values.setdefault(name, [])
            handles.append(
                module.register_forward_pre_hook(lambda _m, a, r=rows: r.append(a[0].transpose(0, 1).flatten(1)))
            )
    with torch.no_grad():
        for x in data:
            converted.eval()(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows, 1) for name, rows in values.items()}


# -- structure --------------------------------------------------------------------------------------------------------


def test_norms_are_widened_and_one_stands_behind_the_sum() -> None:
    model, x = build("basic_identity")
    converted = rmfx.convert(model, x, keep_bn=True)
    body = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert operations(converted) == [*body, *body, *body]
    report = rmfx.report(converted)
    assert report.carried_norms == {"1.branch.0.1": tuple(range(6, 12)), "1.carry": tuple(range(6))}
    wide, old = norm(converted, "1.branch.0.1"), model[1].branch[0][1]
    for key in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(wide, key)[:6], getattr(old, key))
    for kept, first in ((wide, 6), (norm(converted, "1.carry"), 0)):
        assert kept.weight[first:].tolist() == [math.sqrt(1 + kept.eps)] * 6
        assert kept.bias[first:].tolist() == kept.running_mean[first:].tolist() == [0.0] * 6
        assert kept.running_var[first:].tolist() == [1.0] * 6
    assert (wide.eps, wide.momentum) == (old.eps, old.momentum)
    assert torch.equal(norm(converted, "0.1").weight, model[0][1].weight)
    assert "batch norms kept: equal in eval mode; training differs" in str(report)


def test_norms_without_weights_and_with_other_settings_are_widened_too() -> None:
    for kind in ({"affine": False}, {"momentum": None}, {"eps": 0.1}):
        branch = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, **kind), nn.ReLU(), conv(4, 4))
        model = randomise(nn.Sequential(*cbr(3, 4), Residual(branch)).double(), torch.randn(SHAPE).double())
        converted = rmfx.convert(model, keep_bn=True)
        wide, old = norm(converted, "3.branch.1"), branch[1]
        assert (wide.eps, wide.momentum, wide.num_features) == (old.eps, old.momentum, 8)
        assert_equivalent_on(model, converted, SHAPE)


def test_two_norms_of_different_eps_stay_apart() -> None:
    branches = [nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, eps=eps), nn.ReLU(), conv(4, 4)) for eps in (1e-5, 1e-3)]
    model = randomise(nn.Sequential(*cbr(3, 4), Sum(*branches)).double(), torch.randn(SHAPE).double())
    converted = rmfx.convert(model, keep_bn=True)
    assert rmfx.report(converted).count("removed") == 1 and operations(converted).count("BatchNorm2d") == 4
    assert_equivalent_on(model, converted, SHAPE)


@pytest.mark.parametrize("name", ["repvgg", "acnet", "dbb", "mobileone", "repvgg_strided"])
def test_parallel_linear_branches_stay(name: str) -> None:
    model, x = build(name)
    converted = rmfx.convert(model, x, keep_bn=True)
    report = rmfx.report(converted)
    assert report.count("removed") == 0
    assert report.entries[0].reason == "parallel linear branches stay apart for training: each keeps its own norm"
    assert [line.name for line in report.passes] == ["remove_residual"]
    assert operations(converted).count("BatchNorm2d") == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_is_that_of_the_model(mode: bool) -> None:
    model, x = build("basic_chain")
    converted = rmfx.convert(model.train(mode), x, keep_bn=True)
    assert {module.training for module in converted.modules()} == {mode}
    assert {module.training for module in model.modules()} == {mode}


def test_dropout_survives_outside_of_regions_and_is_reported_inside() -> None:
    branch = nn.Sequential(*cbr(4, 4), nn.Dropout(0.3), conv(4, 4))
    model = nn.Sequential(*cbr(3, 4), Residual(branch), nn.Dropout(0.4), conv(4, 2))
    randomise(model.double(), torch.randn(SHAPE).double())
    converted = rmfx.convert(model.train(), keep_bn=True)
    assert [m.p for m in converted.modules() if isinstance(m, nn.Dropout)] == [0.4]
    assert any("dropout 3.branch.3 is gone" in note for note in rmfx.report(converted).notes)


# -- function ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_eval_outputs_are_equal_before_and_after_calibration(name: str) -> None:
    model, x = build(name)
    converted = rmfx.convert(model, x, keep_bn=True)
    assert rmfx.report(converted).carried_norms
    shape = tuple(x.shape)
    assert_equivalent_on(model, converted, shape)
    assert rmfx.calibrate(converted, batches(shape)) is converted
    assert_equivalent_on(model, converted, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(dtype: torch.dtype) -> None:
    model, x = build("basic_signed")
    model, x = model.to(dtype), x.to(dtype)
    converted = rmfx.calibrate(rmfx.convert(model, x, keep_bn=True), [x, x + 1])
    assert {t.dtype for t in converted.state_dict().values() if t.is_floating_point()} == {dtype}
    bound = 1e-5 if dtype == torch.float32 else 0.1
    with torch.no_grad():
        assert relative_difference(model(x).double(), converted(x).double()) < bound


def test_training_outputs_differ_from_the_first_batch_on() -> None:
    model, x = build("basic_identity")
    converted = rmfx.calibrate(rmfx.convert(model.train(), keep_bn=True), [x])
    with torch.no_grad():
        assert relative_difference(model(x), converted(x)) > 1e-2


# -- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_carried_channels_get_the_statistics_of_the_data(name: str) -> None:
    model, x = build(name)
    data = batches(tuple(x.shape))
    converted = rmfx.convert(model, x, keep_bn=True)
    old = {key for key, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    rmfx.calibrate(converted, data)
    values = seen_by_norms(converted, data)
    for key, rows in values.items():
        kept = norm(converted, key)
        own = model.get_submodule(key).num_features if key in old else 0
        carried = torch.ones(kept.num_features, dtype=torch.bool)
        if own:
            carried = (before[f"{key}.running_var"] == 1) & (before[f"{key}.running_mean"] == 0)
            assert int(carried.sum()) == kept.num_features - own
        mean, var = rows.mean(1)[carried], rows.var(1, correction=0)[carried]
        alive = var > 0.01 * var.max() if var.numel() else var > 0
        assert torch.allclose(kept.running_mean[carried][alive], mean[alive], rtol=1e-12, atol=1e-12)
        assert torch.allclose(kept.running_var[carried][alive], var[alive], rtol=1e-11)
        assert torch.equal(kept.weight[carried], torch.sqrt(kept.running_var[carried] + kept.eps))
        assert torch.equal(kept.bias[carried], kept.running_mean[carried])
        for part in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(getattr(kept, part)[~carried], before[f"{key}.{part}"][~carried])


def test_batches_may_be_tuples_lists_or_a_generator() -> None:
    model, x = build("basic_identity")
    states = []
    for form in (lambda b: b, lambda b: (b,), lambda b: [b]):
        converted = rmfx.convert(model, keep_bn=True)
        rmfx.calibrate(converted, (form(b) for b in batches(SHAPE)))
        states.append(converted.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[key], states[0][key]) for key in states[0])


def test_one_large_batch_counts_like_many_small_ones() -> None:
    model, _ = build("basic_identity")
    data = torch.cat(batches(SHAPE))
    whole, parts = (rmfx.calibrate(rmfx.convert(model, keep_bn=True), d) for d in ([data], data.split([1, 6, 5])))
    for key, value in whole.state_dict().items():
        assert torch.allclose(value, parts.state_dict()[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [True, False])
def test_mode_and_hooks_are_put_back(mode: bool) -> None:
    model, x = build("basic_identity")
    converted = rmfx.convert(model, keep_bn=True).train(mode)
    rmfx.calibrate(converted, [x])
    with pytest.raises(RuntimeError):
        rmfx.calibrate(converted, [x, x[:, :2]])
    for module in converted.modules():
        assert module.training is mode and not module._forward_pre_hooks
    assert int(norm(converted, "1.carry").num_batches_tracked) == 0


def converted_again(plain: nn.Module, x: Tensor) -> fx.GraphModule:
    return rmfx.convert(plain, x, keep_bn=True)


def pruned_by_a_third(plain: nn.Module, x: Tensor) -> fx.GraphModule:
    return rmfx.prune(plain, x, amount=0.3, importance="l2").network


def pruned_and_lowered(plain: nn.Module, x: Tensor) -> fx.GraphModule:
    return rmfx.prune(plain, x, amount=0.3, importance="l2", lower=True).network


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("change", [converted_again, pruned_by_a_third, pruned_and_lowered])
def test_norms_go_on_carrying(change: Callable[[nn.Module, Tensor], fx.GraphModule], calibrated: bool) -> None:
    model, x = build("basic_chain")
    data = batches(tuple(x.shape))
    plain = rmfx.convert(model, x, keep_bn=True)
    if calibrated:
        rmfx.calibrate(plain, data)
    before = {name: dict(vars(module)) for name, module in plain.named_modules()}
    changed = change(plain, x)
    assert before == {name: vars(module) for name, module in plain.named_modules()}, "the caller's model is left alone"
    carried, expected = rmfx.report(changed).carried_norms, changed(x).detach()
    assert carried and all(is_identity_at(norm(changed, name))[list(which)].all() for name, which in carried.items())
    rmfx.calibrate(changed, [3 * x])
    with torch.no_grad():
        assert relative_difference(expected, changed(x)) < 1e-12
    means = seen_by_norms(changed, [3 * x])
    for name, channels in carried.items():
        which = list(channels)
        assert torch.allclose(norm(changed, name).running_mean[which], means[name].mean(1)[which], rtol=1e-9)


def trained(network: nn.Module, x: Tensor) -> None:
    optimiser = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.01)
    network(x).square().mean().backward()
    optimiser.step()


def run_in_training_mode(network: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        network.train()(x)
    network.eval()


@pytest.mark.parametrize("change", [trained, run_in_training_mode])
def test_what_was_learned_is_not_undone(change: Callable[[nn.Module, Tensor], None]) -> None:
    model, x = build("basic_identity")
    converted = rmfx.calibrate(rmfx.convert(model, x, keep_bn=True), batches(tuple(x.shape)))
    rmfx.calibrate(converted, [x])  # as often as you like, while nothing has changed
    change(converted, x)
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    with pytest.raises(RmfxError, match=r"^1\.branch\.0\.1 is no longer the identity on the channels that it carries"):
        rmfx.calibrate(converted, [x])
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())


def test_what_cannot_be_calibrated() -> None:
    model, x = build("basic_identity")
    before_the_sum = nn.Sequential(conv(6, 6), nn.ReLU(), conv(6, 6), nn.BatchNorm2d(6))
    folded = rmfx.convert(nn.Sequential(*cbr(3, 6), Residual(before_the_sum)).double().eval(), x, keep_bn=True)
    assert rmfx.report(folded).count("removed") == 1
    with pytest.raises(RmfxError, match="one that only a sum follows is folded"):
        rmfx.calibrate(folded, [x])
    with pytest.raises(RmfxError, match="nothing to calibrate: no batch norm carries channels"):
        rmfx.calibrate(rmfx.convert(model), [x])
    converted = rmfx.convert(model, keep_bn=True)
    state = {key: value.clone() for key, value in converted.state_dict().items()}
    for empty in ([], iter(())):
        with pytest.raises(RmfxError, match="calibrate needs at least one batch"):
            rmfx.calibrate(converted, empty)
    for bad in (math.nan, math.inf):
        with pytest.raises(RmfxError, match="the norm '1.branch.0.1' sees values that are not finite, such as NaN"):
            rmfx.calibrate(converted, [x, x * bad])
    with pytest.raises(RmfxError, match="tuples of positional inputs, without labels: 2 example inputs were given"):
        rmfx.calibrate(converted, [(x, torch.zeros(2))])
    assert all(torch.equal(value, converted.state_dict()[key]) for key, value in state.items())
    with pytest.raises(RmfxError, match="carries no rmfx report"):
        rmfx.calibrate(model, [x])  # type: ignore[arg-type]


# -- training ---------------------------------------------------------------------------------------------------------


def silenced(model: nn.Module) -> nn.Module:
    """Channel 2 of the block's input is always zero."""
    with torch.no_grad():
        model[0][1].weight[2], model[0][1].bias[2] = 0.0, -1.0
    return model


@pytest.mark.parametrize("change", [lambda m: m, silenced], ids=["alive", "a dead carried channel"])
def test_it_trains(change: Callable[[nn.Module], nn.Module]) -> None:
    model, _ = build("basic_identity")
    data = batches(SHAPE)
    converted = rmfx.calibrate(rmfx.convert(change(model).train(), keep_bn=True), data)
    dead = norm(converted, "1.branch.0.1")
    assert (
        dead.running_var.min() >= 1e-3 * dead.running_var[6:].max() * (1 - 1e-12) and dead.weight[6:].abs().min() > 0.01
    )
    x, target = data[1], torch.randn(4, 6, 8, 8, dtype=torch.float64)
    before = [parameter.detach().clone() for parameter in converted.parameters()]
    optimiser = torch.optim.SGD(converted.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = (converted(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        gradients = [p.grad for p in converted.parameters() if p.requires_grad]
        assert all(g is not None and torch.isfinite(g).all() and g.abs().max() < 1e3 for g in gradients)
        optimiser.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert all(not torch.equal(old, new) for old, new in zip(before, converted.parameters(), strict=True))


def test_frozen_norms_stay_frozen() -> None:
    model, x = build("basic_identity")
    converted = rmfx.convert(model.requires_grad_(False), x, keep_bn=True)
    assert not any(parameter.requires_grad for parameter in converted.parameters())


def test_a_norm_without_statistics_is_refused() -> None:
    branch = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), conv(4, 4))
    model = nn.Sequential(*cbr(3, 4), Residual(branch)).double().eval()
    (entry,) = rmfx.report(rmfx.convert(model, keep_bn=True)).entries
    assert entry.status == "refused" and "batch norm without running statistics" in (entry.reason or "")
    assert_equivalent(model, rmfx.convert(model, keep_bn=True), hostile(*SHAPE))
