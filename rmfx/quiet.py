"""Silence for the exporters of torch, which print progress and warn of their own internals, and for failed tries."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = (
    *("torch.onnx", "torch.export", "torch._export", "torch.fx", "torch._subclasses", "torch._dynamo"),
    *("onnxscript", "onnx_ir"),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings and log lines of the exporters inside the block; what goes wrong is still raised.

    >>> with quiet():
    ...     logging.getLogger("torch.onnx").warning("step 1 of 3")
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def quiet_fakes() -> Iterator[None]:
    """Hide what torch logs of an operator that fails on tensors without values; the error itself is still raised.

    >>> with quiet_fakes():
    ...     logging.getLogger("torch._subclasses.fake_tensor").error("failed while attempting to run meta for aten.mm")
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
