"""Schedules against a second enumeration: all monotone lattice paths that only move equal kinds together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmfx.layout.schedule import Kind, Step, schedules

LETTERS: dict[str, Kind] = {"L": "linear", "P": "pointwise"}
KINDS = st.text("LP", max_size=4)
NOTHING = (False, False)


def chain(letters: str) -> tuple[Kind, ...]:
    """``"LPL"`` as kinds."""
    return tuple(LETTERS[letter] for letter in letters)


def written(steps: tuple[Step, ...]) -> str:
    """Steps as text: the kind, then the chains that advance, ``-`` for none."""
    names = {(True, True): "both", (True, False): "first", (False, True): "second", NOTHING: "-"}
    return " ".join(f"{step.kind[0].upper()}:{names[step.advances]}" for step in steps)


def paths(first: str, second: str) -> Iterator[tuple[Step, ...]]:
    """Every way to walk both chains to their ends, without the steps that only lift or join."""
    if not first and not second:
        yield ()
    if first:
        yield from ((Step(LETTERS[first[0]], (True, False)), *rest) for rest in paths(first[1:], second))
    if second:
        yield from ((Step(LETTERS[second[0]], (False, True)), *rest) for rest in paths(first, second[1:]))
    if first and second and first[0] == second[0]:
        yield from ((Step(LETTERS[first[0]], (True, True)), *rest) for rest in paths(first[1:], second[1:]))


def completed(path: tuple[Step, ...]) -> tuple[Step, ...]:
    """The path with the fewest added steps that make it start and end linear."""
    idle = Step("linear", NOTHING)
    lift = (idle,) if path and path[0].kind == "pointwise" else ()
    join = (idle,) if not path or path[-1].kind == "pointwise" else ()
    return (*lift, *path, *join)


@settings(max_examples=150)
@given(KINDS, KINDS)
def test_schedules_are_all_paths(first: str, second: str) -> None:
    found = list(schedules(chain(first), chain(second)))
    assert len(found) == len(set(found)), "no sequence comes twice"
    assert {tuple(step for step in steps if step.advances != NOTHING) for steps in found} == set(paths(first, second))
    assert {completed(path) for path in paths(first, second)} <= set(found)
    lengths = [len(steps) for steps in found]
    assert lengths == sorted(lengths) and lengths[0] == min(len(completed(path)) for path in paths(first, second))


@settings(max_examples=150)
@given(KINDS, KINDS)
def test_every_schedule_is_well_formed(first: str, second: str) -> None:
    for steps in schedules(chain(first), chain(second)):
        assert steps[0].kind == steps[-1].kind == "linear"
        assert all(any(step.advances) for step in steps[1:-1]), "only the first and the last step may advance nothing"
        for side, letters in enumerate((first, second)):
            walked = "".join(step.kind[0].upper() for step in steps if step.advances[side])
            assert walked == letters, "each chain goes through its layers in order"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("", "", ["L:-"]),
        ("L", "", ["L:first"]),
        ("", "L", ["L:second"]),
        ("P", "", ["L:- P:first L:-"]),
        ("L", "L", ["L:both", "L:first L:second", "L:second L:first"]),
        ("LPL", "", ["L:first P:first L:first"]),
        ("PL", "", ["L:- P:first L:first"]),
        ("LP", "", ["L:first P:first L:-"]),
        ("P", "P", ["L:- P:both L:-", "L:- P:first P:second L:-", "L:- P:second P:first L:-"]),
    ],
)
def test_small_cases_by_hand(first: str, second: str, expected: list[str]) -> None:
    assert [written(steps) for steps in schedules(chain(first), chain(second))] == expected


def test_a_basic_block_with_a_projection_by_hand() -> None:
    found = [written(steps) for steps in schedules(chain("LPL"), chain("L"))]
    # The paper's Figure 2b applies the shortcut in the last layer, Figure 2a in the first.
    assert sorted(found[:2]) == ["L:both P:first L:first", "L:first P:first L:both"]
    assert sorted(found[2:]) == [
        "L:first L:second P:first L:first",
        "L:first P:first L:first L:second",
        "L:first P:first L:second L:first",
        "L:second L:first P:first L:first",
    ]


def delannoy(m: int, n: int) -> int:
    """Lattice paths from corner to corner with steps right, up and diagonal."""
    return 1 if not m or not n else delannoy(m - 1, n) + delannoy(m, n - 1) + delannoy(m - 1, n - 1)


@pytest.mark.parametrize(("m", "n"), list(product(range(1, 5), repeat=2)))
def test_linear_chains_are_counted_by_delannoy(m: int, n: int) -> None:
    assert len(list(schedules(chain("L" * m), chain("L" * n)))) == delannoy(m, n)


def test_schedules_are_lazy() -> None:
    shortest = next(schedules(chain("LP" * 20), chain("LP" * 20)))
    assert written(shortest) == " ".join(["L:both P:both"] * 20) + " L:-"
