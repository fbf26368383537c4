"""Ctrl-C while the command ``rmfx`` is still importing: the words and the exit code that it has later.

Importing torch takes a second and more, and comes before the command line can catch anything. This file is imported
first. In any process but that of the command it does nothing: signals belong to the program that imports a library.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

INTERRUPTED = 130
_COMMANDS = ("rmfx", "rmfx.exe", "-m")  # the last while `python -m rmfx` looks for its module


class Terminated(SystemExit):
    """SIGTERM on its way out, which is not the ``sys.exit`` of a user's code."""


def leave(number: int, frame: object) -> None:
    """Say that the command was interrupted, and leave at once."""
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)  # an exception can be caught on its way through the imports, and nothing is half written yet


def _is_the_command() -> bool:
    name = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
    return name in _COMMANDS and threading.current_thread() is threading.main_thread()


if _is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)
