"""The only reader of the environment: what a developer of rmfx may switch on, and where a user keeps caches."""

from __future__ import annotations

import os
from pathlib import Path

from rmfx.errors import RmfxError

VARIABLE = "RMFX_DEBUG"
_VALUES = {"": False, "0": False, "1": True}


def enabled() -> bool:
    """Whether ``RMFX_DEBUG=1`` is set: the command line then shows tracebacks of user errors, too.

    Raises:
        RmfxError: when the variable holds anything but ``0``, ``1`` or nothing.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in _VALUES:
        raise RmfxError(f"{VARIABLE}={value!r} is not understood: set it to 1 to see tracebacks, or to 0")
    return _VALUES[value]


def cache_home() -> Path:
    """The user's folder for caches: ``$XDG_CACHE_HOME`` where that is an absolute path, else ``~/.cache``.

    Raises:
        RuntimeError: when the user has no home folder.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".cache"
