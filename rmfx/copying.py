"""Copies of models that the user gives, also of those that ``copy.deepcopy`` refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


def deep_copy(model: _Module, shared: Iterable[Tensor] = ()) -> _Module:
    """A deep copy of ``model``, in which the tensors of ``shared`` are the same ones.

    Weight norm, spectral norm and pruning of ``torch.nn.utils`` keep the weight that they computed last as an
    attribute, which torch refuses to copy as long as it has a history: the copy has its value, and computes its own.

    >>> import torch
    >>> layer = nn.utils.spectral_norm(nn.Linear(2, 2))
    >>> layer(torch.ones(1, 2)).requires_grad, deep_copy(layer).weight.requires_grad
    (True, False)
    """
    memo = {id(tensor): tensor for tensor in shared}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
