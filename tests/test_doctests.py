"""Every example in a docstring of rmfx and rmfx.passes runs.

Modules are imported by their installed names: collecting passes/ by path would import a second copy of it.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import rmfx
import rmfx.passes


def _module_names() -> list[str]:
    names = ["rmfx", "rmfx.passes"]
    for package in (rmfx, rmfx.passes):
        names += [found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return sorted(set(names))


@pytest.mark.parametrize("name", _module_names())
def test_examples_run(name: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    result = doctest.testmod(importlib.import_module(name), optionflags=options)
    assert result.failed == 0


def test_the_modules_are_found() -> None:
    assert {"rmfx.report", "rmfx.cli.app", "rmfx.models.rmnet", "rmfx.passes"} <= set(_module_names())
