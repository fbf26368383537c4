"""The caller's model stays as it is, also where its own code keeps what it sees.

Tracing and comparing work on copies. But a hook that was made inside a model (``lambda m, i, o: self.seen.append(o)``)
knows the model itself, and leaves in it what passes by: stand-ins for tensors, which nobody can copy or save.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from torch import nn

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Put back the attributes of all modules of ``models``, and what lists, dictionaries and sets there hold.

    >>> model = nn.Linear(2, 3)
    >>> model.seen = []
    >>> with untouched(model):
    ...     model.seen.append(1)
    ...     model.found = 2
    >>> model.seen, hasattr(model, "found")
    ([], False)
    """
    attributes = [vars(module) for model in models for module in model.modules()]
    containers = [value for names in attributes for value in names.values() if isinstance(value, list | dict | set)]
    before = [(held, copy.copy(held)) for held in (*attributes, *containers)]
    try:
        yield
    finally:
        for held, old in before:
            if not _same(held, old):
                _put_back(held, old)


def leaves_untouched(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run ``function`` with all modules among its positional arguments :func:`untouched`."""

    @functools.wraps(function)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with untouched(*(value for value in args if isinstance(value, nn.Module))):
            return function(*args, **kwargs)

    return guarded


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, set):
        return bool(first == second)
    items = [[*x, *x.values()] if isinstance(x, dict) else x for x in (first, second)]
    return len(items[0]) == len(items[1]) and all(a is b for a, b in zip(*items, strict=True))


def _put_back(held: Any, old: Any) -> None:
    held.clear()
    if isinstance(held, list):
        held.extend(old)
    else:
        held.update(old)
