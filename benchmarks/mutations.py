"""Mutation check: for each exactness condition of the algebra there is a test that fails without it.

In a copy of the package, one condition of ``rmfx/algebra`` at a time is taken away, and the tests of that file are run
until one fails. A condition is

* the test of an ``if`` whose body ends in ``raise InexactError``, ``return None`` or ``return EVERYTHING``, as a whole
  and, where it is ``a or b``, each of its alternatives;
* the test of ``None if ... else ...``, and of ``EVERYTHING``, likewise;
* what a function that is annotated ``-> bool`` returns: replaced by ``True`` and by ``False``, and without each
  operand of its ``and`` or ``or``.

Conditions that change no result are listed in ``WITHOUT_EFFECT``, each with the reason. ``--only NAME`` runs the files
with NAME in their path.
"""

from __future__ import annotations

import argparse
import ast
import copy
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import hypothesis  # imported once for all forks, as torch and pytest are
import pytest
import torch
from rich.markup import escape

from benchmarks.common import CONSOLE, Figure, finish, tracked

FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "affine": ("test_affine", "test_kernels", "test_grid"),
    "bounds": ("test_bounds",),
    "carrier": ("test_carrier_choice",),
    "grid": ("test_grid", "test_affine"),
    "pointwise": ("test_pointwise", "test_facts"),
    "restrict": ("test_restrict",),
    "select": ("test_select", "test_drop_dead_channels", "test_drop_dead_channels_random"),
    "stacking": ("test_grid", "test_kernels"),
    "widened": ("test_pointwise",),
}
NO_TEST = "pytest ended with status"
WITHOUT_EFFECT = {
    "pointwise _as_mask: never (chosen is None)": "parts that are all carried are slopes of 1 or no bounds before",
    "pointwise same_function: without (mine.keys() == theirs.keys()) in (mine.keys() == theirs.keys() and "
    "all((torch.equal(mine[key], theirs[key]) for key in mine)))": "modules that print alike hold the same tensors",
    "stacking compute: always (has_bias)": "zeros are added where no bias would be",
}


@dataclass(frozen=True)
class Mutant:
    """One condition taken away."""

    file: str
    line: int
    function: str
    what: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.what}"

    @property
    def key(self) -> str:
        """Its name in ``WITHOUT_EFFECT``: without the line, which moves."""
        return f"{self.file} {self.function}: {self.what}"


def mutants(file: str) -> Iterator[Mutant]:
    """All mutants of one file of the algebra."""
    tree = ast.parse((ROOT / "rmfx" / "algebra" / f"{file}.py").read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in _own_nodes(function):
                for what, field, value in _changes(function, node):
                    before = getattr(node, field)
                    setattr(node, field, value)
                    yield Mutant(file, node.lineno, function.name, what, ast.unparse(tree))
                    setattr(node, field, before)


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.stmt | ast.IfExp]:
    """Statements and conditional expressions of a function, not those of functions inside it."""
    todo: list[ast.AST] = list(ast.iter_child_nodes(function))
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.FunctionDef):
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.stmt | ast.IfExp):
            yield node


def _changes(function: ast.FunctionDef, node: ast.AST) -> Iterator[tuple[str, str, ast.expr]]:
    """What can be taken away at one node: a description, and the new value of one of its fields."""
    if isinstance(node, ast.If) and _gives_up(node.body[-1]) or isinstance(node, ast.IfExp) and _is_none(node.body):
        yield from _never(node.test)
    elif isinstance(node, ast.IfExp) and _is_none(node.orelse):
        yield f"always ({ast.unparse(node.test)})", "test", ast.Constant(True)
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(function.returns or node) == "bool":
        if isinstance(node.value, ast.Constant):
            return
        text = ast.unparse(node.value)
        for constant in (True, False):
            yield f"{constant} for ({text})", "value", ast.Constant(constant)
        for index, operand in enumerate(getattr(node.value, "values", [])):
            yield f"without ({ast.unparse(operand)}) in ({text})", "value", _without(node.value, index)


