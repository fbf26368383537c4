"""The back end of ``torch.compile``: convert what is inference, leave everything else to the inner back end."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from rmfx.backend.admit import by_design, refusal
from rmfx.backend.bound import Bound
from rmfx.backend.inner import compile_as_is
from rmfx.backend.settings import Settings

logger = logging.getLogger("rmfx")


def rmfx(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile one graph of Dynamo: ``torch.compile(model, backend="rmfx", options={...}, mode=...)``.

    Args:
        gm: the graph; weights are inputs.
        example_inputs: what it is about to be called with.
        options: keyword arguments of :func:`rmfx.convert` (``policy``, ``carrier``, ``verify``, ...), and ``inner``,
            ``inner_options``, ``check`` (:class:`rmfx.backend.settings.Settings`).
        mode: of inductor.

    Raises:
        RmfxError: for a bad option; lists the good ones. Dynamo wraps it.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()).eval()
    >>> compiled = torch.compile(model, backend=rmfx, options={"inner": "eager"})
    >>> with torch.no_grad():
    ...     tuple(compiled(torch.ones(3, 2)).shape)
    (3, 2)
    """
    settings = Settings.of(options, mode)
    if reason := by_design(gm):
        logger.info("rmfx: a graph is left as it is: %s", reason)
        return compile_as_is(gm, example_inputs, settings)
    if reason := refusal(gm, example_inputs, settings):
        _warn_once(f"rmfx: a graph is left as it is: {reason}")
        return compile_as_is(gm, example_inputs, settings)
    return Bound(gm, settings)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
