"""The order of passes, the driver, the price of what is applied, and callbacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from front import normal_form, operations
from nets import build
from torch import fx, nn

from rmfx.errors import NormalFormError
from rmfx.graph.editor import Editor
from rmfx.graph.facts import annotate
from rmfx.graph.pipeline import run_passes
from rmfx.graph.rewriter import sweep, want_all
from rmfx.graph.rule import PassResult, Price, Refusal, Rule
from rmfx.passes import inference_passes, training_passes
from rmfx.passes.fold_norm import FoldNorm
from rmfx.passes.merge_branches import MergeBranches
from rmfx.passes.remove_residual import RemoveResidual


def prepared(name: str = "basic_chain") -> fx.GraphModule:
    gm = normal_form(build(name)[0])
    annotate(gm, None)
    return gm


def test_the_order_is_one_tuple() -> None:
    removal = RemoveResidual("masked", "conv")
    passes = inference_passes(removal, "always", drop_dead=False)
    assert [rule.name for rule in passes] == ["fold_norm", "merge_branches", "remove_residual", "fuse_convs"]
    assert passes[2] is removal
    dropping = [rule.name for rule in inference_passes(removal, "always", drop_dead=True)]
    assert [place for place, name in enumerate(dropping) if name == "drop_dead_channels"] == [2, 3, 6]
    assert training_passes(removal) == (RemoveResidual("masked", "conv", keep_norms=True),)


@pytest.mark.parametrize(
    "rule", inference_passes(RemoveResidual(), "cheaper", drop_dead=True), ids=lambda rule: rule.name
)
def test_rules_are_values(rule: Rule[Any, Any]) -> None:
    assert rule == type(rule)() and hash(rule) == hash(type(rule)())
    with pytest.raises(AttributeError):
        rule.extra = 1
    assert type(rule).__module__ == f"rmfx.passes.{rule.name}"


def test_passes_run_in_order_and_report_each() -> None:
    gm, seen = prepared(), []
    rules = inference_passes(RemoveResidual(), "cheaper", drop_dead=True)
    results = run_passes(gm, rules, want_all, lambda result, graph: seen.append((result, graph)))
    assert [result.name for result in results] == [rule.name for rule in rules]
    assert [result for result, _ in seen] == list(results) and all(graph is gm for _, graph in seen)
    assert [len(result.applied) for result in results] == [8, 0, 0, 0, 3, 0, 0]
    assert [result.changed for result in results] == [True, False, False, False, True, False, False]


def test_nothing_runs_on_a_graph_out_of_normal_form() -> None:
    gm = prepared()
    gm.get_submodule("0.0").train()
    with pytest.raises(NormalFormError, match="rule 1 of the normal form"):
        run_passes(gm, (FoldNorm(),), want_all)
    assert operations(gm).count("BatchNorm2d") == 8


# -- a rule of the test's own -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count(Rule[fx.Node, fx.Node]):
    """Doubles every ReLU; refuses the second one it meets; ``broken`` leaves the normal form."""

    name: ClassVar[str] = "count"
    refused: str = ""
    broken: bool = False

    def match(self, node: fx.Node) -> fx.Node | None:
        module = node.graph.owning_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        return node if isinstance(module, nn.ReLU) else None

    def check(self, match: fx.Node) -> fx.Node | Refusal:
        return Refusal(match, "not this one") if match.name == self.refused else match

    def price(self, plan: fx.Node) -> Price:
        return Price(2.0, 5.0, 1, 1)

    def scope(self, plan: fx.Node) -> tuple[fx.Node, ...]:
        return (plan,)

    def rewrite(self, plan: fx.Node, editor: Editor) -> fx.Node:
        module = nn.Identity() if self.broken else nn.ReLU()
        node = editor.layer(module, plan.all_input_nodes[0], plan, editor.fresh("extra", "relu"))
        plan.replace_input_with(plan.all_input_nodes[0], node)
        return node


def relus() -> list[fx.Node]:
    return [node for node in prepared().graph.nodes if Count().match(node)]


def test_the_driver_goes_in_graph_order_and_finishes_once() -> None:
    gm = prepared()
    names = [node.name for node in relus()]
    result = sweep(gm, Count(refused=names[1]))
    assert [applied.node for applied in result.applied] == [names[0], *names[2:]]
    ((where, reason, kept),) = [(r.node, r.reason, r.kept) for r in result.refused]
    assert (where, reason, kept) == (names[1], "not this one", False)
    assert operations(gm).count("ReLU") == 2 * len(names) - 1
    assert [name for name, _ in gm.get_submodule("extra").named_children()][:2] == ["relu", "relu_1"]


def test_a_veto_keeps_what_is_legal() -> None:
    gm = prepared()
    names = [node.name for node in relus()]
    objections = []

    def veto(node: fx.Node, plan: object, price: Price) -> str | None:
        objections.append((node.name, plan is node, price.growth))
        return None if node.name == names[0] else "too dear"

    result = sweep(gm, Count(), veto)
    assert len(result.applied) == 1 and [r.node for r in result.refused] == names[1:]
    assert all(r.kept and r.reason == "too dear" and r.price == Price(2.0, 5.0, 1, 1) for r in result.refused)
    assert objections == [(name, True, 2.5) for name in names]


def test_a_pass_that_leaves_the_normal_form_is_caught() -> None:
    with pytest.raises(NormalFormError, match="does nothing in eval mode"):
        run_passes(prepared(), (Count(broken=True),), want_all)


def test_a_sweep_without_a_match_touches_nothing() -> None:
    gm = prepared()
    code, forward = gm.code, type(gm).forward
    assert sweep(gm, MergeBranches()) == PassResult("merge_branches")
    assert gm.code == code and type(gm).forward is forward


def test_growth() -> None:
    assert Price(2, 3, 0, 0).growth == 1.5 and Price(0, 0, 4, 8).growth == 1.0
