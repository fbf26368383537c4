"""What ``torch.compile(..., backend="rmfx", options=...)`` can be told, checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import fx, nn

from rmfx.convert import convert, explain
from rmfx.errors import RmfxError
from rmfx.options import Options
from rmfx.report import Report

CHECKS = ("version", "hash")
_DEFAULTS = {"policy": "auto", "measure": False}  # who switches a compiler on wants no slower network, and no long wait
_OURS = {"inner", "inner_options", "check"}
_NOT_HERE = {"model", "example_inputs", "example_kwargs", "keep_bn", "partial", "target"}
_CONVERT = frozenset(inspect.signature(convert).parameters)


@dataclass(frozen=True)
class Settings:
    """How to compile.

    Attributes:
        conversion: keyword arguments of :func:`rmfx.convert`; by default, ``policy="auto"`` and ``measure=False``.
        inner: the back end that compiles the result: a registered name, or a callable.
        inner_options: what it is told.
        check: how changed weights are noticed: by ``"version"`` (identity, address, version counter and parts of
            their contents) or by ``"hash"`` (all of their contents).

    >>> Settings.of({"policy": "all", "inner": "eager"}).inner
    'eager'
    >>> Settings.of({"inner": "eager", "carier": "split"})
    Traceback (most recent call last):
    rmfx.errors.RmfxError: backend 'rmfx' has no option 'carier'; it has 'carrier', 'check', ...
    """

    conversion: Mapping[str, Any] = field(default_factory=dict)
    inner: str | Callable[..., Any] = "inductor"
    inner_options: Mapping[str, Any] = field(default_factory=dict)
    check: str = "version"

    @classmethod
    def of(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Settings:
        """The settings that ``options`` and ``mode`` of ``torch.compile`` mean.

        Raises:
            RmfxError: for an unknown name or a bad value; lists the good ones.
        """
        given = dict(options or {})
        ours = {name: given.pop(name) for name in _OURS & set(given)}
        check_conversion("backend 'rmfx'", given, _OURS)
        settings = cls(given, **ours)
        settings._check()
        if mode is None:
            return settings
        if settings.inner != "inductor":
            raise RmfxError(f"mode={mode!r} is a mode of inductor, but the inner back end is another one")
        return cls(given, "inductor", {**torch._inductor.list_mode_options(mode), **settings.inner_options})

    def _check(self) -> None:
        if self.check not in CHECKS:
            raise RmfxError(f"check must be one of {_listed(CHECKS)}, got {self.check!r}")
        if not isinstance(self.inner_options, Mapping):
            raise RmfxError(f"inner_options must be a mapping, got {self.inner_options!r}")
        known = [name for name in torch._dynamo.list_backends(None) if name != "rmfx"]
        if not callable(self.inner) and self.inner not in known:
            raise RmfxError(f"inner must be one of {_listed(known)}, or a callable, got {self.inner!r}")

    def convert(self, gm: fx.GraphModule, inputs: tuple[Any, ...]) -> nn.Module:
        """See :func:`rmfx.convert`."""
        return convert(gm, inputs, **self._for(convert, inputs))

    def explain(self, gm: fx.GraphModule, inputs: tuple[Any, ...]) -> Report:
        """See :func:`rmfx.explain`."""
        return explain(gm, inputs, **self._for(explain, inputs))

    def _for(self, function: Callable[..., Any], inputs: Sequence[Any]) -> dict[str, Any]:
        """What ``function`` takes of the conversion; the planner is told where the network is to run."""
        runtime = "inductor" if self.inner == "inductor" else "eager"
        device = next(value.device for value in inputs if isinstance(value, torch.Tensor))
        given = {**_DEFAULTS, **self.conversion, "target": f"{runtime}:{device}", "partial": False}
        return {name: value for name, value in given.items() if name in inspect.signature(function).parameters}


def check_conversion(who: str, given: Mapping[str, Any], others: set[str]) -> None:
    """Refuse what :func:`rmfx.convert` would not take from ``who``, before anything is compiled.

    Raises:
        RmfxError: for an unknown name or a bad value; lists the good ones.
    """
    good = (_CONVERT - _NOT_HERE) | others
    for name in given:
        if name not in good:
            raise RmfxError(f"{who} has no option {name!r}; it has {_listed(sorted(good))}")
    if given.get("verify") not in (None, True, False):
        raise RmfxError(f"verify must be True, False or None, got {given['verify']!r}")
    names = {entry.name for entry in fields(Options)}
    try:
        Options(**{name: value for name, value in given.items() if name in names})
    except RmfxError as error:
        raise RmfxError(f"{who}: {error}") from error


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
