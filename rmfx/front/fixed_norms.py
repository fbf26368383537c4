"""Instance norms that normalise by running statistics are batch norms in eval mode: the same fixed affine map."""

from __future__ import annotations

from torch import fx, nn

from rmfx.front.kind_table import infer_kinds

_BATCH_NORMS: dict[type[nn.Module], tuple[type[nn.Module], int]] = {
    nn.InstanceNorm1d: (nn.BatchNorm1d, 3),
    nn.InstanceNorm2d: (nn.BatchNorm2d, 4),
    nn.InstanceNorm3d: (nn.BatchNorm3d, 5),
}


def fix_instance_norms(gm: fx.GraphModule) -> None:
    """Make batch norms of the instance norms with ``track_running_stats``, in place; their tensors stay the same.

    Only where the input has a batch dimension: an instance norm takes a single image too, a batch norm does not, and
    one of sequences would take it for a batch of features, so that there the rank must be seen on example inputs.

    Args:
        gm: a graph module that owns its layers, each with one call site, and that will not be trained.
    """
    nodes = [node for node in gm.graph.nodes if node.op == "call_module"]
    found = [(node, module) for node in nodes if _tracks(module := gm.get_submodule(str(node.target)))]
    kinds = infer_kinds(gm) if found else {}
    for node, module in found:
        norm, rank = _BATCH_NORMS[type(module)]
        source = node.all_input_nodes[0]
        if kinds[source].rank == rank and (rank > 3 or "shape" in source.meta):
            module.__class__ = norm


def _tracks(module: nn.Module) -> bool:
    return type(module) in _BATCH_NORMS and module.running_mean is not None
