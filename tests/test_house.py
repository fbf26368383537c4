"""The house rules of CONTRIBUTING.md, as tests on the source text; each lists all who break it."""

from __future__ import annotations

import ast
import configparser
import functools
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PASSES = sorted(path for path in (ROOT / "passes").glob("*.py") if path.stem != "__init__")
SOURCES = sorted([*(ROOT / "rmfx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
EVERYTHING = sorted({*SOURCES, *(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")})
MAX_LINES = 300

# The algebra is tensor functions only, so that property tests reach all of it without a graph.
ALGEBRA = {"algebra"}
# The library itself must not need the command line, nor what only serves it.
OUTER = {"__main__", "cli", "demo", "doctor", "learn", "vision", "weights", "zoo"}
OPTIONAL_PACKAGES = {"accelerate", "onnxruntime", "sklearn", "tensorboard", "timm", "torchvision"}


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def module_of(path: Path) -> str:
    """The installed name: ``passes/x.py`` is ``rmfx.passes.x``."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"rmfx.{name}" if name.split(".")[0] == "passes" else name


MODULES = {module_of(path): path for path in SOURCES}


def layer_of(module: str) -> str:
    """``zoo`` for ``rmfx.zoo``, ``cli`` for ``rmfx.cli.app``, nothing for ``rmfx`` and ``torch``."""
    root, _, rest = module.partition(".")
    return rest.partition(".")[0] if root == "rmfx" else ""


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING:``, which no interpreter executes."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from running(child)


def imports(tree: ast.AST) -> Iterator[str]:
    """Names of imported modules; ``from package import module`` gives the module, not the package."""
    for node in running(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in full)


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The functions and classes among ``body`` whose names have no leading underscore."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def inherited(owner: ast.ClassDef) -> set[str]:
    """Methods documented by the base classes of ``owner`` in this repository, and by ``nn.Module``."""
    bases = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in owner.bases}
    methods = {"forward", "extra_repr"}
    for path in SOURCES:
        for node in public(tree_of(path).body):
            if isinstance(node, ast.ClassDef) and node.name in bases:
                methods |= {method.name for method in public(node.body) if ast.get_docstring(method)}
    return methods


def undocumented(path: Path) -> Iterator[str]:
    """Public things of one file that have no docstring, neither their own nor an inherited one."""
    if not ast.get_docstring(tree_of(path)):
        yield "the module itself"
    for node in public(tree_of(path).body):
        if not ast.get_docstring(node):
            yield node.name
        if isinstance(node, ast.ClassDef):
            methods = [m for m in public(node.body) if not ast.get_docstring(m)]
            yield from (f"{node.name}.{m.name}" for m in methods if m.name not in inherited(node))


def test_files_are_short() -> None:
    lengths = {module: len(text_of(path).splitlines()) for module, path in MODULES.items()}
    too_long = {module: length for module, length in lengths.items() if length > MAX_LINES}
    assert not too_long, "split these where they hold two ideas"


def test_public_things_have_docstrings() -> None:
    missing = [f"{module}: {name}" for module, path in MODULES.items() for name in undocumented(path)]
    assert not missing


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and layer_of(module) != "cli"
    ]
    assert not printing, "return a value instead"


def test_one_file_reads_the_environment() -> None:
    reading = [module for module, path in MODULES.items() if re.search(r"\bos\.(environ|getenv)\b", text_of(path))]
    assert reading == ["rmfx.debug"]


def test_passes_are_imported_as_rmfx_passes() -> None:
    direct = [path.name for path in EVERYTHING if "passes" in {name.split(".")[0] for name in imports(tree_of(path))}]
    assert not direct, "`import passes` makes a second copy of the classes in rmfx.passes"


def test_no_exception_is_swallowed() -> None:
    swallowing = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(statement, ast.Pass) for statement in node.body))
    ]
    assert not swallowing


def test_no_unfinished_business() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    unfinished = [module for module, path in MODULES.items() if marks.search(text_of(path))]
    assert not unfinished


def test_the_algebra_knows_no_graphs() -> None:
    graphs = {
        (module, name)
        for module, path in MODULES.items()
        if layer_of(module) in ALGEBRA
        for name in imports(tree_of(path))
        if name.startswith(("torch.fx", "rmfx.passes"))
    }
    assert not graphs


def test_passes_do_not_import_one_another() -> None:
    others = {
        (path.stem, name)
        for path in PASSES
        for name in imports(tree_of(path))
        if name == "rmfx.passes" or name.startswith("rmfx.passes.")
    }
    assert not others


def test_the_library_does_not_need_the_command_line() -> None:
    outward = {
        (module, name)
        for module, path in MODULES.items()
        if layer_of(module) not in OUTER
        for name in imports(tree_of(path))
        if layer_of(name) in OUTER
    }
    assert not outward


def test_optional_packages_are_never_imported_with_rmfx() -> None:
    needed = {
        (module, name)
        for module, path in MODULES.items()
        for node in tree_of(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imports(ast.Module([node], []))
        if name.split(".")[0] in OPTIONAL_PACKAGES
    }
    assert not needed


def test_imports_have_one_direction() -> None:
    needs = {
        module: {name for name in imports(tree_of(path)) if name in MODULES} - {module}
        for module, path in MODULES.items()
    }
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"modules import one another in a circle: {' -> '.join(error.args[1])}")
    assert set(order) == set(MODULES)


def test_every_package_is_in_the_wheel() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    packages = {module for module, path in MODULES.items() if path.stem == "__init__"}
    assert set(config["options"]["packages"].split()) == packages


def test_every_test_can_fail() -> None:
    written = [
        (path, node)
        for path in (ROOT / "tests").glob("*.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef)
    ]
    raising = {"raises", "fail"}  # of pytest; then all helpers that assert, and all that call one of them
    while found := {node.name for _, node in written if node.name not in raising and can_fail(node, raising)}:
        raising |= found
    idle = [
        f"{p.name}: {node.name}" for p, node in written if node.name.startswith("test_") and node.name not in raising
    ]
    assert not idle


def can_fail(function: ast.FunctionDef, raising: set[str]) -> bool:
    """Whether a function holds an assert, or calls one of ``raising``."""
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    called = {ast.unparse(call).rpartition(".")[2] for call in calls}
    return bool(called & raising) or any(isinstance(node, ast.Assert) for node in ast.walk(function))


def test_every_pass_has_its_tests() -> None:
    untested = [path.stem for path in PASSES if not (ROOT / "tests" / f"test_{path.stem}.py").is_file()]
    assert not untested
