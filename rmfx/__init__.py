"""rmfx removes residual connections from CNNs exactly: a torch.fx graph-rewriting compiler pass.

>>> import rmfx, torch
>>> from rmfx.models import rmnet26x3_32
>>> net = rmnet26x3_32().eval()
>>> plain = rmfx.convert(net, torch.randn(1, 3, 32, 32))
>>> rmfx.report(plain).count("removed")
9
"""

from rmfx import abort  # noqa: F401  # first: all others import torch
from rmfx.check.plain import to_sequential
from rmfx.check.precision_gaps import PrecisionGap, PrecisionGaps, precision_gaps
from rmfx.check.verify import Verification, verify
from rmfx.convert import apply_plan, convert, explain, make_plan
from rmfx.deploy.balance import balance
from rmfx.deploy.export import export
from rmfx.deploy.quantise import Quantised, quantise
from rmfx.deploy.session import Session
from rmfx.deploy.triton import Serving, export_triton
from rmfx.errors import (
    ExportError,
    FileFormatError,
    NormalFormError,
    NotPlainError,
    OnnxImportError,
    PartialConversionWarning,
    PlanError,
    RmfxError,
    RuntimeUnavailableError,
    TraceError,
    UnsupportedModelError,
    VerificationError,
)
from rmfx.files.serialise import load, save
from rmfx.lower import lower
from rmfx.measure.target import Target
from rmfx.onnx_in.importer import from_onnx
from rmfx.plan.value import Plan
from rmfx.pruning.prune import Pruned, prune
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
    "Plan",
    "PlanError",
    "PrecisionGap",
    "PrecisionGaps",
    "Pruned",
    "Quantised",
    "Report",
    "RmfxError",
    "RuntimeUnavailableError",
    "Serving",
    "Session",
    "Target",
    "TraceError",
    "UnsupportedModelError",
    "Verification",
    "VerificationError",
    "apply_plan",
    "balance",
    "bounds_from_data",
    "calibrate",
    "convert",
    "explain",
    "export",
    "export_triton",
    "from_onnx",
    "load",
    "lower",
    "make_plan",
    "precision_gaps",
    "prune",
    "quantise",
    "report",
    "save",
    "to_sequential",
    "verify",
]
