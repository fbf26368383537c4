"""Damaged and hostile files: refused with a reason, and nothing in them runs."""

from __future__ import annotations

import copy
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from saved import (
    assert_same_network,
    everything,
)
from torch import Tensor, fx

from rmfx.errors import FileFormatError
from rmfx.files import archive
from rmfx.files.serialise import load, save


def complaint(path: Any) -> str:
    with pytest.raises(FileFormatError) as caught:
        load(path)
    return str(caught.value)


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "net.rmfx"
    assert "there is no such file" in complaint(path)
    assert "there is no such file" in complaint(tmp_path)
    assert "there is no such file" in complaint(tmp_path / ("a" * 300))
    assert "None is no path: " in complaint(None)
    for content in (b"", b"PK\x03\x04", pickle.dumps({"a": 1}), b"\xff" * 100, b"[" * 100_000):
        path.write_bytes(content)
        assert "it is no whole .rmfx file" in complaint(path)
    save_file({"a": torch.ones(1)}, path)
    assert "was not written by rmfx.save" in complaint(path)
    for document, reason in (
        ('{"version": 7}', "has file version 7, this rmfx reads version 1"),
        ("[]", "has file version None"),
        ('{"version": 1}', "a saved network has the fields version, sha256, content"),
        ('{"version": 1, "sha256": "0", "content": 1}', "is damaged: its checksum does not fit"),
        ("", "holds no JSON document"),
        ("NaN", "holds no JSON document: NaN is no JSON"),
        ("[" * 200_000, "holds no JSON document"),
        ("9" * 5000, "holds no JSON document"),
    ):
        save_file({"a": torch.ones(1)}, path, {"rmfx": document})
        assert reason in complaint(path)


def test_flipped_and_missing_bytes_are_found(tmp_path: Path) -> None:
    network, _ = everything()
    path = save(network, tmp_path / "net.rmfx")
    whole, dice = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole[: dice.randrange(len(whole))] if dice.random() < 0.2 else whole)
        for _ in range(dice.randrange(1, 4) if damaged else 0):
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            assert_same_network(network, load(path))
        except FileFormatError:
            refused += 1
    assert refused > 390


Document = dict[str, Any]
HACK = "open('hacked', 'w')"


def hostile(tmp_path: Path, change: Callable[[Document, dict[str, Tensor]], None]) -> str:
    """What loading says of a file with a right checksum whose contents were changed."""
    path = save(everything()[0], tmp_path / "net.rmfx")
    content, tensors = archive.read(path)
    change(content["graph"], tensors)
    archive.write(path, content, tensors)
    return complaint(path)


def node(document: Document, name: str) -> Document:
    return next(entry for entry in document["graph"]["nodes"] if entry["name"] == name)


def module(document: Document, name: str) -> Document:
    return next(entry for entry in document["modules"] if entry["name"] == name)


def tensor(document: Document, name: str) -> Document:
    return next(entry for entry in document["tensors"] if entry["name"] == name)


def deep(levels: int) -> list[Any]:
    return [deep(levels - 1)] if levels else []


