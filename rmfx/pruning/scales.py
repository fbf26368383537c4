"""A trainable scale for each channel of every shortcut, so that training can switch off the ones that are not needed.

    y = B(x) + S(x)        becomes        y = B(x) + s * S(x),   s = 1 at first

The paper (section 3.4) puts another batch norm there; a scale serves as well and keeps the function. It stands behind
the shortcut's own norm, which would cancel one in front of it. A channel whose ``s`` training has brought to 0 is not
carried at all after conversion: its shortcut is gone, and the plain network is no wider for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from rmfx import account
from rmfx.collector import uncollected
from rmfx.errors import RmfxError
from rmfx.graph.editor import Editor
from rmfx.graph.facts import shape_of
from rmfx.graph.region import Region, find_region, is_residual
from rmfx.modules import ChannelAffine
from rmfx.ordinary import outside_inference_mode
from rmfx.prepare import prepare
from rmfx.rewrite import finished

_NAME = "shortcut_scale"


@outside_inference_mode
@uncollected
def scale_shortcuts(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Put a scale on every shortcut; the function stays the same.

    Args:
        model: residual, before or after training, in either mode; left untouched.
        example_inputs: a tensor or a tuple of positional inputs; their shapes tell how many channels there are.

    Returns:
        The same network as a ``GraphModule``, with layers named ``shortcut_scale`` that train.

    Raises:
        RmfxError: when it has no shortcut that is linear, beside a branch that is not.
        UnsupportedModelError, TraceError, NormalFormError: as for :func:`rmfx.convert`.

    >>> from rmfx.models import resnet20
    >>> scaled = scale_shortcuts(resnet20(), torch.zeros(1, 3, 32, 32))
    >>> sum(parameter.numel() for name, parameter in scaled.named_parameters() if "shortcut_scale" in name)
    336
    """
    prepared = prepare(model, example_inputs, {}, keep_bn=True)
    editor, count = Editor(prepared.gm), 0
    for node in [node for node in prepared.gm.graph.nodes if is_residual(node)]:
        region = find_region(node)
        shortcut = region.shortcut if isinstance(region, Region) else None
        shape = None if shortcut is None else shape_of(shortcut)
        if not isinstance(region, Region) or shortcut is None or shape is None or shape != shape_of(node):
            continue
        axis = 1 if region.dims else -1
        scale = ChannelAffine(nn.Parameter(torch.ones(shape[axis])), axis=axis)
        new = editor.layer(scale, shortcut, node, editor.fresh(node.meta.get("place", ""), _NAME))
        node.replace_input_with(shortcut, new)
        count += 1
    if not count:
        raise RmfxError("this network has no shortcut to scale: no sum of a linear path and one that is not")
    editor.finish()
    notes = (f"{count} shortcuts have a scale for each channel",)
    return finished(prepared, account.report_of(prepared.before, (), prepared.gm, notes), False)
