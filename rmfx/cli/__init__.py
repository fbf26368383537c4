"""The ``rmfx`` command: one file per command, and what they share in ``console``, ``options`` and ``source``."""

from rmfx.cli.app import main

__all__ = ["main"]
