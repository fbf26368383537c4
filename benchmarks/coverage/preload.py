"""Imported once by the server that all processes of a sweep are forked from."""

from __future__ import annotations

import warnings

from benchmarks.coverage import row  # noqa: F401
from rmfx.vision import import_timm

warnings.simplefilter("ignore")
import_timm()
