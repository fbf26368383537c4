"""Writes the lines of one block and runs each on zeros: shapes are known, and what does not fit is taken back."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.random_networks.program import Block, Line

_NAMES = {"torch": torch, "nn": nn, "F": F}
MOST_ELEMENTS = 20_000  # of one tensor: networks stay small


class MisfitError(Exception):
    """What was drawn does not run, or does not have the shape that is needed."""


class Writer:
    """The lines of one block so far, and a tensor for each variable.

    Attributes:
        r: decides everything.
        dims: spatial dimensions of convs; 0 for linear layers.
        features: what was written, for statistics.
        extras: variables to return beside the result.
    """

    def __init__(self, r: random.Random, dims: int, shape: tuple[int, ...]) -> None:
        self.r = r
        self.dims = dims
        self.features: set[str] = set()
        self.extras: list[str] = []
        self.lines: list[Line] = []
        self._values: dict[str, Tensor] = {"x": torch.zeros(shape)}
        self._owner = nn.Module().eval()
        self._count = 0

    # -- what is known of a variable ----------------------------------------------------------------------------------

    def shape(self, variable: str) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self._values[variable].shape)

    def channels(self, variable: str) -> int:
        """Its channels: dimension 1, or the last one for linear layers."""
        return self.shape(variable)[1 if self.dims else -1]

    def sizes(self, variable: str) -> tuple[int, ...]:
        """Its spatial sizes; nothing for linear layers."""
        return self.shape(variable)[2:] if self.dims else ()

    @property
    def axis(self) -> int:
        """The channel axis."""
        return 1 if self.dims else -1

    @property
    def slices(self) -> str:
        """What stands before the channels in an index."""
        return ":, " if self.dims else "..., "

    # -- writing ------------------------------------------------------------------------------------------------------

    def emit(self, code: str, **layers: str) -> str:
        """Write ``v = code`` and return ``v``; ``$name`` in it is the layer that ``name`` constructs.

        Raises:
            MisfitError: when it does not run.
        """
        line = self._line(code, layers)
        self._count += 1
        line = Line(f"v{self._count}", line.code, line.layers)
        with torch.no_grad():
            value = self._attempt(lambda: eval(line.code, _NAMES, self._scope()))
        if not isinstance(value, Tensor) or not value.numel() or value.numel() > MOST_ELEMENTS:
            raise MisfitError(f"{code} is too small, too large, or no tensor")
        self._values[line.target] = value
        self.lines.append(line)
        return line.target

    def write(self, statement: str, **layers: str) -> None:
        """Write a statement that makes no variable.

        Raises:
            MisfitError: when it does not run.
        """
        line = self._line(statement, layers)
        with torch.no_grad():
            self._attempt(lambda: exec(line.code, _NAMES, self._scope()))
        self.lines.append(Line("", line.code, line.layers))

    def _line(self, code: str, layers: dict[str, str]) -> Line:
        made = []
        for name, constructor in layers.items():
            self._count += 1
            attribute = f"{name}{self._count}"
            code = re.sub(rf"\${name}\b", f"self.{attribute}", code)
            layer = self._attempt(partial(eval, constructor, _NAMES))
            setattr(self._owner, attribute, layer.eval() if isinstance(layer, nn.Module) else layer)
            made.append((attribute, constructor))
        return Line("", code, tuple(made))

    def _scope(self) -> dict[str, object]:
        return {**self._values, "self": self._owner}

    def _attempt(self, run: Callable[[], object]) -> object:
        try:
            return run()
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
            raise MisfitError(str(error)) from error

    # -- trying -------------------------------------------------------------------------------------------------------

    def fit(
        self,
        draw: Callable[[], str],
        channels: int | None = None,
        sizes: tuple[int, ...] | None = None,
        tries: int = 12,
    ) -> str:
        """The first of ``tries`` draws that runs and has the wanted shape; what was written for others is taken back.

        Raises:
            MisfitError: when none has.
        """
        for _ in range(tries):
            before = (len(self.lines), dict(self._values), set(self.features), list(self.extras))
            try:
                found = draw()
                if channels in (None, self.channels(found)) and sizes in (None, self.sizes(found)):
                    return found
            except MisfitError:
                pass
            self.lines, self._values = self.lines[: before[0]], before[1]
            self.features, self.extras = before[2], before[3]
        raise MisfitError("nothing that was drawn fits")

    def chance(self, probability: float, feature: str | None = None) -> bool:
        """Whether to, which is noted as a feature."""
        if self.r.random() >= probability:
            return False
        if feature is not None:
            self.features.add(feature)
        return True

    def pick(self, *choices: str) -> str:
        """One of them."""
        return self.r.choice(choices)

    def some_channels(self) -> int:
        """A small width."""
        return self.r.choice([2, 4, 4, 6, 8] if self.dims < 3 else [2, 4])

    def block(self, kind: str, result: str) -> Block:
        """All that was written."""
        features = frozenset(self.features | {f"{self.dims}d"})
        block = Block(kind, tuple(self.lines), result, tuple(dict.fromkeys(self.extras)), features)
        assert prod(self.shape(result))
        return block.without_idle_lines()
