"""Batch norms whose statistics are those of the global batch, whatever the number of processes.

``torch.nn.SyncBatchNorm`` does this on GPUs and refuses tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from torch import Tensor, nn

from rmfx.errors import UnsupportedModelError

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncedNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm over the batches of all processes in training mode; in eval mode, an ordinary one.

    Takes and gives ``[n, C, ...]``. Running statistics get the mean and the unbiased variance of the global batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        dims = [dim for dim in range(x.dim()) if dim != 1]
        own = wide.sum(dims)
        total = _SumOfAll.apply(torch.cat([own, own.new_full((1,), x.numel() / x.shape[1])]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = wide - _spread(mean, x)
        variance = _SumOfAll.apply(centred.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        y = centred * _spread(torch.rsqrt(variance + self.eps), x)
        if self.weight is not None:
            y = y * _spread(self.weight, x) + _spread(self.bias, x)
        return y.to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape with channels: the class that this one stands in for has been chosen by the caller."""

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _CudaNorm(nn.SyncBatchNorm):
    process_group = None  # all processes; an instance whose class is swapped has none of its own


class _SumOfAll(torch.autograd.Function):
    """The sum over all processes; so is its gradient, since every process's loss depends on every summand."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total


def _spread(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


@contextmanager
def synced(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let all batch norms of ``model`` use the statistics of the global batch until the block ends.

    Only their class changes: parameters, buffers and hooks stay, and so does the state dict.

    Raises:
        UnsupportedModelError: for a norm of a class of its own, which might do more than normalise.
    """
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    for name, norm in norms.items():
        if type(norm) not in (*_NORMS, nn.SyncBatchNorm):
            raise UnsupportedModelError(
                f"the batch norm {name} is a {type(norm).__name__}, whose statistics cannot be those of all processes: "
                "train in one process"
            )
    classes = {norm: type(norm) for norm in norms.values() if type(norm) in _NORMS}
    try:
        for norm in classes:
            norm.__class__ = _CudaNorm if device.type == "cuda" else SyncedNorm
        yield
    finally:
        for norm, own in classes.items():
            norm.__class__ = own