HOSTILE_GRAPHS: dict[str, tuple[Callable[[Document], Any], str]] = {
    "system": (lambda d: node(d, "cat").update(target="os.system"), "uses 'os.system', which is unknown"),
    "eval": (lambda d: node(d, "cat").update(target="builtins.eval"), "uses 'builtins.eval', which is unknown"),
    "method": (lambda d: node(d, "mean").update(target="__class__"), "uses '__class__', which is unknown"),
    "storage": (lambda d: node(d, "mean").update(target="numpy"), "uses 'numpy', which is unknown"),
    "attribute": (lambda d: node(d, "getattr_1")["args"].__setitem__(1, "__class__"), "can be read off a tensor"),
    "no tensor": (lambda d: node(d, "mean").update(args=["text"]), "method mean needs a tensor"),
    "node name": (lambda d: node(d, "cat").update(name=f"a={HACK}"), "is no identifier, or taken"),
    "twice": (lambda d: node(d, "cat").update(name="head"), "is no identifier, or taken"),
    "argument": (lambda d: node(d, "x").update(target=f"x={HACK}"), "cannot be an argument of forward"),
    "self": (lambda d: node(d, "x").update(target="self"), "cannot be an argument of forward"),
    "keyword": (lambda d: node(d, "cat").update(kwargs={f"dim={HACK}": 1}), "not a keyword argument"),
    "operation": (lambda d: node(d, "cat").update(op="call"), "unknown operation 'call'"),
    "module": (lambda d: node(d, "head").update(target="graph"), "uses 'graph', which is unknown"),
    "container": (lambda d: node(d, "head").update(target="body"), "uses 'body', which is unknown"),
    "read": (lambda d: node(d, "scale").update(target="forward"), "uses 'forward', which is unknown"),
    "later": (lambda d: node(d, "cat").update(args=[{"node": "output"}]), "there is no earlier node 'output'"),
    "tag": (lambda d: node(d, "cat").update(args=[{"pickle": "x"}]), "unknown kind of value 'pickle'"),
    "tags": (lambda d: node(d, "cat").update(args=[{"tuple": [], "slice": []}]), "not a tagged value"),
    "float": (lambda d: node(d, "cat").update(args=[{"float": "1_0"}]), "not a float: '1_0'"),
    "dtype": (lambda d: node(d, "cat").update(args=[{"dtype": "torch.load"}]), "unknown name 'torch.load'"),
    "device": (lambda d: node(d, "cat").update(args=[{"device": "x:y"}]), "not a device"),
    "deep": (lambda d: node(d, "cat").update(args=deep(100)), "nests deeper than 64 levels"),
    "meta": (lambda d: node(d, "cat").update(meta={"val": "x"}), "unknown metadata"),
    "no output": (lambda d: d["graph"]["nodes"].pop(), "a graph ends with its one output"),
    "outputs": (lambda d: d["graph"]["nodes"].append(d["graph"]["nodes"][-1]), "is no identifier, or taken"),
    "field": (lambda d: node(d, "cat").pop("meta"), "a node has the fields op, name"),
    "type": (lambda d: d.update(training="no"), "field 'training' of a network cannot be 'no'"),
    "class name": (lambda d: d.update(class_name=HACK), "not the name of a class"),
    "pytree": (
        lambda d: d["graph"].update(pytree={"names": [HACK], "inputs": None, "outputs": None}),
        "not names of arguments",
    ),
    "pytree key": (
        lambda d: d["graph"].update(
            pytree={"names": ["x"], "inputs": {"tuple": [{"tuple": []}, {"dict": [[HACK, None]]}]}, "outputs": None}
        ),
        "not names of arguments",
    ),
    "class": (lambda d: module(d, "head")["layer"].update({"class": "subprocess.Popen"}), "unknown layer class"),
    "path": (lambda d: module(d, "head").update(name='h")("'), "not a name of a module or tensor"),
    "dunder": (lambda d: module(d, "head").update(name="__class__"), "not a name of a module or tensor"),
    "collision": (lambda d: module(d, "head").update(name="recompile"), "the module name 'recompile' is taken"),
    "orphan": (lambda d: module(d, "head").update(name="no.where"), "there is no container 'no'"),
    "inside": (lambda d: d["modules"].append({**module(d, "head"), "name": "head.x"}), "there is no container 'head'"),
    "arguments": (lambda d: module(d, "head")["layer"]["arguments"].update(device="cuda"), "takes ['in_features'"),
    "huge": (lambda d: module(d, "head")["layer"]["arguments"].update(in_features=10**12), "where the layer has a"),
    "negative": (lambda d: module(d, "head")["layer"]["arguments"].update(in_features=-1), "cannot be built from"),
    "nest": (
        lambda d: module(d, "body.2")["layer"]["arguments"].update(
            activation={"class": "os", "arguments": {}, "absent": []}
        ),
        "unknown layer class 'os'",
    ),
    "no layer": (lambda d: module(d, "body.2")["layer"]["arguments"].update(activation=3), "is no layer"),
    "absent": (lambda d: module(d, "head")["layer"].update(absent=["forward"]), "has no tensor 'forward'"),
    "unlisted": (lambda d: d["tensors"].remove(tensor(d, "head.weight")), "the tensor 'head.weight' is missing"),
    "listed twice": (lambda d: d["tensors"].append(tensor(d, "scale")), "'scale' is missing, or listed twice"),
    "alias": (lambda d: tensor(d, "second.weight").update(same_as="nothing"), "'second.weight' is missing"),
    "kind": (lambda d: tensor(d, "head.weight").update(kind="buffer"), "cannot be a 'buffer'"),
    "taken": (lambda d: tensor(d, "passing").update(name="train", kind="parameter", same_as="scale"), "is taken"),
    "format": (lambda d: tensor(d, "scale").update(memory_format="torch.channels_last"), "cannot be 'torch.channels"),
    "grad": (lambda d: tensor(d, "body.2.mask").update(requires_grad=True), "cannot require gradients"),
}


