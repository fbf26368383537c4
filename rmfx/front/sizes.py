"""Whether the code of a model looks at sizes: then its graph is that of the example inputs' sizes only.

``x.shape[2]`` is a number while code is exported, and what is computed from it ends in the graph as a constant, or
decides which path is taken. Here sizes are handed out as numbers that tell when something is computed from them.
Reading ``b, c, _, _ = x.shape`` alone uses none. Sizes of channels are used, too; but these are the same at every input
size, and so are told from others by a second look at inputs of another size.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from rmfx.quiet import quiet_fakes

_OPERATIONS = """
    add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod divmod rdivmod pow rpow neg pos abs
    lshift rlshift rshift rrshift and rand or ror xor rxor invert eq ne lt le gt ge hash bool int float index round
    trunc floor ceil str repr format
"""
# Functions of torch, written in Python, that hand sizes on to operators which read them from the tensor anyway.
_BLIND = """
    relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid sigmoid tanh softplus softsign
    tanhshrink hardshrink softshrink logsigmoid threshold prelu rrelu glu linear bilinear conv1d conv2d conv3d
    batch_norm layer_norm group_norm instance_norm rms_norm normalize dropout dropout1d dropout2d dropout3d
    alpha_dropout feature_alpha_dropout softmax softmin log_softmax max_pool1d max_pool2d max_pool3d _max_pool1d
    _max_pool2d _max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d _adaptive_max_pool1d _adaptive_max_pool2d _adaptive_max_pool3d fn pad
    embedding one_hot grid_sample unfold fold split einsum norm __rsub__ __rdiv__ __rpow__ __radd__ __rmul__
    __rtruediv__ __rfloordiv__ __floordiv__ __pow__ __iter__ unbind unflatten
"""
_BLIND_NAMES = frozenset(_BLIND.split())
_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
_SIZES = frozenset({"size", "numel", "nelement", "stride", "__len__"})


def depends_on_sizes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``model`` may compute something else on inputs of another size than its code does on these.

    Args:
        model: a structural copy; running it may change what it holds, not its tensors.
        args, kwargs: example inputs; values do not matter.

    >>> depends_on_sizes(nn.AdaptiveAvgPool2d(1), (torch.zeros(1, 3, 8, 8),), {})
    False
    """
    first = _watched_run(model, args, kwargs)
    if first is None or not first.looked:
        return first is None
    second = _watched_run(model, *of_other_size(args, kwargs))
    return second is None or (first.used, first.calls) != (second.used, second.calls)


def treats_one_apart(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the code of ``model`` goes another way for a batch of 1 than for others."""
    one, three = (
        _watched_run(model, *pytree.tree_map(lambda x, batch=batch: _of_batch(x, batch), (tuple(args), dict(kwargs))))
        for batch in (1, 3)
    )
    return one is None or three is None or one.calls != three.calls


def _of_batch(x: Any, batch: int) -> Any:
    return x.new_zeros(()).expand(batch, *x.shape[1:]) if isinstance(x, Tensor) and x.dim() > 1 else x


def _watched_run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> SizeWatch | None:
    """What one run on tensors without values uses, or ``None`` where the model does not run so."""
    watch = SizeWatch()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode, torch.no_grad(), quiet_fakes():
            fake_args, fake_kwargs = pytree.tree_map(
                lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, (tuple(args), dict(kwargs))
            )
            with watch:
                model(*fake_args, **fake_kwargs)
    except Exception:  # of whatever kind the model's own code raises on sizes that it does not take
        return None
    return watch


def of_other_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs whose sizes, all but batch and channels, are much larger: no stride makes both the same."""
    return pytree.tree_map(_of_other_size, (tuple(args), dict(kwargs)))


def _of_other_size(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.dim() < 2:
        return x
    keep = 2 if x.dim() > 2 else 1
    more = [4 * size + 64 + 32 * index for index, size in enumerate(x.shape[keep:])]
    return x.new_zeros(()).expand(*x.shape[:keep], *more)  # takes no memory


class SizeWatch(TorchFunctionMode):
    """While it is active, sizes that code uses as numbers are kept in ``used``, in order, and calls in ``calls``.

    The latter because ``range(h)`` uses a number without telling. ``looked`` says whether any size was asked for.

    >>> with SizeWatch() as watch:
    ...     x = torch.zeros(2, 3, 8, 8)
    ...     b, c, h, w = x.shape
    ...     _ = x.view(b, c, -1), x.reshape(-1, h)
    >>> watch.used
    [2, 3, 8]
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: list[int] = []
        self.calls: list[str] = []
        self.looked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note sizes among the arguments of ``func``, and hand out watched sizes."""
        kwargs = kwargs or {}
        args, kwargs = self._noted(args), self._noted(kwargs)
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        self.calls += [name, *(str(value) for value in (*args, *kwargs.values()) if isinstance(value, float))]
        if name in _SIZES or func == _SHAPE:
            self.looked = True
            return self._watched(result)
        if _may_look(func, name, kwargs):
            self.looked = True
            for tensor in _tensors((args, kwargs)):
                self.used += [size for size in tensor.shape if type(size) is int]
        return result

    def _noted(self, value: Any) -> Any:
        """``value`` with plain numbers for watched ones, which are noted."""
        if isinstance(value, _Size):
            return value.plain()
        if isinstance(value, torch.Size):
            return torch.Size([self._noted(item) for item in value])
        if type(value) in (tuple, list):
            return type(value)(self._noted(item) for item in value)
        if type(value) is dict:
            return {key: self._noted(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self._noted(part) for part in (value.start, value.stop, value.step)))
        return value

    def _watched(self, value: Any) -> Any:
        if type(value) is int:
            return _Size.of(value, self)
        if isinstance(value, tuple):
            return torch.Size([self._watched(item) for item in value])
        return value


class _Size(int):
    """A size that tells its watch when it is used."""

    watch: SizeWatch

    @classmethod
    def of(cls, value: int, watch: SizeWatch) -> _Size:
        size = super().__new__(cls, value)
        size.watch = watch
        return size

    def plain(self) -> int:
        value = int.__int__(self)
        self.watch.used.append(value)
        return value


def _noting(name: str) -> Callable[..., Any]:
    operation = getattr(int, name)

    def noted(self: _Size, *others: Any) -> Any:
        plain = [other.plain() if isinstance(other, _Size) else other for other in others]
        return operation(self.plain(), *plain)

    return noted


for _name in (f"__{_operation}__" for _operation in _OPERATIONS.split()):
    setattr(_Size, _name, _noting(_name))


def _may_look(func: Any, name: str, kwargs: dict[str, Any]) -> bool:
    """Whether ``func`` is Python code of torch that may compute with sizes itself."""
    if name == "interpolate":
        return bool(kwargs.get("recompute_scale_factor"))
    return isinstance(func, types.FunctionType) and name not in _BLIND_NAMES


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
