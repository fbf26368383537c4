"""Which residual sums a network has, and of which class each is.

A *residual sum* is a sum of two tensors that depend on the input, with a nearest common fork. One side, the shortcut,
is the fork itself or linear; the other, the branch, is longer. A sum both sides of which are nonlinear is a *merge*:
listed, not counted. Neither are differences, sums without any weight on the branch (rotary embeddings, sums inside a
norm), and sums that only become attention logits.

=====  =============================================================================================
A      conv, batch norm and ReLU on the branch; the fork is provably not negative; identity shortcut
B      the same with a conv shortcut
C      conv, batch norm, ReLU or ReLU6 on the branch; the fork has both signs
D      as A to C with another activation
E      as A to D with a gate (squeeze-excite, ECA, ...) on the branch
F      pre-activation: batch norm or activation before the first conv
G      linear branches only
H      an MLP of linear layers, or a norm over the sample's own statistics (LayerNorm, GroupNorm, RMSNorm)
I      attention on the branch
J      a split, slice or concat inside
K      other: a max pool inside, an average pool or a nonlinear sum on the branch, a product that is no gate, ...
=====  =============================================================================================
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from benchmarks.coverage.words import (
    LINEAR,
    Word,
    is_dense,
    is_difference,
    is_softmax,
    is_sum,
    makes_weights,
    spelled,
    splits_channels,
    word_of,
)
from rmfx.graph.facts import range_of

CLASSES = "ABCDEFGHIJK"
MERGE = "merge"
WEIGHTY = {Word.MIX, Word.BATCH_NORM, Word.NORM, Word.ATTENTION}  # a branch has one of these, else it is arithmetic
FORMING = {Word.MOVE, Word.SCALE, Word.SPLIT, Word.AVERAGE}  # what may stand between a gate's sigmoid and its product
PASSING = {Word.MOVE, Word.SCALE, Word.SUM, Word.SPLIT}


@dataclass(frozen=True)
class ResidualSum:
    """One residual sum: its name in the traced graph (as in reports), its class, and what its branch consists of."""

    node: str
    kind: str
    shortcut: str  # words, in order
    branch: str


@dataclass(frozen=True)
class _Sides:
    fork: fx.Node
    shortcut: tuple[fx.Node, ...]
    branch: tuple[fx.Node, ...]


class Census:
    """The residual sums of one graph in normal form."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.nodes = list(gm.graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.dynamic = _dynamic(gm)
        self.words = {node: word_of(node, self.dynamic) for node in self.dynamic}

    def sums(self) -> Iterator[ResidualSum]:
        """All residual sums and merges, in the order of the graph."""
        for node in self.nodes:
            if node not in self.dynamic or not is_sum(node) or is_difference(node) or self._makes_logits(node):
                continue
            if (sides := self._sides(node)) is not None:
                kind = self._kind(sides)
                if kind:
                    told = (
                        " ".join(spelled(n, self.words[n]) for n in side) for side in (sides.shortcut, sides.branch)
                    )
                    yield ResidualSum(node.meta.get("origin", node.name), kind, *told)

    def _makes_logits(self, node: fx.Node) -> bool:
        """Whether all that becomes of the value is softmax over it."""
        readers = [user for user in node.users if user in self.dynamic]
        return bool(readers) and all(
            is_softmax(user) or (self.words[user] in PASSING and self._makes_logits(user)) for user in readers
        )

    def _parents(self, node: fx.Node) -> list[fx.Node]:
        return [parent for parent in node.all_input_nodes if parent in self.dynamic]

    def _sides(self, join: fx.Node) -> _Sides | None:
        """The nearest common fork and what stands between, always walking up from the latest node."""
        tips = self._parents(join)
        if len(tips) != 2:
            return None
        sides = {tips[0]: 1, tips[1]: 2}
        heap = [-self.order[tip] for tip in tips]
        heapq.heapify(heap)
        seen: list[fx.Node] = []
        while heap:
            node = self.nodes[-heapq.heappop(heap)]
            if sides[node] == 3:
                return self._split(node, seen, sides)
            seen.append(node)
            for parent in self._parents(node):
                if parent not in sides:
                    heapq.heappush(heap, -self.order[parent])
                sides[parent] = sides.get(parent, 0) | sides[node]
        return None

    def _split(self, fork: fx.Node, seen: list[fx.Node], sides: dict[fx.Node, int]) -> _Sides:
        below = {fork}
        chains: dict[int, list[fx.Node]] = {1: [], 2: []}
        for node in reversed(seen):
            if any(parent in below for parent in self._parents(node)):
                below.add(node)
                chains[sides[node]].append(node)
        first, second = (tuple(chains[side]) for side in (1, 2))
        if self._weight(first) < self._weight(second):
            first, second = second, first
        return _Sides(fork, second, first)

    def _weight(self, chain: tuple[fx.Node, ...]) -> tuple[int, int]:
        return sum(not self._is_linear(node) for node in chain), len(chain)

    def _is_linear(self, node: fx.Node) -> bool:
        return self.words[node] in LINEAR or self.words[node] is Word.SUM

    def _kind(self, sides: _Sides) -> str | None:
        branch = [self.words[node] for node in sides.branch]
        shortcut = {self.words[node] for node in sides.shortcut}
        if not WEIGHTY & set(branch):
            pooled = Word.AVERAGE in branch and not shortcut and Word.PRODUCT not in branch
            return "K" if pooled else None
        if shortcut - LINEAR - {Word.SUM, Word.MAX_POOL}:
            return MERGE
        return next((kind for kind, has in self._tests(sides, branch, shortcut) if has()), "B" if shortcut else "A")

    def _tests(
        self, sides: _Sides, branch: list[Word], shortcut: set[Word]
    ) -> Iterator[tuple[str, Callable[[], bool]]]:
        """Classes and what makes a sum belong to them; the first that holds counts."""
        inner = sides.branch
        yield "I", lambda: Word.ATTENTION in branch
        yield "J", lambda: any(splits_channels(node) for node in inner)
        yield "H", lambda: Word.NORM in branch
        yield "J", lambda: Word.SPLIT in branch or Word.SPLIT in shortcut
        yield "G", lambda: not set(branch) - LINEAR - {Word.SUM}
        yield "H", lambda: any(is_dense(node) and self._bars(node, sides) for node in inner)
        yield "K", lambda: Word.OTHER in branch or Word.MAX_POOL in {*branch, *shortcut}
        yield "K", lambda: any(self.words[node] is Word.AVERAGE and self._bars(node, sides) for node in inner)
        yield "K", lambda: any(is_sum(node) and (is_difference(node) or self._is_curved(node)) for node in inner)
        yield "K", lambda: any(self.words[node] is Word.PRODUCT and not self._is_gate(node) for node in inner)
        yield "F", lambda: _is_preactivation(branch)
        yield "E", lambda: Word.PRODUCT in branch
        yield "D", lambda: Word.ACTIVATION in branch
        yield "C", lambda: range_of(sides.fork)[0] < 0

    def _is_gate(self, product: fx.Node) -> bool:
        """Whether a factor comes out of a function that makes weights of values, such as sigmoid."""
        for factor in self._parents(product):
            while self.words[factor] in FORMING and self._parents(factor):
                factor = self._parents(factor)[0]
            if makes_weights(factor):
                return True
        return False

    def _is_curved(self, join: fx.Node) -> bool:
        """Whether a sum is one of two tensors that have a nonlinearity between their fork and it."""
        sides = self._sides(join)
        return sides is not None and self._weight(sides.branch)[0] > 0

    def _bars(self, wall: fx.Node, sides: _Sides) -> bool:
        """Whether everything on the branch goes through ``wall``, as nothing does through the pool of a gate."""
        below = {sides.fork}
        for node in sides.branch:
            if node is not wall and any(parent in below for parent in self._parents(node)):
                below.add(node)
        return sides.branch[-1] not in below


def _is_preactivation(branch: list[Word]) -> bool:
    """Whether a batch norm or an activation comes before the first conv."""
    if Word.MIX not in branch:
        return False
    before = branch[: branch.index(Word.MIX)]
    return bool({Word.BATCH_NORM, Word.RELU, Word.ACTIVATION} & set(before))


def _dynamic(gm: fx.GraphModule) -> set[fx.Node]:
    """Tensors that depend on the network's input."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "output" or node.meta.get("plain_value", False):
            continue
        if node.op == "placeholder" or any(parent in found for parent in node.all_input_nodes):
            found.add(node)
    return found
