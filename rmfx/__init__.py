"""rmfx removes residual connections from CNNs exactly: a torch.fx graph-rewriting compiler pass.

>>> import rmfx, torch
>>> from rmfx.models import rmnet26x3_32
>>> net = rmnet26x3_32().eval()
>>> plain = rmfx.convert(net, torch.randn(1, 3, 32, 32))
>>> rmfx.report(plain).count("removed")
9
"""

from rmfx.check.plain import to_sequential
from rmfx.check.verify import Verification, verify
from rmfx.convert import convert, explain
from rmfx.deploy.export import export
from rmfx.deploy.session import Session
from rmfx.errors import (
    ExportError,
    FileFormatError,
    NormalFormError,
    NotPlainError,
    OnnxImportError,
    PartialConversionWarning,
    RmfxError,
    RuntimeUnavailableError,
    TraceError,
    UnsupportedModelError,
    VerificationError,
)
from rmfx.files.serialise import load, save
from rmfx.onnx_in.importer import from_onnx
from rmfx.ranges import bounds_from_data
from rmfx.report import Entry, Report, report
from rmfx.training import calibrate

__version__ = "0.1.0"

__all__ = [
    "Entry",
    "ExportError",
    "FileFormatError",
    "NormalFormError",
    "NotPlainError",
    "OnnxImportError",
    "PartialConversionWarning",
    "Report",
    "RmfxError",
    "RuntimeUnavailableError",
    "Session",
    "TraceError",
    "UnsupportedModelError",
    "Verification",
    "VerificationError",
    "bounds_from_data",
    "calibrate",
    "convert",
    "explain",
    "export",
    "from_onnx",
    "load",
    "report",
    "save",
    "to_sequential",
    "verify",
]
