"""The only reader of the environment: what a developer of rmfx may switch on from outside."""

from __future__ import annotations

import os

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
