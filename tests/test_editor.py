"""The editor: names, places and facts stay in order while layers come and go."""

from __future__ import annotations

import pytest
import torch
from front import Lambda, normal_form, operations
from nets import conv
from torch import fx, nn

from rmfx.algebra.affine import Affine, dirac
from rmfx.algebra.grid import Grid
from rmfx.graph.editor import Editor, meta_layer
from rmfx.graph.facts import annotate
from rmfx.graph.linear import affine_of


def prepared(sized: bool = True) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    block = nn.Sequential(conv(3, 4, bias=True), nn.ReLU(), conv(4, 5, 3, 2))
    gm = normal_form(Lambda(lambda m, x: m.block(x), block=block).eval())
    annotate(gm, (torch.zeros(2, 3, 8, 8),) if sized else None)
    return gm, {str(node.target): node for node in gm.graph.nodes if node.op == "call_module"}


LAYERS = {
    "Linear": nn.Linear(4, 6),
    "Linear without bias": nn.Linear(4, 6, bias=False),
    "Conv1d": nn.Conv1d(4, 6, 3, 2, 1, 2, 2),
    "Conv2d": nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 4), (1, 2), 2, False),
    "Conv2d, reflecting": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "Conv3d": nn.Conv3d(4, 6, 3, padding=1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_of_a_map_is_the_layer_it_was_read_off(name: str) -> None:
    layer = LAYERS[name]
    gm = normal_form(nn.Sequential(layer, nn.ReLU()).eval())
    node = next(node for node in gm.graph.nodes if node.op == "call_module")
    made = meta_layer(affine_of(node, layer.weight.dim() - 2))
    assert made.extra_repr() == layer.extra_repr() and type(made) is type(layer)
    assert all(parameter.is_meta for parameter in made.parameters())


def test_a_linear_layer_comes_with_its_facts() -> None:
    gm, nodes = prepared()
    editor, last = Editor(gm), nodes["block.2"]
    affine = dirac(4, Grid.sampling((2, 2)))
    node = editor.linear(affine, last.all_input_nodes[0], last, "block.pick")
    assert node.meta["affine"] is affine and isinstance(node.meta["affine"], Affine)
    assert node.meta["shape"] == torch.Size([2, 4, 4, 4])
    assert node.meta["place"] == "block" and node.meta["range"] == (-float("inf"), float("inf"))
    assert list(gm.graph.nodes).index(node) + 1 == list(gm.graph.nodes).index(last)
    assert not gm.get_submodule("block.pick").training
    unsized, nodes = prepared(sized=False)
    last = nodes["block.2"]
    assert "shape" not in Editor(unsized).linear(affine, last.all_input_nodes[0], last, "block.pick").meta


@pytest.mark.parametrize("shape", [(5, 4), (5, 7, 4), (4,)])
def test_shapes_of_features(shape: tuple[int, ...]) -> None:
    gm = normal_form(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval())
    annotate(gm, (torch.zeros(shape),))
    last = next(node for node in reversed(gm.graph.nodes) if node.op == "call_module")
    weight = torch.zeros(6, 4)
    affine = Affine(4, 6, 1, Grid(), False, lambda dtype: (weight.to(dtype), None))
    node = Editor(gm).linear(affine, last.all_input_nodes[0], last, "made")
    assert tuple(node.meta["shape"]) == (*shape[:-1], 6)


def test_a_layer_keeps_shape_and_maps_the_range() -> None:
    gm, nodes = prepared()
    source = nodes["block.0"]
    node = Editor(gm).layer(nn.ReLU6(), source, nodes["block.1"], "block.clip")
    assert node.meta["range"] == (0.0, 6.0) and node.meta["shape"] == source.meta["shape"]
    assert node.meta["made"] and node.args == (source,)


def test_fresh_names_collide_with_nothing() -> None:
    gm, _ = prepared()
    editor = Editor(gm)
    assert [editor.fresh("block", "carry") for _ in range(3)] == ["block.carry", "block.carry_1", "block.carry_2"]
    assert editor.fresh("block", "0") == "block.0_1"
    assert editor.fresh("", "block") == "block_1"
    assert editor.fresh("", "forward") == "forward_1", "an attribute of every module"
    assert editor.fresh("block", "training") == "block.training_1"
    assert editor.fresh("new.place", "carry") == "new.place.carry"


def test_replacing_hands_on_readers_and_facts() -> None:
    gm, nodes = prepared()
    editor, old = Editor(gm), nodes["block.1"]
    before = dict(old.meta)
    new = editor.layer(nn.ReLU(), old.all_input_nodes[0], old, editor.fresh("elsewhere", "relu"))
    editor.replace(old, new)
    assert not old.users and list(new.users) == [nodes["block.2"]]
    assert all(new.meta[key] == before[key] for key in ("origin", "place", "shape", "range"))
    editor.erase([old])
    editor.finish()
    assert operations(gm) == ["Conv2d", "ReLU", "Conv2d"]
    assert [str(node.target) for node in gm.graph.nodes if node.op == "call_module"] == [
        "block.0",
        "elsewhere.relu",
        "block.2",
    ]
    assert not hasattr(gm.get_submodule("block"), "1")
    assert gm(torch.zeros(1, 3, 8, 8)).shape == (1, 5, 4, 4)


def test_what_is_still_read_cannot_be_erased() -> None:
    gm, nodes = prepared()
    with pytest.raises(RuntimeError, match="still had 1 users"):
        Editor(gm).erase([nodes["block.1"]])


def test_a_name_may_be_taken_over() -> None:
    gm, nodes = prepared()
    editor, old = Editor(gm), nodes["block.1"]
    new = editor.layer(nn.Tanh(), old.all_input_nodes[0], old, "block.1")
    editor.replace(old, new)
    editor.erase([old])
    editor.finish()
    assert operations(gm) == ["Conv2d", "Tanh", "Conv2d"]
