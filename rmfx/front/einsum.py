"""Recognises the linear layers among sums of products: ``einsum("nchw,oc->nohw", x, weight)`` is a 1x1 conv."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from rmfx.front.builders import linear, one_by_one, same_memory
from rmfx.front.install import Installer
from rmfx.front.kind_table import KindTable
from rmfx.front.kinds import Kind
from rmfx.front.opnames import op_name


def spell_einsum(
    node: fx.Node, installer: Installer, kinds: KindTable, constant: Callable[[fx.Node], Tensor | None]
) -> bool:
    """Make ``node`` a linear layer or a 1x1 convolution, where it multiplies channels by a constant matrix.

    Args:
        node: any node.
        installer: puts the new layer in place.
        kinds: what is known of each node.
        constant: the tensor that a ``get_attr`` node reads, ``None`` for other nodes.

    Returns:
        Whether ``node`` was changed.
    """
    if op_name(node) != "einsum" or not node.args or not isinstance(node.args[0], str):
        return False
    equation, *operands = node.args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands
    terms, _, result = str(equation).replace(" ", "").partition("->")
    pairs = [*zip(terms.split(","), operands, strict=False)]
    for (labels, x), (of_matrix, read) in (pairs, pairs[::-1]) if len(pairs) == len(operands) == 2 else ():
        matrix = constant(read) if isinstance(read, fx.Node) else None
        if isinstance(x, fx.Node) and matrix is not None and kinds[x].tensor:
            return _spell(node, installer, x, matrix, (labels, of_matrix, result))
    return False


def _spell(node: fx.Node, installer: Installer, x: fx.Node, matrix: Tensor, labels: tuple[str, str, str]) -> bool:
    inside, of_matrix, result = labels
    summed = "".join(label for label in of_matrix if label in inside)
    if len(of_matrix) != 2 or len(summed) != 1 or not matrix.is_floating_point():
        return False
    made = of_matrix.replace(summed, "")
    rank, axis = len(inside), inside.index(summed)
    if result != inside.replace(summed, made) or not (inside + made).isalpha():
        return False  # also "...", whose rank is not told
    weight = matrix if of_matrix[0] == made else same_memory(matrix, Tensor.t)
    if axis == rank - 1:
        layer = linear({"weight": weight, "bias": None}, Kind())
    else:
        layer = one_by_one(weight, None, rank - 2) if axis == 1 and rank <= 5 else None
    if layer is not None:
        installer.layer(node, layer, x)
    return layer is not None
