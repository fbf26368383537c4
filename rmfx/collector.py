"""Planning makes many small objects that all live on: the cyclic garbage collector would visit them over and over."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def collect_new() -> None:
    """Free what a function that runs :func:`uncollected` has dropped: all of it is of the youngest generation."""
    gc.collect(0)


def uncollected(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run ``function`` with the cyclic collector paused: its cost grows faster than the network does.

    Nothing but the collector waits: tensors are freed by reference counting all the same.

    >>> uncollected(gc.isenabled)(), gc.isenabled()
    (False, True)
    """

    @functools.wraps(function)
    def paused(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if was_enabled:
                gc.enable()

    return paused
