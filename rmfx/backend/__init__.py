"""rmfx inside ``torch.compile``: a back end of its own, and a pass for the one of torch."""

from rmfx.backend.compiler import rmfx
from rmfx.backend.freezing import inductor_pass

__all__ = ["inductor_pass", "rmfx"]
