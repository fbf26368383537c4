"""Size conditions: a network that is exact at its example inputs' sizes only refuses other sizes itself."""

from __future__ import annotations

import operator

from torch import fx

from rmfx.graph.editor import Editor
from rmfx.graph.facts import shape_of
from rmfx.modules import SizeGuard
from rmfx.report import Report


def guard_sizes(gm: fx.GraphModule, report: Report, batch: bool = False) -> None:
    """Put a :class:`rmfx.modules.SizeGuard` behind every input, where the report has size conditions.

    Those of sums and concats are conditions on the spatial sizes of images; one on the whole network holds for all
    sizes but the batch's, and for that one, too, with ``batch``.
    """
    conditions, first = list(report.image_conditions), 2
    if report.size_conditions:
        conditions, first = [*report.size_conditions, *conditions], 0 if batch else 1
    if not conditions:
        return
    editor = Editor(gm)
    for node in list(gm.graph.nodes):
        shape = shape_of(node)
        if node.op != "placeholder" and not _is_part(node):
            continue
        if shape is None or len(shape) <= first or not node.users:
            continue
        check = SizeGuard(tuple(shape[first:]), "; ".join(conditions))
        guard = editor.layer(check, node, node.next, editor.fresh("", "sizes"))
        node.replace_all_uses_with(guard, delete_user_cb=lambda user, guard=guard: user is not guard)
    editor.finish()


def _is_part(node: fx.Node) -> bool:
    """Whether the node reads one tensor of a nested input."""
    source = node.args[0] if node.args and node.target in (operator.getitem, getattr) else None
    if not isinstance(source, fx.Node) or shape_of(source) is not None:
        return False
    return source.op == "placeholder" or _is_part(source)