@pytest.mark.parametrize("case", HOSTILE_GRAPHS)
def test_hostile_graphs_are_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    change, reason = HOSTILE_GRAPHS[case]
    told = hostile(tmp_path, lambda document, _: change(document))
    assert told.startswith(f"cannot load {tmp_path / 'net.rmfx'}: ") and reason in told
    assert os.listdir(tmp_path) == ["net.rmfx"], "loading ran something"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("scale"), "'scale' is missing"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "'more' is no part of the network"),
        (lambda tensors: tensors.update({"head.weight": torch.ones(8, 5)}), "torch.float32 of shape (8, 5), where"),
        (lambda tensors: tensors.update({"head.bias": torch.ones(5).int()}), "is a torch.int32 of shape"),
        (lambda tensors: tensors.update(scale=torch.ones(5).int()), "'scale' of torch.int32 cannot require gradients"),
    ],
    ids=["missing", "more", "shape", "dtype", "integer"],
)
def test_tensors_that_do_not_fit(change: Callable[[dict[str, Tensor]], Any], reason: str, tmp_path: Path) -> None:
    assert reason in hostile(tmp_path, lambda _, tensors: change(tensors))


def test_malformed_carried_norms(tmp_path: Path) -> None:
    path = save(everything()[0], tmp_path / "net.rmfx")
    content, tensors = archive.read(path)
    for norms in ({"body.1": ["x"]}, {"nowhere": [1]}):
        archive.write(path, {**content, "report": {**content["report"], "carried_norms": norms}}, tensors)
        assert "is malformed" in complaint(path)


@pytest.mark.parametrize("report", [3, {}, {"entries": [1], "totals": {}}, {"entries": 0}], ids=str)
def test_a_malformed_report(report: object, tmp_path: Path) -> None:
    path = save(everything()[0], tmp_path / "net.rmfx")
    content, tensors = archive.read(path)
    archive.write(path, {**content, "report": report}, tensors)
    assert "its report is malformed" in complaint(path)


@pytest.mark.parametrize("content", [None, 3, [], {}, {"graph": [], "report": None}, deep(500)])
def test_content_that_is_no_network(content: Any, tmp_path: Path) -> None:
    path = archive.write(tmp_path / "net.rmfx", content, {})
    assert "has the fields" in complaint(path) or "cannot be []" in complaint(path)


JUNK = [
    *(None, True, -1, 0, 10**30, 1.5, "", "x", "self", "add", "graph", "__class__", "é\0", HACK, [], {}, [[]]),
    *({"node": "cat"}, {"tuple": [1]}, {"dict": [[1, 2]]}, {"slice": [1]}, {"float": "nan"}, {"device": "cuda:0"}),
]


def places(value: object, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(place for key, item in items for place in places(item, (*prefix, key)))]


def test_random_changes_never_break_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # slow, and nothing here outlives a crash
    path = save(everything()[0], tmp_path / "net.rmfx")
    content, tensors = archive.read(path)
    spots = [place for place in places(content) if len(place) > 1]
    dice, outcomes = random.Random(0), {"loaded": 0, "refused": 0}
    for _ in range(300):
        changed = copy.deepcopy(content)
        owner, spot = changed, dice.choice(spots)
        for key in spot[:-1]:
            owner = owner[key]
        owner[spot[-1]] = copy.deepcopy(dice.choice(JUNK))
        archive.write(path, changed, tensors)
        try:
            outcomes["loaded"] += isinstance(load(path), fx.GraphModule)
        except FileFormatError:
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == 300 and outcomes["refused"] > 200
    assert os.listdir(tmp_path) == ["net.rmfx"]