def _never(test: ast.expr) -> Iterator[tuple[str, str, ast.expr]]:
    yield f"never ({ast.unparse(test)})", "test", ast.Constant(False)
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        for index, operand in enumerate(test.values):
            yield f"without ({ast.unparse(operand)}) in ({ast.unparse(test)})", "test", _without(test, index)


def _without(test: ast.expr, index: int) -> ast.expr:
    assert isinstance(test, ast.BoolOp)
    left = [copy.deepcopy(value) for place, value in enumerate(test.values) if place != index]
    return left[0] if len(left) == 1 else ast.BoolOp(test.op, left)


def _gives_up(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise):
        return "InexactError" in ast.unparse(statement)
    return isinstance(statement, ast.Return) and _is_none(statement.value)


def _is_none(value: ast.expr | None) -> bool:
    """Whether an expression says that nothing is known: ``None`` or ``EVERYTHING``."""
    return value is None or ast.unparse(value) in ("None", "EVERYTHING")


def copied(to: Path) -> Path:
    """A copy of the package and its tests that runs on its own."""
    for folder in ("rmfx", "passes", "tests"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__", "passes"))
    for file in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / file, to)
    (to / "rmfx" / "passes").symlink_to(to / "passes")
    return to


def failing_test(folder: Path, file: str) -> str | None:
    """The first test of ``file`` that fails in ``folder``; ``None`` where all pass.

    Runs in a fork of this process, which has torch imported already.

    Raises:
        SystemExit: when pytest ends without having run them.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_run_tests, args=(folder, [f"tests/{name}.py" for name in TESTS[file]], sender))
    child.start()
    sender.close()
    try:
        found: str | None = receiver.recv()
    except EOFError:
        found = "the interpreter ended"
    child.join()
    if found is not None and found.startswith(NO_TEST):
        sys.exit(f"the tests of {file} were not run: {found}")
    return found


def _run_tests(folder: Path, files: list[str], sender: Connection) -> None:
    os.chdir(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rmfx"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    torch.set_num_threads(1)
    first = FirstFailure()
    status = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *files], plugins=[first])
    sender.send(None if status == 0 else first.name or f"{NO_TEST} {int(status)}")


class FirstFailure:
    """A pytest plugin that remembers the first test, or test file, that fails; a slow machine is no failure."""

    def __init__(self) -> None:
        self.name: str | None = None

    def pytest_collection(self) -> None:
        """Called by pytest before it imports the tests, and after conftest.py has chosen a profile."""
        patient = hypothesis.settings(hypothesis.settings.default, suppress_health_check=list(hypothesis.HealthCheck))
        hypothesis.settings.register_profile("patient", patient)
        hypothesis.settings.load_profile("patient")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each phase of each test."""
        if report.failed:
            self.name = self.name or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Called by pytest after each file."""
        if report.failed:
            self.name = self.name or report.nodeid


def killed_by(folder: Path, mutant: Mutant) -> str | None:
    """The test that notices ``mutant``."""
    path = folder / "rmfx" / "algebra" / f"{mutant.file}.py"
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(mutant.source, encoding="utf-8")
        return failing_test(folder, mutant.file)
    finally:
        path.write_text(before, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only files with this in their name; writes no result")
    only = parser.parse_args().only
    files = [file for file in TESTS if only in file]
    samples: list[dict[str, object]] = []
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = copied(Path(temporary))
        for file in files:
            if (broken := failing_test(folder, file)) is not None:
                sys.exit(f"the tests of {file} fail as they are: {broken}")
        for file in files:
            found = list(mutants(file))
            survivors = 0
            for mutant in tracked(found, len(found)):
                test = killed_by(folder, mutant)
                excuse = WITHOUT_EFFECT.get(mutant.key)
                survivors += test is None and excuse is None
                if test is None and excuse is None:
                    CONSOLE.print("[red]no test notices[/]", escape(str(mutant)))
                samples.append({"mutant": str(mutant), "noticed_by": test, "without_effect": excuse})
            figures.append(Figure(f"{file} ({len(found)} conditions)", "conditions that no test needs", survivors, 0))
    finish("mutations", figures, samples, write=not only)


if __name__ == "__main__":
    main()
