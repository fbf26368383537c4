"""What ``benchmarks.prune`` compares: one network, its data, the trainings that come first, the ways to prune it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import fx, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import update_bn

import rmfx
from benchmarks.common import CONSOLE, macs
from rmfx.learn.data import Data, Split
from rmfx.learn.recipe import Recipe
from rmfx.learn.rounds import batches_of
from rmfx.learn.slimming import Slimming
from rmfx.learn.trainer import train
from rmfx.models.layers import conv_bn_relu
from rmfx.models.resnet import ResidualBlock, ResNet, residual_blocks
from rmfx.modules import ChannelAffine
from rmfx.pruning.scales import scale_shortcuts

WIDTHS = (32, 64, 128)
EXAMPLE = torch.zeros(1, 3, 32, 32)
RANKING_BATCHES, SOLVING_BATCHES = 16, 4
NOTHING = 1e-20  # the score of channels that nothing reads


@dataclass(frozen=True)
class Setting:
    """How much of everything: the same for all methods.

    Attributes:
        data: one of :data:`benchmarks.prune_data.DATASETS`.
        images: for training and validation, at most.
        test_images: looked at once, by finished networks.
        epochs, tune_epochs: before and after pruning; of 14 in all, more after pruning than papers take.
        tune_rate: the learning rate at first, after pruning; before it is 0.1.
        weight_decay: what validation images chose for the unpruned network. With 5e-4 it loses 1.5 points, and
            GroupNormPruner, whose penalty is a weight decay of its own, seems better than it is.
        sparsity: L1 on scales of norms, for every method that ranks by them or starts from them.
        light_sparsity: what papers take, whose trainings are a hundred times as long.
        shortcut_sparsity: L1 on scales of shortcuts: next to nothing of them is left in the end.
        group_sparsity: of Torch-Pruning's GroupNormPruner, in its benchmarks for CIFAR.
        tune_decay: weight decay after pruning, if not as before it.
        distillation: weight of the divergence from what the unpruned network answers, after pruning.
    """

    data: str = "digits32"
    images: int = 24_000
    test_images: int = 12_000
    epochs: int = 8
    tune_epochs: int = 6
    tune_rate: float = 0.05
    weight_decay: float = 2e-3
    sparsity: float = 3e-3
    light_sparsity: float = 1e-4
    shortcut_sparsity: float = 1e-2
    group_sparsity: float = 5e-4
    tune_decay: float | None = None
    distillation: float = 0.0

    def recipe(self, seed: int) -> Recipe:
        """Of the training before pruning."""
        speed = {"learning_rate": 0.1, "warmup": 0.5, "precision": "bf16"}
        return Recipe(epochs=self.epochs, weight_decay=self.weight_decay, seed=seed, **speed)

    def tuning(self, seed: int) -> Recipe:
        """Of the training after pruning."""
        decay = self.weight_decay if self.tune_decay is None else self.tune_decay
        changed = {"epochs": self.tune_epochs, "learning_rate": self.tune_rate, "weight_decay": decay}
        return replace(self.recipe(seed), **changed)


@dataclass(frozen=True)
class Method:
    """One way to a smaller network.

    Attributes:
        base: how the network is trained first (:func:`trained`).
        tool: ``"rmfx"``, or a pruner of Torch-Pruning; ``None`` leaves the network as it is.
        plain: when shortcuts are removed: ``"before"`` pruning, ``"after"`` it, or not at all.
        calibrate: whether norms of carried channels are fitted before pruning; else before training on only.
        importance, round_to, keep_constants: as for :func:`rmfx.prune`.
        solve: whether least squares make up for what is gone, before training; else norms are estimated again.
        lower: whether what is left of carried channels is a shortcut while training on; else Dirac filters train.
    """

    base: str
    tool: str | None = "rmfx"
    plain: Literal["before", "after"] | None = None
    calibrate: bool = True
    importance: str = "taylor"
    round_to: int = 16
    solve: bool = True
    lower: bool = False
    keep_constants: bool = True


_COUPLED = Method("slim", keep_constants=False)
_RMFX = replace(_COUPLED, base="switched off", plain="before")
METHODS = {
    "unpruned": Method("plain", tool=None),
    "stock BN scale": Method("slim", tool="BNScale", solve=False),
    "stock group norm": Method("group", tool="GroupNorm", solve=False),
    "coupled, tuned": _COUPLED,
    "coupled, shortcuts off": replace(_COUPLED, base="switched off"),
    "rmfx": _RMFX,
}
ABLATIONS = {
    "rmfx, constants": replace(_RMFX, keep_constants=True),
    "rmfx, any width": replace(_RMFX, round_to=1),
    "rmfx, BN scale": replace(_RMFX, importance="bn"),
    "rmfx, no least squares": replace(_RMFX, solve=False),
    "rmfx, light sparsity": replace(_RMFX, base="switched off, light"),
    "rmfx, live shortcuts": replace(_RMFX, base="slim", solve=False, lower=True),
    "rmfx, live shortcuts, Dirac filters": replace(_RMFX, base="slim", solve=False),
    "rmfx, norms not calibrated": replace(_RMFX, calibrate=False),
    "rmfx, coupled channels": replace(_RMFX, plain="after"),
    "coupled, constants": replace(_COUPLED, keep_constants=True),
    "coupled, any width": replace(_COUPLED, round_to=1),
    "coupled, no least squares": replace(_COUPLED, solve=False),
    "coupled, light sparsity": replace(_COUPLED, base="slim, light"),
}


def residual(classes: int) -> nn.Module:
    """ResNet of three stages of two basic blocks, 26 M MACs: stages at 16x16, 8x8 and 4x4."""
    stem = conv_bn_relu(3, WIDTHS[0], 3, 2)
    return ResNet(stem, residual_blocks((2, 2, 2), WIDTHS, False, ResidualBlock), WIDTHS[-1], classes)


def trained(base: str, seed: int, setting: Setting, folder: Path, data: Data, **told: Any) -> nn.Module:
    """The network after the first training, which is done only if ``folder`` does not hold it.

    Args:
        base: ``plain``, ``group`` (for GroupNormPruner), or, with L1, ``slim`` and ``switched off``; ``, light`` of it.
    """
    torch.manual_seed(seed)
    network, (kind, *light) = residual(data.classes), base.split(", ")
    if kind == "switched off":
        network = scale_shortcuts(network, EXAMPLE).requires_grad_()
    place = folder / f"{base} {seed}"
    if not (place / "model.safetensors").exists():
        objective = None
        if kind in ("slim", "switched off"):
            shortcuts = setting.shortcut_sparsity if kind == "switched off" else 0.0
            objective = Slimming(setting.light_sparsity if light else setting.sparsity, shortcuts)
        grouped = _regularised(network, setting.group_sparsity) if kind == "group" else nullcontext()
        with grouped:
            resume = (place / "checkpoint.pt").exists()
            train(network, data, setting.recipe(seed), folder=place, resume=resume, objective=objective, **told)
    network.load_state_dict(load_file(place / "model.safetensors"))
    scales = [layer.weight for layer in network.modules() if isinstance(layer, ChannelAffine)]
    if scales:
        values = torch.cat(scales).detach()
        left = f"{int((values != 0).sum())} of {len(values)} scales of shortcuts are not 0"
        CONSOLE.print(f"{base} {seed}: {left}, the largest is {float(values.max()):.2g}")
    return network.eval()


@contextmanager
def _regularised(network: nn.Module, strength: float) -> Iterator[None]:
    """What Torch-Pruning's GroupNormPruner adds to the gradients before every step."""
    torch_pruning = _torch_pruning()
    importance = torch_pruning.importance.GroupMagnitudeImportance(normalizer="max")
    pruner = torch_pruning.pruner.GroupNormPruner(
        network, EXAMPLE, importance, reg=strength, ignored_layers=[network.fc]
    )
    handle = register_optimizer_step_pre_hook(lambda *_: pruner.regularize(network))
    try:
        yield
    finally:
        handle.remove()


