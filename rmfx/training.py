"""Training form: batch norms that are the identity on carried channels (the paper's section 3.1 and appendix A.3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.widened import is_identity_at
from rmfx.errors import RmfxError
from rmfx.inputs import as_tuple, bind
from rmfx.report import report

VARIANCE_FLOOR = 1e-3  # relative to the largest variance of the norm: a dead carried channel would get w = sqrt(eps)


def calibrate(converted: fx.GraphModule, batches: Iterable[Any]) -> fx.GraphModule:
    """Fill the statistics of carried channels from data; the eval-mode function stays the same.

    A carried channel's norm has ``w = sqrt(var + eps)`` and ``b = mean`` (equation 2), which is the identity for any
    ``mean`` and ``var``; training is stable when they are those of the data. The means and variances are gathered in
    one pass in eval mode. Variances have a floor, since a channel that never moves would make gradients explode.

    Args:
        converted: the result of ``rmfx.convert(model, keep_bn=True)``; changed in place.
        batches: tensors, or tuples of positional inputs.

    Returns:
        ``converted``.

    Raises:
        RmfxError: when no norm of ``converted`` carries channels, one that does is no longer the identity on them, as
            after training, ``batches`` is empty or holds more than inputs, or what a norm sees is not finite;
            ``converted`` is as before then.
    """
    carried = report(converted).carried_norms
    if not carried:
        raise RmfxError(
            "nothing to calibrate: no batch norm carries channels. That takes convert(keep_bn=True), and a batch norm "
            "before an activation on a branch that is removed; one that only a sum follows is folded"
        )
    for name, channels in carried.items():
        if not bool(is_identity_at(converted.get_submodule(name))[list(channels)].all()):
            raise RmfxError(
                f"{name} is no longer the identity on the channels that it carries, so new statistics would change the "
                "function: calibrate before training, and before anything else that changes batch norms"
            )
    moments = {name: _Moments() for name in carried}
    with _recording(converted, moments), torch.no_grad():
        seen = 0
        for batch in batches:
            converted(*_inputs(converted, batch))
            seen += 1
    if not seen:
        raise RmfxError("calibrate needs at least one batch")
    for name, channels in carried.items():
        moments[name].demand_finite(name, channels)
    for name, channels in carried.items():
        norm = converted.get_submodule(name)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        _set_identity(norm, torch.tensor(channels), moments[name])
    return converted


def _inputs(converted: fx.GraphModule, batch: Any) -> tuple[Any, ...]:
    try:
        return bind(converted, as_tuple(batch), {})
    except RmfxError as error:
        raise RmfxError(
            f"calibrate takes batches that are tensors or tuples of positional inputs, without labels: {error}"
        ) from error


class _Moments:
    """Running mean and variance per channel, merged batch by batch in float64 (Chan et al.)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def update(self, x: Tensor) -> None:
        rows = x.detach().double().transpose(0, 1).flatten(1)
        count, mean = rows.shape[1], rows.mean(1)
        squares = (rows - mean[:, None]).square().sum(1)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.count = total

    def demand_finite(self, name: str, channels: Sequence[int]) -> None:
        assert self.mean is not None and self.squares is not None
        for moment in (self.mean, self.squares):
            if not bool(moment[list(channels)].isfinite().all()):
                raise RmfxError(f"calibrate: the norm {name!r} sees values that are not finite, such as NaN")

    def variance(self) -> Tensor:
        assert self.squares is not None
        return self.squares / max(self.count, 1)


@contextmanager
def _recording(converted: fx.GraphModule, moments: dict[str, _Moments]) -> Iterator[None]:
    """Eval mode with a hook on every kept norm; mode and hooks are put back whatever happens."""
    modes = {module: module.training for module in converted.modules()}
    handles = []
    try:
        converted.eval()
        for name, moment in moments.items():
            norm = converted.get_submodule(name)
            handles.append(norm.register_forward_pre_hook(lambda _, inputs, moment=moment: moment.update(inputs[0])))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _set_identity(norm: nn.modules.batchnorm._BatchNorm, channels: Tensor, moments: _Moments) -> None:
    assert norm.running_mean is not None and norm.running_var is not None and moments.mean is not None
    mean, variance = moments.mean[channels], moments.variance()[channels]
    variance = variance.clamp(min=float(variance.max()) * VARIANCE_FLOOR or 1.0)
    with torch.no_grad():
        channels = channels.to(norm.running_mean.device)
        norm.running_mean[channels] = mean.to(norm.running_mean.dtype)
        norm.running_var[channels] = variance.to(norm.running_var.dtype)
        stored = norm.running_var[channels].double()
        norm.weight[channels] = torch.sqrt(stored + norm.eps).to(norm.weight.dtype)
        norm.bias[channels] = norm.running_mean[channels].to(norm.bias.dtype)
