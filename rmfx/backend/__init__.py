"""rmfx inside ``torch.compile``: a back end of its own, and a pass for the one of torch."""

from rmfx.backend.compiler import rmfx

__all__ = ["rmfx"]
