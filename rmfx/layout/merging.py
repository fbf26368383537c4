"""A region without nonlinearities as one linear map."""

from __future__ import annotations

from rmfx.algebra.affine import Affine, add, compose, dirac, scaled
from rmfx.algebra.grid import Grid
from rmfx.algebra.stacking import Block, stack
from rmfx.errors import InexactError
from rmfx.layout.grouping import Layout
from rmfx.layout.problem import Problem

Row = dict[int, Affine]  # part of the fork to the map from it


def merged(problem: Problem) -> tuple[Affine, bool]:
    """The one map that a linear region is, and whether all that it adds up has equal sizes at all input sizes.

    Raises:
        InexactError: when a composition or a sum is not exact.
    """
    rows: dict[int, Row] = {}
    for part, value in enumerate(problem.fork):
        rows[part] = {part: dirac(value.channels, Grid.sampling([1] * problem.dims))}
    same_size = True
    for number, op in problem.numbered():
        row: Row = {}
        for source, outer in zip(op.inputs, op.maps, strict=True):
            for index, (part, inner) in enumerate(rows[source].items()):
                through = _composed(outer if index == 0 else scaled(outer, 1.0, 0.0), inner)
                if row:
                    same_size &= next(iter(row.values())).grid.excess == through.grid.excess
                row[part] = add(row[part], through) if part in row else through
        rows[number] = row
    return _assembled(problem, rows), same_size


def _composed(outer: Affine, inner: Affine) -> Affine:
    if inner.stored is not None and inner.diagonal and not inner.sources and not inner.has_bias:
        return outer  # the fork itself
    try:
        return compose(outer, inner)
    except InexactError as error:
        raise InexactError(f"the branches do not compose into one map: {error}") from error


def _assembled(problem: Problem, rows: dict[int, Row]) -> Affine:
    """The parts of the join as functions of the parts of the fork, side by side."""
    if len(problem.fork) == len(problem.join) == 1:
        return rows[problem.join[0]][0]
    before = Layout.natural([value.channels for value in problem.fork])
    widths = [problem.value(number).channels for number in problem.join]
    after = Layout.natural(widths)
    blocks = [
        Block(affine, after.spreads[index].positions(widths[index]), before.spreads[part].positions(affine.in_channels))
        for index, number in enumerate(problem.join)
        for part, affine in rows[number].items()
    ]
    return stack(blocks, before.width, after.width)
