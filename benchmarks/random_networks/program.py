"""Random networks as source text: lines of a ``forward``, blocks of lines, a network of blocks.

Text, so that a failing network can be printed, shrunk line by line and pasted into a test.
"""

from __future__ import annotations

import ast
import linecache
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NAMES = {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor}


@dataclass(frozen=True)
class Line:
    """One statement of a ``forward``.

    Attributes:
        target: the variable it makes; empty for a statement that writes in place.
        code: an expression (a statement where there is no target); layers are attributes of ``self``.
        layers: attribute and constructor of the layers that are made for it.
    """

    target: str
    code: str
    layers: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """As Python."""
        return f"{self.target} = {self.code}" if self.target else self.code

    def variables(self) -> list[str]:
        """The variables it reads, in order of appearance."""
        found = [node.id for node in ast.walk(ast.parse(self.code)) if isinstance(node, ast.Name)]
        return list(dict.fromkeys(name for name in found if re.fullmatch(r"x|v\d+", name)))


@dataclass(frozen=True)
class Block:
    """A module of one tensor: what it computes, and what it returns beside the result.

    Attributes:
        kind: of the recipe it was drawn from.
        result: the variable that the next block reads.
        extras: further variables that become outputs of the network.
        features: what is in it, for statistics.
    """

    kind: str
    lines: tuple[Line, ...]
    result: str
    extras: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()

    def source(self, name: str) -> str:
        """As a class of Python."""
        layers = [f"        self.{attribute} = {made}" for line in self.lines for attribute, made in line.layers]
        body = [f"        {line.text}" for line in self.lines]
        result = ", ".join((self.result, *self.extras))
        return "\n".join(
            [
                f"class {name}(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *layers,
                "",
                "    def forward(self, x):",
                *body,
                f"        return {result}",
            ]
        )

    def without_idle_lines(self) -> Block:
        """Without lines whose results nothing reads, and layers that nothing calls."""
        lines: list[Line] = []
        needed = {self.result, *self.extras}
        for line in reversed(self.lines):
            if line.target and line.target not in needed:
                continue
            needed |= set(line.variables())
            lines.insert(0, line)
        called = " ".join(line.code for line in lines)
        kept = [
            replace(line, layers=tuple(pair for pair in line.layers if re.search(rf"self\.{pair[0]}\b", called)))
            for line in lines
        ]
        return replace(self, lines=tuple(kept))


@dataclass(frozen=True)
class Network:
    """Blocks in a row.

    Attributes:
        shape: of an input, batch first.
        blocks: the modules.
        calls: which of them run, in order; one that runs twice shares its weights.
        output: ``tensor``, ``tuple`` or ``dict``: what the outputs are packed in.
        seed: of the weights.
    """

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    calls: tuple[int, ...]
    output: str = "tensor"
    seed: int = 0
    name: str = field(default="network", compare=False)

    @property
    def features(self) -> frozenset[str]:
        """What is in it: recipes and their details."""
        found = {block.kind for block in self.blocks}
        if len(set(self.calls)) < len(self.calls):
            found.add("shared block")
        if self.output != "tensor":
            found.add(f"returns a {self.output}")
        return frozenset(found.union(*(block.features for block in self.blocks)))

    def source(self) -> str:
        """As Python."""
        parts = [
            "import torch",
            "from torch import nn",
            "from torch.nn import functional as F",
            *(f"\n\n{block.source(f'Block{index}')}" for index, block in enumerate(self.blocks)),
            "\n\nclass Network(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        self.block{index} = Block{index}()" for index in range(len(self.blocks))),
            "",
            "    def forward(self, x):",
        ]
        outputs = ["x"]
        for call, index in enumerate(self.calls):
            extras = [f"extra{call}_{i}" for i in range(len(self.blocks[index].extras))]
            outputs += extras
            parts.append(f"        {', '.join(['x', *extras])} = self.block{index}(x)")
        if self.output == "dict":
            parts.append("        return {" + ", ".join(f'"{name}": {name}' for name in outputs) + "}")
        elif self.output == "tuple":
            parts.append(f"        return ({', '.join(outputs)},)")
        else:
            parts.append(f"        return {', '.join(outputs)}")
        return "\n".join(parts) + "\n"

    def build(self) -> nn.Module:
        """The network in float64 and eval mode, with torch's own random weights."""
        source = self.source()
        file = f"<{self.name} {abs(hash(source))}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        names = dict(_NAMES, __name__="random_network")
        state = torch.get_rng_state()
        torch.manual_seed(self.seed)
        try:
            exec(compile(source, file, "exec"), names)
            made = names["Network"]()  # type: ignore[operator]
        finally:
            torch.set_rng_state(state)
        assert isinstance(made, nn.Module)
        return made.double().eval()

    # -- smaller ones -------------------------------------------------------------------------------------------------

    def smaller(self) -> Iterator[Network]:
        """Networks with one thing less each, large things first. Not all of them run."""
        for position in range(len(self.calls)):
            yield self._with_calls(self.calls[:position] + self.calls[position + 1 :])
        if self.output != "tensor":
            yield replace(self, output="tensor")
        for index, block in enumerate(self.blocks):
            for extra in block.extras:
                kept = tuple(name for name in block.extras if name != extra)
                yield self._with_block(index, replace(block, extras=kept))
            for position in reversed(range(len(block.lines))):
                line = block.lines[position]
                before, after = block.lines[:position], block.lines[position + 1 :]
                if not line.target:
                    yield self._with_block(index, replace(block, lines=before + after))
                for variable in line.variables() if line.target else ():
                    if line.code != variable:
                        bypass = Line(line.target, variable, line.layers)
                        yield self._with_block(index, replace(block, lines=(*before, bypass, *after)))

    def _with_calls(self, calls: tuple[int, ...]) -> Network:
        used = sorted(set(calls))
        blocks = tuple(self.blocks[index] for index in used)
        return replace(self, blocks=blocks, calls=tuple(used.index(index) for index in calls))

    def _with_block(self, index: int, block: Block) -> Network:
        blocks = list(self.blocks)
        blocks[index] = _without_aliases(block).without_idle_lines()
        return replace(self, blocks=tuple(blocks))


def _without_aliases(block: Block) -> Block:
    """``v3 = v2`` is gone: all that read the one read the other. Its layers stay with the next line."""
    for position, line in enumerate(block.lines):
        if line.target and re.fullmatch(r"x|v\d+", line.code):
            rest = tuple(_renamed(other, line.target, line.code) for other in block.lines[position + 1 :])
            lines = [*block.lines[:position], *rest]
            if line.layers and lines:
                at = min(position, len(lines) - 1)
                lines[at] = replace(lines[at], layers=line.layers + lines[at].layers)
            swap = {line.target: line.code}
            extras = tuple(swap.get(name, name) for name in block.extras)
            return replace(block, lines=tuple(lines), result=swap.get(block.result, block.result), extras=extras)
    return block


def _renamed(line: Line, old: str, new: str) -> Line:
    target = new if line.target == old else line.target
    return replace(line, target=target, code=re.sub(rf"\b{old}\b", new, line.code))


def weighted(r: random.Random, choices: dict[str, float]) -> str:
    """A key, drawn with its weight."""
    at = r.random() * sum(choices.values())
    for key, weight in choices.items():
        at -= weight
        if at < 0:
            return key
    return next(iter(choices))
