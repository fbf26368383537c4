"""Pruning in rounds: some channels go, the network is trained on, more go; each round can be resumed.

Ranks change as channels go, so many small steps with training between them cost less accuracy than one large step (Han
et al., 2015).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.optim.swa_utils import update_bn

from rmfx.errors import RmfxError
from rmfx.files.atomic import replacing
from rmfx.files.serialise import load, save
from rmfx.learn.data import Data
from rmfx.learn.evaluate import check_fits, placed
from rmfx.learn.metrics import History
from rmfx.learn.recipe import Recipe
from rmfx.learn.trainer import OnEpoch, OnStep, train
from rmfx.pruning.prune import Pruned, prune

OnRound = Callable[[int, dict[str, Any]], None]  # (round from 1, what Pruned.to_dict() says of it)

_RANKING_BATCHES = 16


@dataclass(frozen=True, eq=False)
class Round:
    """One round: what :meth:`rmfx.Pruned.to_dict` says of its pruning, and the training that followed."""

    pruned: dict[str, Any]
    history: History


def batches_of(data: Data, network: nn.Module, size: int, count: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` random batches of images to train on, with labels, in the dtype of ``network``."""
    for images, labels in islice(data.train.batches(size, order=seed), count):
        yield placed(images, network), labels


def prune_in_rounds(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    rounds: int,
    macs: float,
    folder: Path,
    importance: str = "taylor",
    round_to: int = 1,
    ranking_batches: int = _RANKING_BATCHES,
    reconstruct: bool = False,
    keep_constants: bool = True,
    resume: bool = False,
    device: str | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    on_round: OnRound | None = None,
) -> tuple[fx.GraphModule, tuple[Round, ...]]:
    """Prune to ``macs`` of the MACs in equal ratios, and train by ``recipe`` after each step.

    Args:
        model: trained, residual or converted, with or without batch norms; left untouched.
        data: to rank channels by and to train on.
        recipe: of each round.
        rounds: how many.
        macs: the part of the MACs that is left in the end.
        folder: gets ``round-1``, ``round-2`` ... with ``pruned.rmfx``, ``model.rmfx`` and all that training writes.
        importance, round_to, keep_constants: as for :func:`rmfx.prune`.
        ranking_batches: of ``recipe.batch`` images, for ``"taylor"``.
        reconstruct: start each training from least squares on these batches; else from norms estimated again on them.
        resume: go on with what ``folder`` holds.
        device, on_step, on_epoch: as for :func:`rmfx.learn.train`.
        on_round: told of each pruning.

    Returns:
        The network, in eval mode, and a record of each round.

    Raises:
        RmfxError: when a budget cannot be met, or as :func:`rmfx.learn.train` does.

    >>> import tempfile
    >>> from rmfx.demo import DigitNet
    >>> from rmfx.learn.sources import open_data
    >>> work, data = Path(tempfile.mkdtemp()), open_data("digits")
    >>> network, done = prune_in_rounds(DigitNet().eval(), data, Recipe(epochs=1), rounds=2, macs=0.5, folder=work)
    >>> len(done), (work / "round-2" / "model.rmfx").exists()
    (2, True)
    """
    if rounds < 1 or not 0 < macs < 1:
        raise RmfxError(f"rounds must be at least 1 and macs between 0 and 1, got {rounds} and {macs:g}")
    check_fits(model, data)
    ratio = macs ** (1 / rounds)
    network, done = model, []
    for number in range(1, rounds + 1):
        place = folder / f"round-{number}"
        told = place / "pruned.json"
        if not (resume and told.exists()):
            how = {"importance": importance, "round_to": round_to, "keep_constants": keep_constants}
            pruned = _pruned(network, data, recipe, ranking_batches, reconstruct, budget={"macs": ratio}, **how)
            _keep(pruned, place, told)
        record = json.loads(told.read_text(encoding="utf-8"))
        if on_round is not None:
            on_round(number, record)
        network = load(place / "pruned.rmfx").requires_grad_()
        again = resume and (place / "checkpoint.pt").exists()
        history = train(
            *(network, data, recipe), folder=place, resume=again, device=device, on_step=on_step, on_epoch=on_epoch
        )
        save(network, place / "model.rmfx")
        done.append(Round(record, history))
    assert isinstance(network, fx.GraphModule)
    return network, tuple(done)


def _pruned(network: nn.Module, data: Data, recipe: Recipe, count: int, reconstruct: bool, **how: Any) -> Pruned:
    """``network`` without what goes, as its training starts."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return batches_of(data, network, recipe.batch, count, recipe.seed)

    examples, _ = next(batches())
    pruned = prune(network, examples, data=batches(), calibration=batches() if reconstruct else None, **how)
    if not reconstruct:
        update_bn(batches(), pruned.network)
    pruned.network.eval()
    return pruned


def _keep(pruned: Pruned, place: Path, told: Path) -> None:
    """Write the network, then what is told of it, which says that the network is there."""
    place.mkdir(parents=True, exist_ok=True)
    save(pruned.network, place / "pruned.rmfx")
    with replacing(told, RmfxError) as scratch:
        scratch.write_text(json.dumps(pruned.to_dict(), indent=1), encoding="utf-8")
