"""Size conditions: a network that is exact at its example inputs' sizes only refuses other sizes itself."""

from __future__ import annotations

from torch import fx

from rmfx.graph.editor import Editor
from rmfx.graph.facts import shape_of
from rmfx.modules import SizeGuard
from rmfx.report import Report


def guard_sizes(gm: fx.GraphModule, report: Report) -> None:
    """Put a :class:`rmfx.modules.SizeGuard` behind every image-like input, where the report has size conditions."""
    conditions = sorted({condition for entry in report.entries for condition in entry.size_conditions})
    if not conditions:
        return
    editor = Editor(gm)
    for node in [node for node in gm.graph.nodes if node.op == "placeholder"]:
        shape = shape_of(node)
        if shape is None or len(shape) < 3:
            continue
        check = SizeGuard(tuple(shape[2:]), "; ".join(conditions))
        guard = editor.layer(check, node, node.next, editor.fresh("", "sizes"))
        node.replace_all_uses_with(guard, delete_user_cb=lambda user, guard=guard: user is not guard)
    editor.finish()