def cut(
    method: Method, base: nn.Module, part: float, data: Data, seed: int, *, norms: bool = True, solve: bool = False
) -> nn.Module:
    """The network with about ``part`` of the MACs of the residual one, before it is trained on.

    Args:
        norms: estimate the statistics of batch norms again.
        solve: make up for what is gone by least squares; by rmfx only.
    """
    if method.tool is None:
        return copy.deepcopy(base)
    goal = part * macs(residual(data.classes), EXAMPLE.shape[-1])
    if method.tool == "rmfx":
        network = _by_rmfx(method, base, goal, data, seed, solve)
    else:
        network = _by_torch_pruning(method.tool, base, goal)
    if norms:
        update_bn(batches_of(data, network, 128, RANKING_BATCHES, seed), network)
    return network.eval()


def _by_rmfx(method: Method, base: nn.Module, goal: float, data: Data, seed: int, solve: bool) -> nn.Module:
    network = _plain(base, method, data, seed) if method.plain == "before" else _residual(base)
    whole = rmfx.report(network).totals.macs_after
    assert whole is not None
    pruned = rmfx.prune(
        network,
        EXAMPLE,
        budget={"macs": min(1.0, goal / whole)},
        importance=method.importance,
        round_to=method.round_to,
        data=batches_of(data, network, 128, RANKING_BATCHES, seed),
        calibration=batches_of(data, network, 128, SOLVING_BATCHES, seed) if solve else None,
        lower=method.lower,
        keep_constants=method.keep_constants,
    ).network
    if method.plain == "after":  # what dead shortcuts would carry goes, and changes nothing
        pruned = _plain(pruned, method, data, seed)
        ranking = batches_of(data, pruned, 128, RANKING_BATCHES, seed)
        pruned = rmfx.prune(pruned, EXAMPLE, threshold=NOTHING, data=ranking).network
    return pruned.requires_grad_()


