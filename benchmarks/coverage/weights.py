"""Random weights fast: initialisers that cost nothing while a network is built, then draws from a block of numbers.

Drawing 100 G of normal numbers one by one would take an hour, and initialising them first, to overwrite them, another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rmfx.hostile import NORMS, WEIGHTED, randomise

DRAWS = frozenset({"uniform_", "normal_", "erfinv_", "exponential_", "log_normal_"})
COPIES = frozenset({"_to_copy", "clone"})
MOVES = frozenset({"mul_", "add_", "sub_", "div_", "clamp_", "clamp_min_", "clamp_max_"})
SMALL = 4096  # elements up to which a draw is cheap
BLOCK = 1_048_573  # a prime: no two layers of a network see it from the same offset
TINY = 1e-3  # below this, a scale of a branch (LayerScale starts at 1e-6) would hide what the branch does


class Uninitialised(TorchDispatchMode):
    """While this is active, in-place random initialisation leaves a large tensor as the allocator gave it.

    Its pages are then never touched, so that building a network of any size takes neither time nor memory.

    Attributes:
        skipped: addresses of the storages whose values mean nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.endswith("_") and args and isinstance(args[0], Tensor) and args[0].numel() > SMALL:
            address = args[0].untyped_storage().data_ptr()
            if name in DRAWS:
                self.skipped.add(address)
            if address in self.skipped and name in DRAWS | MOVES:
                return args[0]
            self.skipped.discard(address)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() > SMALL:
            self._note(result, name, args[0] if args and isinstance(args[0], Tensor) else None)
        return result

    def _note(self, result: Tensor, name: str, source: Tensor | None) -> None:
        """New memory, maybe where a tensor was that is gone: what is copied there means as much as its source."""
        address = result.untyped_storage().data_ptr()
        before = None if source is None else source.untyped_storage().data_ptr()
        if address == before:
            return
        if name in COPIES and before in self.skipped:
            self.skipped.add(address)
        else:
            self.skipped.discard(address)


class Blockwise(TorchDispatchMode):
    """While this is active, large draws repeat a block of random numbers, from an offset that differs per tensor."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.normal = torch.randn(BLOCK, generator=random, dtype=dtype)
        self.uniform = torch.rand(BLOCK, generator=random, dtype=dtype)
        self.offset = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("normal_", "uniform_") and args[0].numel() > SMALL:
            values = dict(zip(("self", *_LIMITS[name]), args, strict=False)) | kwargs
            first, second = (float(values.get(key, default)) for key, default in _LIMITS[name].items())
            if name == "normal_":
                return self._fill(args[0], self.normal).mul_(second).add_(first)
            return self._fill(args[0], self.uniform).mul_(second - first).add_(first)
        return func(*args, **kwargs)

    def _fill(self, tensor: Tensor, block: Tensor) -> Tensor:
        flat = tensor.view(-1) if tensor.is_contiguous() else torch.empty(tensor.numel(), dtype=tensor.dtype)
        done = 0
        while done < flat.numel():
            piece = block[self.offset : self.offset + flat.numel() - done]
            flat[done : done + piece.numel()].copy_(piece)
            done += piece.numel()
            self.offset = (self.offset + piece.numel()) % BLOCK
        return tensor if tensor.is_contiguous() else tensor.copy_(flat.view(tensor.shape))


_LIMITS: dict[str, dict[str, float]] = {"normal_": {"mean": 0.0, "std": 1.0}, "uniform_": {"from": 0.0, "to": 1.0}}


def uninitialised(make: Callable[[], nn.Module]) -> tuple[nn.Module, set[int]]:
    """``make()`` in eval mode, and the addresses of its storages that still have to be filled."""
    mode = Uninitialised()
    with mode:
        model = make()
    return model.eval().requires_grad_(False), mode.skipped


@torch.no_grad()
def fill(model: nn.Module, x: Tensor, skipped: set[int], seed: int = 0, factor: float = 1) -> None:
    """Seeded random weights and hostile statistics in place: :func:`rmfx.hostile.randomise`, and what it leaves.

    Parameters of layers that are not torch's (position embeddings, tables, scales) are disturbed or, where they
    were to be random, drawn: of unit variance for a unit input.

    Args:
        model: in eval mode, in its final precision.
        x: for the forward pass that measures batch-norm statistics.
        skipped: what :func:`uninitialised` gave.
        seed: of everything.
        factor: on the weights of convs and linear layers, for networks whose values would explode.
    """
    random = torch.Generator().manual_seed(seed)
    with Blockwise(seed, x.dtype):
        for module in model.modules():
            if not isinstance(module, (*WEIGHTED, *NORMS, nn.PReLU)):
                for parameter in module._parameters.values():
                    if parameter is not None and parameter.is_floating_point():
                        _draw(parameter, parameter.untyped_storage().data_ptr() in skipped, random)
        randomise(model, x, seed)
    if factor != 1:
        for module in model.modules():
            if isinstance(module, WEIGHTED):
                module.weight.mul_(factor)


def _draw(parameter: Tensor, anew: bool, random: torch.Generator) -> None:
    if anew:
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.normal_(0, max(1, fan_in) ** -0.5, generator=random)
    elif parameter.abs().max() <= TINY:
        parameter.normal_(0, 0.3, generator=random)
    else:
        parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2, generator=random))
