"""Schedules against a second enumeration: every sequence of steps, tried without looking ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmfx.layout import schedule
from rmfx.layout.schedule import Step, StepKind, Task, schedules

KINDS: dict[str, StepKind] = {"L": "linear", "P": "pointwise", "G": "gate", "S": "stage"}
NONE: frozenset[int] = frozenset()
Steps = tuple[Step, ...]


@st.composite
def regions(draw: st.DrawFn) -> list[Task]:
    """Up to four tasks, each of which needs some of those before it."""
    tasks: list[Task] = []
    for index in range(draw(st.integers(0, 4))):
        kind = KINDS[draw(st.sampled_from("LLPPGS"))]
        needs = frozenset(draw(st.sets(st.integers(0, index - 1)))) if index else NONE
        settled = frozenset(draw(st.sets(st.sampled_from(sorted(needs))))) if needs and kind != "linear" else NONE
        tasks.append(Task(kind, needs, settled))
    return tasks


def sequences(tasks: Sequence[Task], most: int) -> Iterator[Steps]:
    """All sequences of up to ``most`` steps, judged when they are complete."""

    def extended(steps: Steps) -> Iterator[Steps]:
        done = {index for step in steps for index in step.tasks}
        if len(done) == len(tasks) and is_legal(tasks, steps):
            yield steps
        if len(steps) == most:
            return
        ready = [i for i, task in enumerate(tasks) if i not in done and task.needs <= done]
        yield from extended((*steps, Step("linear", ())))
        for chosen in chain.from_iterable(combinations(ready, n) for n in range(1, len(ready) + 1)):
            if len({tasks[index].kind for index in chosen}) == 1:
                yield from extended((*steps, Step(tasks[chosen[0]].kind, chosen)))

    return extended(())


def is_legal(tasks: Sequence[Task], steps: Steps) -> bool:
    """Linear at both ends, one gate at a time, everything settled, and no idle step that nothing calls for."""
    if not steps or steps[0].kind != "linear" or steps[-1].kind != "linear":
        return False
    return all(is_called_for(tasks, steps, i) and is_settled(tasks, steps, i) for i in range(len(steps)))


def is_settled(tasks: Sequence[Task], steps: Steps, index: int) -> bool:
    """Between what a nonlinear task acts on and itself stands a linear step, where it must."""
    step = steps[index]
    last_linear = max((i for i in range(index) if steps[i].kind == "linear"), default=0)
    fresh = {task for other in steps[last_linear + 1 : index] for task in other.tasks}
    return not (step.kind == "gate" and len(step.tasks) > 1) and not any(tasks[i].settled & fresh for i in step.tasks)


def is_called_for(tasks: Sequence[Task], steps: Steps, index: int) -> bool:
    """Whether an idle step lifts the fork for a nonlinear task, settles what one acts on, or joins at the end."""
    if steps[index].tasks:
        return True
    done = {task for step in steps[:index] for task in step.tasks}
    if index and steps[index - 1].kind == "linear":
        return False
    if len(done) == len(tasks):
        return index == len(steps) - 1
    waiting = [task for i, task in enumerate(tasks) if i not in done and task.needs <= done and task.kind != "linear"]
    if not index:
        return bool(waiting)
    last_linear = max(i for i in range(index) if steps[i].kind == "linear")
    fresh = {task for step in steps[last_linear + 1 : index] for task in step.tasks}
    return any(task.settled & fresh for task in waiting)


@settings(max_examples=120)
@given(regions())
def test_schedules_are_all_legal_sequences(tasks: list[Task]) -> None:
    found = list(schedules(tasks))
    lengths = [len(steps) for steps in found]
    assert lengths == sorted(lengths) and len(found) == len(set(found)), "shortest first, none twice"
    most = min(lengths[0] + 1, 5)
    assert {steps for steps in found if len(steps) <= most} == set(sequences(tasks, most))
    assert all(is_legal(tasks, steps) for steps in found)
    assert all(sorted(i for step in steps for i in step.tasks) == list(range(len(tasks))) for steps in found)


def written(steps: Steps) -> str:
    """``L01`` for a linear step that advances two tasks, ``L`` for one that advances none."""
    return " ".join(step.kind[0].upper() + "".join(map(str, step.tasks)) for step in steps)


def task(kind: str, needs: str = "", settled: str = "") -> Task:
    """A task; needs and settled are digits."""
    return Task(KINDS[kind], frozenset(map(int, needs)), frozenset(map(int, settled)))


L, P, G, S = (task(kind) for kind in "LPGS")


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ([], ["L"]),
        ([L], ["L0"]),
        ([P], ["L P0 L"]),
        ([S], ["L S0 L"]),
        ([L, L], ["L01", "L0 L1", "L1 L0"]),
        ([L, task("P", "0"), task("L", "1")], ["L0 P1 L2"]),
        ([P, P], ["L P01 L", "L P0 P1 L", "L P1 P0 L"]),
        ([G, G], ["L G0 G1 L", "L G1 G0 L"]),  # each has a factor of its own
        ([P, task("P", "0", "0")], ["L P0 L P1 L"]),  # what must be summed up or copied first
        ([P, task("P", "0")], ["L P0 P1 L"]),
        ([P, S], ["L P0 S1 L", "L S1 P0 L"]),
    ],
)
def test_small_cases_by_hand(tasks: list[Task], expected: list[str]) -> None:
    assert [written(steps) for steps in schedules(tasks)] == expected


def test_a_basic_block_with_a_projection_by_hand() -> None:
    block = [L, task("P", "0"), task("L", "1"), L]
    found = [written(steps) for steps in schedules(block)]
    # The paper's Figure 2b applies the shortcut in the last layer, Figure 2a in the first.
    assert sorted(found[:2]) == ["L0 P1 L23", "L03 P1 L2"]
    assert sorted(found[2:]) == ["L0 L3 P1 L2", "L0 P1 L2 L3", "L0 P1 L3 L2", "L3 L0 P1 L2"]


def test_what_is_ready_in_large_numbers_advances_together_or_the_most_urgent_first() -> None:
    wide = [L] * 6
    assert [written(steps) for steps in schedules(wide)] == ["L012345"]
    urgent = [*wide, task("P", "0"), task("L", "6")]
    assert [written(steps) for steps in schedules(urgent)] == ["L012345 P6 L7", "L0 P6 L123457", "L0 L12345 P6 L7"]


def test_schedules_are_lazy() -> None:
    deep: list[Task] = []
    for index in range(0, 80, 4):
        before = str(index - 2) if index else ""
        deep += [
            Task("linear", frozenset({index - 2}) if before else NONE),
            Task("linear", frozenset({index - 1}) if before else NONE),
            Task("pointwise", frozenset({index})),
            Task("pointwise", frozenset({index + 1})),
        ]
    shortest = next(schedules(deep))
    assert len(shortest) == 41 and all(len(step.tasks) == 2 for step in shortest[:-1])


def test_the_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [task("P") for _ in range(4)]
    everything = len(list(schedules(many)))
    monkeypatch.setattr(schedule, "MOST_STATES", 20)
    assert 0 < len(list(schedules(many))) < everything
