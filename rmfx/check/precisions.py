"""The precisions that networks are run in, and TF32 where no hardware has it.

TF32 is float32 of which convolutions and matrix products read only the first 10 bits of mantissa. Tensor cores round
both factors to the nearest such number, ties away from zero (``cvt.rna.tf32.f32``), multiply exactly and add in
float32. Elsewhere that is simulated: the rounding by bits, the rest by a float32 product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from rmfx.check.compare import float32_arithmetic
from rmfx.errors import RmfxError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DROPPED = 13  # bits of float32's mantissa that TF32 does not read
_AMPERE = 8  # the first compute capability with TF32
_PRODUCTS = {  # where the two factors are among the arguments
    **dict.fromkeys(("aten::convolution", "aten::mm", "aten::bmm"), (0, 1)),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm", "aten::addbmm"), (1, 2)),
}
_CLOSED = ("rnn", "lstm", "gru", "multi_head_attention", "transformer_encoder_layer")  # products inside one operator


@dataclass(frozen=True)
class Precision:
    """One of :data:`DTYPES` on one kind of device; ``simulated`` where that device does not have it."""

    name: str
    simulated: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which weights and activations are stored."""
        return DTYPES[self.name]

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Computes float32 products this way while the block runs, and as IEEE float32 for all other precisions."""
        if self.name != "tf32":
            with float32_arithmetic("ieee"):
                yield
        elif not self.simulated:
            with float32_arithmetic("tf32"):
                yield
        else:  # attention is taken apart, so that its products are seen
            with float32_arithmetic("ieee"), sdpa_kernel(SDPBackend.MATH), _Tf32Products():
                yield


def precision(name: str, device: torch.device) -> Precision:
    """The precision called ``name`` on ``device``.

    Raises:
        RmfxError: for a name that is not in :data:`DTYPES`.

    >>> precision("tf32", torch.device("cpu"))
    Precision(name='tf32', simulated=True)
    """
    if name not in DTYPES:
        raise RmfxError(f"unknown precision {name!r}: choose among {', '.join(DTYPES)}")
    return Precision(name, name == "tf32" and not _has_tf32(device))


def _has_tf32(device: torch.device) -> bool:
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device)[0] >= _AMPERE


def round_to_tf32(x: Tensor) -> Tensor:
    """``x``, of float32, rounded to the nearest numbers with 10 bits of mantissa, ties away from zero.

    Infinities and NaN stay; the largest numbers round to infinity.

    >>> [float(y) for y in round_to_tf32(torch.tensor([1.0, 1 + 2**-11, -1 - 2**-11, 1 + 2**-12, 0.0]))]
    [1.0, 1.0009765625, -1.0009765625, 1.0, 0.0]
    """
    bits = x.contiguous().view(torch.int32)  # sign and magnitude: adding half a unit rounds away from zero
    rounded = (bits + (1 << (_DROPPED - 1))) & -(1 << _DROPPED)
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)


class _Tf32Products(TorchDispatchMode):
    """Rounds both factors of every product of float32 tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if any(part in name for part in _CLOSED):
            raise RuntimeError(f"TF32 cannot be simulated inside {name}")
        factors = _PRODUCTS.get(name, ())
        args = tuple(_rounded(arg) if index in factors else arg for index, arg in enumerate(args))
        return func(*args, **(kwargs or {}))


def _rounded(factor: Tensor) -> Tensor:
    return round_to_tf32(factor) if factor.dtype == torch.float32 else factor
