"""Tensors that are made under ``torch.inference_mode()`` can be neither trained nor traced: rmfx makes none of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.utils import _pytree as pytree

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Value = TypeVar("Value")


def outside_inference_mode(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run ``function`` under ``torch.no_grad()`` where it is called under ``torch.inference_mode()``.

    >>> with torch.inference_mode():
    ...     torch.ones(1).is_inference(), outside_inference_mode(torch.ones)(1).is_inference()
    (True, False)
    """

    @functools.wraps(function)
    def ordinary(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():  # the former alone switches gradients on
            return function(*args, **kwargs)

    return ordinary


def differentiable(values: Value) -> Value:
    """``values``, nested as they are, with copies of tensors that were made under ``torch.inference_mode()``."""
    return pytree.tree_map_only(torch.Tensor, lambda x: x.clone() if x.is_inference() else x, values)