def _residual(base: nn.Module) -> fx.GraphModule:
    return rmfx.convert(base, EXAMPLE, policy=[], keep_bn=True)


def _plain(base: nn.Module, method: Method, data: Data, seed: int) -> fx.GraphModule:
    network = rmfx.convert(base, EXAMPLE, policy="all", keep_bn=True)
    if method.calibrate:
        rmfx.calibrate(network, (images for images, _ in batches_of(data, network, 128, RANKING_BATCHES, seed)))
    return network


def _by_torch_pruning(tool: str, base: nn.Module, goal: float) -> nn.Module:
    """By the ratio that leaves MACs closest to ``goal``: they do not fall evenly with it, so all are looked at."""
    ratios = [step / 50 for step in range(1, 50)]
    found = [_stock(tool, base, ratio) for ratio in ratios]
    return min(found, key=lambda network: abs(macs(copy.deepcopy(network), EXAMPLE.shape[-1]) - goal))


def _stock(tool: str, base: nn.Module, ratio: float) -> nn.Module:
    """As in Torch-Pruning's own benchmarks: over all layers at once, with its importance for that pruner."""
    torch_pruning = _torch_pruning()
    network = copy.deepcopy(base)
    kind = getattr(torch_pruning.pruner, f"{tool}Pruner")
    importance = _group_norm() if tool == "GroupNorm" else torch_pruning.importance.BNScaleImportance()
    layers = {"ignored_layers": [network.fc], "global_pruning": True}
    kind(network, EXAMPLE, importance, pruning_ratio=ratio, **layers).step()
    return network


def _group_norm() -> Any:
    return _torch_pruning().importance.GroupMagnitudeImportance(normalizer="max")


def _torch_pruning() -> Any:
    return importlib.import_module("torch_pruning")


def deployed(network: nn.Module) -> nn.Module:
    """As it is to run: norms are folded, and carried channels are shortcuts again where that is cheaper."""
    return rmfx.lower(rmfx.convert(network.float().eval(), EXAMPLE, policy=[]), EXAMPLE)


def accuracy(network: nn.Module, split: Split) -> float:
    """Part of the images that are told right, in float32."""
    right = total = 0
    with torch.no_grad():
        for images, labels in split.batches(500):
            right += int((network(images).argmax(1) == labels).sum())
            total += len(labels)
    return right / total


def parameters(network: nn.Module) -> int:
    """How many numbers it has learned."""
    return sum(p.numel() for p in network.parameters())
