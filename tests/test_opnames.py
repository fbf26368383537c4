"""The tables of what operations do to memory, entry by entry against torch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rmfx.front.opnames import FRESH, NO_OUT_OF_PLACE, out_of_place

Call = Callable[[Any, Tensor], Any]


def _plain(f: Any, x: Tensor) -> Any:
    return f(x)


def _with_itself(f: Any, x: Tensor) -> Any:
    return f(x, x)


def _zero(f: Any, x: Tensor) -> Any:
    return f(x, 0)


def _one(f: Any, x: Tensor) -> Any:
    return f(x, 1)


BOTH = "div divide eq floor_divide fmod ge gt le logical_and logical_or lt maximum minimum ne remainder rsub truediv"
ONE = "mul multiply pow true_divide floordiv mod max_pool2d avg_pool2d topk cumsum cumprod repeat_interleave glu"
CALLS: dict[str, Call] = {
    **dict.fromkeys(BOTH.split(), _with_itself),
    **dict.fromkeys(ONE.split(), _one),
    **dict.fromkeys(("add", "sub", "subtract", "softmax", "log_softmax", "softmin", "logsumexp"), _zero),
    **dict.fromkeys(("clamp_min", "clamp_max", "hardshrink", "softshrink"), _zero),
    **{name: (lambda f, x: f(x, -99.0, 99.0)) for name in ("clamp", "clip", "hardtanh")},
    **{name: (lambda f, x: f(x, -99.0, 0.0)) for name in ("threshold", "_threshold")},
    **{f"max_pool{d}d": (lambda f, x, d=d: f(_sized(x, d), 1)) for d in (1, 2, 3)},
    **{f"avg_pool{d}d": (lambda f, x, d=d: f(_sized(x, d), 1)) for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": (lambda f, x, d=d: f(_sized(x, d), (4,) * d)) for d in (1, 2, 3)},
    **{f"adaptive_max_pool{d}d": (lambda f, x, d=d: f(_sized(x, d), (4,) * d)) for d in (1, 2, 3)},
    **{f"conv{d}d": (lambda f, x, d=d: f(_sized(x, d), torch.ones(4, 4, *(1,) * d))) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": (lambda f, x, d=d: f(_sized(x, d), torch.ones(4, 4, *(1,) * d))) for d in (1, 2, 3)},
    "addcdiv": lambda f, x: f(x, x, x, value=0),
    "addcmul": lambda f, x: f(x, x, x, value=0),
    "addmm": lambda f, x: f(x[0, 0], x[0, 0], x[0, 0], alpha=0),
    "baddbmm": lambda f, x: f(x[0], x[0], x[0], alpha=0),
    "batch_norm": lambda f, x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "bmm": lambda f, x: f(x[0], x[0]),
    "cat": lambda f, x: f([x]),
    "concat": lambda f, x: f([x]),
    "embedding": lambda f, x: F.embedding(torch.arange(4), x[0, 0]),
    "flip": lambda f, x: f(x, []),
    "full_like": _one,
    "glu": lambda f, x: f(x, 1),
    "group_norm": lambda f, x: f(x, 1),
    "index_select": lambda f, x: f(x, 0, torch.arange(len(x))),
    "instance_norm": lambda f, x: F.instance_norm(x),
    "interpolate": lambda f, x: f(x, scale_factor=1),
    "layer_norm": lambda f, x: f(x, (4,)),
    "lerp": lambda f, x: f(x, x, 0.0),
    "linear": lambda f, x: f(x, torch.eye(4)),
    "local_response_norm": lambda f, x: f(x, 1),
    "masked_fill": lambda f, x: f(x, torch.zeros(4, dtype=torch.bool), 0.0),
    "matmul": lambda f, x: f(x, torch.eye(4)),
    "mm": lambda f, x: f(x[0, 0], torch.eye(4)),
    "new_full": lambda f, x: x.new_full((4,), 1.0),
    "new_ones": lambda f, x: x.new_ones(4),
    "new_zeros": lambda f, x: x.new_zeros(4),
    "one_hot": lambda f, x: f(torch.zeros(4, dtype=torch.long)),
    "pad": lambda f, x: [f(x, (0, 0, 0, 0), mode=mode) for mode in ("constant", "replicate", "reflect", "circular")],
    "prelu": lambda f, x: f(x, torch.ones(1)),
    "repeat": lambda f, x: x.repeat(1, 1, 1, 1),
    "roll": lambda f, x: f(x, 0),
    "scaled_dot_product_attention": lambda f, x: f(x, x, x),
    "stack": lambda f, x: f([x]),
    "tril": lambda f, x: f(x, 9),
    "triu": lambda f, x: f(x, -9),
    "where": lambda f, x: f(torch.ones(4, dtype=torch.bool), x, x),
}


def _sized(x: Tensor, dims: int) -> Tensor:
    return {1: x[0], 2: x, 3: x[None]}[dims]


def _function(name: str) -> Any:
    for namespace in (torch, F, operator, torch._C._nn):
        if hasattr(namespace, name):
            return getattr(namespace, name)
    return getattr(Tensor, name)


@pytest.mark.parametrize("name", sorted(FRESH))
def test_fresh_results_share_no_memory(name: str) -> None:
    """Arguments under which an operation has nothing to do, where it would be free to hand its input back."""
    x = torch.rand(4, 4, 4, 4) + 0.5
    result = CALLS.get(name, _plain)(_function(name), x)
    results = [tensor for tensor in torch.utils._pytree.tree_leaves(result) if isinstance(tensor, Tensor)]
    assert results, "the operation gives a tensor"
    for tensor in results:
        assert tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_every_in_place_method_is_known() -> None:
    """A method with a trailing underscore has an out-of-place form, or is listed as having none."""
    names = [name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")]
    missing = {name for name in names if not hasattr(Tensor, name[:-1]) and name not in NO_OUT_OF_PLACE}
    sparse = {"resize_as_sparse_", "sparse_resize_", "sparse_resize_and_clear_"}
    assert len(names) > 100
    assert missing == sparse | {"fill_diagonal_", "map2_", "share_memory_"}  # refused like those that are listed


@pytest.mark.parametrize("name", ["relu_", "celu_", "selu_", "rrelu_", "threshold_", "sigmoid_", "clamp_"])
def test_functions_have_their_out_of_place_form(name: str) -> None:
    plain = out_of_place(getattr(torch, name))
    assert plain is getattr(torch, name[:-1], None) or plain is getattr(F, name[:-1])
