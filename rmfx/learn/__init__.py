"""Training, and fine-tuning of converted networks: ``pip install 'rmfx[train]'``."""

from rmfx.learn.data import Data, Share, Split
from rmfx.learn.distill import Distillation
from rmfx.learn.finetune import FineTuned, finetune
from rmfx.learn.metrics import Epoch, History
from rmfx.learn.objective import Objective
from rmfx.learn.recipe import Recipe
from rmfx.learn.rounds import Round, prune_in_rounds
from rmfx.learn.slimming import Slimming
from rmfx.learn.sources import open_data
from rmfx.learn.trainer import train

__all__ = [
    "Data",
    "Distillation",
    "Epoch",
    "FineTuned",
    "History",
    "Objective",
    "Recipe",
    "Round",
    "Share",
    "Slimming",
    "Split",
    "finetune",
    "open_data",
    "prune_in_rounds",
    "train",
]
