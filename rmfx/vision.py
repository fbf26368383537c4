"""Import torchvision and timm, also where torchvision's compiled operators do not load."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch.library import Library

from rmfx.errors import ModelNameError

# torchvision registers shape functions for these when it is imported, and raises where they do not exist.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_KEEP_ALIVE: list[Library] = []  # torch drops an operator together with the Library that defined it


def import_torchvision() -> ModuleType:
    """``import torchvision``, made possible where its compiled operators do not fit the installed torch.

    A CUDA build of torchvision beside a CPU build of torch cannot load its extension, and then cannot even be
    imported. Classification networks need none of those operators, so the missing ones are declared, without
    an implementation: networks that call them (detection) still fail, with torch's own message.

    Raises:
        ModelNameError: when torchvision is not installed.
    """
    if "torchvision" not in sys.modules:
        _require("torchvision", "zoo")
        if not extension_loads():
            _declare_operators()
    return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """``import timm``, after :func:`import_torchvision`, which it needs.

    Raises:
        ModelNameError: when timm or torchvision is not installed.
    """
    _require("timm", "zoo")
    import_torchvision()
    return importlib.import_module("timm")


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModelNameError(f"{package} is not installed: pip install 'rmfx[{extra}]'")


def extension_loads() -> bool:
    """Whether torchvision is installed and its compiled operators fit the installed torch."""
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    for library in sorted(folder.glob("_C*")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
        return True
    return False


def _declare_operators() -> None:
    missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return
    library = Library("torchvision", "FRAGMENT")
    for schema in missing:
        library.define(schema)
    _KEEP_ALIVE.append(library)
