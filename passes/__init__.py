"""The passes, and their order.

Each pass is one file: picture, equation, numbered conditions, then match / check / price / rewrite. A new pass is
one new file and one line here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rmfx.graph.rule import Rule
from rmfx.passes.drop_dead_channels import DropDeadChannels
from rmfx.passes.fold_norm import FoldNorm
from rmfx.passes.fuse_convs import FuseConvs
from rmfx.passes.lower_carried import LowerCarried
from rmfx.passes.merge_branches import MergeBranches
from rmfx.passes.merge_siblings import MergeSiblings
from rmfx.passes.remove_residual import RemoveResidual


def inference_passes(removal: RemoveResidual, fuse: str, drop_dead: bool) -> tuple[Rule[Any, Any], ...]:
    """The passes of a conversion for inference, in order."""
    return (
        FoldNorm(),  # first: branches become convs and activations, the only things the others reason about
        MergeBranches(),  # before residuals: a sum inside a branch must be gone for the branch to be a chain
        *(DropDeadChannels(),) * (2 if drop_dead else 0),  # before residuals: what is dead need not be carried;
        # twice, since a channel may be dead only when a constant one behind it has gone
        removal,  # the heart; leaves merging convs in front of the next block
        FuseConvs(fuse),  # composes what the passes above put next to each other
        *(DropDeadChannels(),) * drop_dead,  # what is carried for a shortcut of scale 0, which nothing reads
    )


def planned_passes(removal: RemoveResidual) -> tuple[Rule[Any, Any], ...]:
    """The passes of which a plan says where to apply them, in order."""
    return (
        FoldNorm(),
        MergeBranches(),
        removal,
        MergeSiblings(),  # what removal made chains of is no fork any more
        FuseConvs("always"),  # each one is priced: composing may pay at more MACs, or not pay at fewer
        LowerCarried(patient=False, beside=True),  # what is left carried may be cheaper beside the stack
    )


def training_passes(removal: RemoveResidual) -> tuple[Rule[Any, Any], ...]:
    """The passes of a conversion that keeps batch norms (``keep_bn=True``): nothing that would fold one."""
    return (replace(removal, keep_norms=True),)
