"""Saving and loading: bit for bit the same, or refused; whatever stands in the file, nothing runs."""

from __future__ import annotations

import copy
import os
import pickle
import random
import resource
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

import rmfx
from rmfx.errors import FileFormatError
from rmfx.files import archive
from rmfx.files.serialise import load, save
from rmfx.front.tracer import Tracer
from rmfx.modules import ChannelAffine, ChannelClamp, MaskedActivation, SizeGuard
from rmfx.report import META_KEY, Entry, Report, Totals

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Pair = namedtuple("Pair", "first second")


class Everything(nn.Module):
    """One of each thing that a file must keep."""

    def __init__(self) -> None:
        super().__init__()
        mask = torch.arange(8) % 2 == 0
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            MaskedActivation(nn.SiLU(), mask),
            MaskedActivation(nn.PReLU(8, 0.1), ~mask),
            ChannelClamp(torch.full((8,), -torch.inf), torch.linspace(1, 8, 8)),
            ChannelAffine(torch.rand(8), torch.rand(8)),
            ChannelAffine(torch.tensor(0.5)),
            SizeGuard((9, 7), "a test"),
        )
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.rand(5))
        self.register_buffer("passing", torch.rand(5), persistent=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Any]:
        x = self.body(x)
        x = self.second(self.first(x) + x)
        pooled = torch.flatten(x.mean((2, 3), keepdim=True), 1).clamp(-float("inf"), 1e30)
        z = self.head(pooled) * self.scale + self.passing
        rows = x.contiguous(memory_format=torch.channels_last)[..., None].to(torch.float64)
        return {"z": z, "rest": (rows[:, ::2], [torch.cat([z, z], dim=1), x.shape[2]])}


def traced(model: nn.Module) -> fx.GraphModule:
    model.eval()
    return fx.GraphModule(model, Tracer().trace(model), type(model).__name__)


def everything() -> tuple[fx.GraphModule, Tensor]:
    network = traced(Everything())
    network.register_buffer("passing", network.passing, persistent=False)  # fx makes every buffer persistent
    network.first.to(memory_format=torch.channels_last)
    network.head.bias.requires_grad_(False)
    entry = Entry("a", "add", "identity", "removed", carried_taps=(("w", (0, 1)),), size_conditions=("even",))
    norms = {"body.1": (2, 3)}
    report = Report((entry,), Totals(3, 4, 5, 6), parameter_map={"a": ("b",)}, notes=("n",), carried_norms=norms)
    network.meta[META_KEY] = report
    return network, torch.randn(2, 3, 9, 7) * 8


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal in every bit: tells -0.0 from 0.0, and finds a NaN equal to itself."""
    if first.dtype != second.dtype or first.shape != second.shape or first.stride() != second.stride():
        return False
    bits = BITS[first.element_size()]
    return torch.equal(first.contiguous().view(bits), second.contiguous().view(bits))


def state(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))


def steps(network: fx.GraphModule) -> list[tuple[Any, ...]]:
    """The graph without type annotations, which are not kept."""
    return [(n.op, n.name, n.target, str(n.args), str(n.kwargs), n.meta.get("place")) for n in network.graph.nodes]


def assert_same_network(before: fx.GraphModule, after: fx.GraphModule) -> None:
    assert steps(after) == steps(before) and type(after).__name__ == type(before).__name__
    assert list(after.state_dict()) == list(before.state_dict())
    mine, theirs = state(before), state(after)
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert same_bits(tensor, theirs[name]), name
        assert type(tensor) is type(theirs[name]) and tensor.requires_grad == theirs[name].requires_grad, name
    modes = {name: module.training for name, module in before.named_modules()}
    assert modes == {name: module.training for name, module in after.named_modules()}


def assert_same_outputs(before: nn.Module, after: nn.Module, *inputs: Tensor) -> None:
    first, second = pytree.tree_flatten(before(*inputs)), pytree.tree_flatten(after(*inputs))
    assert first[1] == second[1]
    pairs = list(zip(first[0], second[0], strict=True))
    assert pairs and all(same_bits(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


# -- round trips -------------------------------------------------------------------------------------------------------


def test_everything_comes_back(tmp_path: Path) -> None:
    network, x = everything()
    path = save(network, tmp_path / "net.rmfx")
    loaded = load(path)
    assert path == tmp_path / "net.rmfx" and os.listdir(tmp_path) == ["net.rmfx"]
    assert_same_network(network, loaded)
    assert_same_outputs(network, loaded, x)
    assert loaded.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert loaded.first.weight.stride() != loaded.head.weight.stride() and loaded.second.weight is loaded.first.weight
    assert not loaded.head.bias.requires_grad and loaded.head.weight.requires_grad
    assert "passing" not in loaded.state_dict()
    assert rmfx.report(loaded) == rmfx.report(network)
    assert rmfx.report(loaded).carried_norms == {"body.1": (2, 3)}


def test_a_loaded_network_saves_to_the_same_file(tmp_path: Path) -> None:
    network, _ = everything()
    first = save(network, tmp_path / "a.rmfx").read_bytes()
    assert save(load(tmp_path / "a.rmfx"), tmp_path / "b.rmfx").read_bytes() == first


def test_a_loaded_network_is_a_whole_network(tmp_path: Path) -> None:
    network, x = everything()
    loaded = load(save(network, tmp_path / "net.rmfx"))
    assert_same_outputs(network, copy.deepcopy(loaded), x)
    assert_same_outputs(network, pickle.loads(pickle.dumps(loaded)), x)
    loaded(x)["z"].sum().backward()
    assert loaded.head.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_special_values_keep_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    network = traced(nn.Sequential(nn.Conv2d(2, 4, (1, 3), padding="same", padding_mode="reflect"))).to(dtype)
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 5e-324, 1e-40, 1e-7], dtype=dtype)
    network.get_submodule("0").weight.data.view(-1)[:8] = special
    assert_same_network(network, load(save(network, tmp_path / "net.rmfx")))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv1d(3, 4, 3, bias=False), nn.PReLU(4)), (2, 3, 9)),
        (nn.Sequential(nn.Conv3d(3, 4, 3), nn.Hardtanh(-2, 3), nn.MaxPool3d(2)), (2, 3, 5, 6, 7)),
        (nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)), (2, 3)),
        (nn.Sequential(nn.ReLU()), (2, 3)),
    ],
)
def test_any_number_of_dimensions(model: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    network = traced(model)
    loaded = load(save(network, tmp_path / "net.rmfx"))
    assert_same_network(network, loaded)
    assert_same_outputs(network, loaded, torch.randn(shape) * 8)


def test_five_dimensional_channels_last(tmp_path: Path) -> None:
    network = traced(nn.Sequential(nn.Conv3d(3, 4, 3))).to(memory_format=torch.channels_last_3d)
    assert_same_network(network, load(save(network, tmp_path / "net.rmfx")))


def test_a_non_contiguous_weight_keeps_its_values(tmp_path: Path) -> None:
    network = traced(nn.Sequential(nn.Linear(4, 4)))
    linear = network.get_submodule("0")
    linear.weight = nn.Parameter(torch.rand(4, 4).t())
    loaded = load(save(network, tmp_path / "net.rmfx"))
    assert torch.equal(loaded.get_submodule("0").weight, linear.weight)


def test_two_views_of_one_memory_are_saved_apart(tmp_path: Path) -> None:
    network = traced(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    block = torch.rand(2, 2, 2)
    for index in (0, 1):
        network.get_submodule(str(index)).weight = nn.Parameter(block[index])
    assert_same_network(network, load(save(network, tmp_path / "net.rmfx")))


def test_the_mode_of_every_module_comes_back(tmp_path: Path) -> None:
    network, _ = everything()
    network.train()
    network.body.get_submodule("1").eval()
    assert_same_network(network, load(save(network, tmp_path / "net.rmfx")))


class Nested(nn.Module):
    def forward(self, pair: dict[str, list[Tensor]], flag: bool) -> list[Tensor]:
        return [pair["a"][0] + pair["a"][1] if flag else pair["a"][0]]


def test_nested_inputs_come_back(tmp_path: Path) -> None:
    example = {"pair": {"a": [fx.PH, fx.PH]}, "flag": True}
    network = fx.symbolic_trace(Nested().eval(), concrete_args=example)
    loaded = load(save(network, tmp_path / "net.rmfx"))
    inputs = {"a": [torch.randn(2, 3), torch.randn(2, 3)]}
    assert loaded.code == network.code
    assert torch.equal(loaded(inputs, True)[0], inputs["a"][0] + inputs["a"][1])


@pytest.mark.parametrize("name", ["basic_projection", "inverted_relu6", "inverted_hardswish", "resnext", "mlp"])
def test_converted_networks_come_back(name: str, tmp_path: Path) -> None:
    model, x = nets.build(name)
    converted = rmfx.convert(model, x)
    loaded = load(save(converted, tmp_path / "net.rmfx"))
    assert_same_network(converted, loaded)
    assert_same_outputs(converted, loaded, x)
    assert rmfx.report(loaded) == rmfx.report(converted)


def test_a_training_form_can_be_calibrated_after_loading(tmp_path: Path) -> None:
    model, x = nets.build("basic_identity")
    converted = rmfx.convert(model, x, keep_bn=True)
    loaded = load(save(converted, tmp_path / "net.rmfx"))
    for network in (converted, loaded):
        rmfx.calibrate(network, [x])
    assert_same_network(converted, loaded)


def test_loading_neither_draws_random_numbers_nor_keeps_the_file(tmp_path: Path) -> None:
    network, x = everything()
    path = save(network, tmp_path / "net.rmfx")
    before = torch.get_rng_state()
    loaded = load(path)
    assert torch.equal(torch.get_rng_state(), before)
    path.write_bytes(b"")
    assert_same_outputs(network, loaded, x)


# -- what cannot be saved ----------------------------------------------------------------------------------------------


def refusal(network: Any, path: Path) -> str:
    with pytest.raises(FileFormatError) as caught:
        save(network, path)
    assert not path.exists(), "a refused network leaves no file"
    return str(caught.value)


def chain(*modules: nn.Module) -> fx.GraphModule:
    return traced(nn.Sequential(*modules))


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.poisson(x)


class Keeps(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.inner = nn.ReLU()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return self.inner(x), self.value


def test_an_unknown_function_is_named_with_its_node(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU(), Unknown())
    told = refusal(traced(model), tmp_path / "net.rmfx")
    assert told.startswith("cannot be saved: node 'poisson' (in module '1'): calls ")
    assert told.endswith("poisson, which is no function of the file format")


def test_an_unknown_layer_is_named(tmp_path: Path) -> None:
    told = refusal(chain(nn.ReLU(), nn.LSTM(2, 2)), tmp_path / "net.rmfx")
    assert told == "cannot be saved: module '1': torch.nn.modules.rnn.LSTM is no layer of the file format"


def test_a_subclass_is_not_its_base(tmp_path: Path) -> None:
    class Louder(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    network = chain(nn.ReLU())
    network.add_module("0", Louder())
    assert "Louder is no layer of the file format" in refusal(network, tmp_path / "net.rmfx")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.register_forward_hook(lambda *_: None), "was changed after its construction: _forward_hooks"),
        (lambda m: setattr(m, "padding", (2, 2)), "was changed after its construction: _reversed_padding"),
        (lambda m: setattr(m, "forward", lambda x: x), "was changed after its construction: forward"),
        (lambda m: m.register_buffer("more", torch.ones(1)), "has parts that its constructor does not make"),
        (lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()), "is no layer of the file format"),
        (lambda m: setattr(m, "weight", nn.Parameter(torch.empty(4, 3, 3, 3, device="meta"))), "has no plain values"),
        (
            lambda m: setattr(m, "weight", nn.Parameter(torch.rand(4, 3, 3, 2))),
            "'0.weight' is a torch.float32 of shape",
        ),
    ],
    ids=["hook", "attribute", "method", "buffer", "parametrization", "meta", "shape"],
)
def test_a_tampered_layer_is_refused(change: Callable[[nn.Module], Any], reason: str, tmp_path: Path) -> None:
    network = chain(nn.Conv2d(3, 4, 3, padding=1))
    change(network.get_submodule("0"))
    assert reason in refusal(network, tmp_path / "net.rmfx")


@pytest.mark.parametrize("value", [Pair(1, 2), torch.Generator(), 1j], ids=["namedtuple", "object", "complex"])
def test_values_without_json_are_refused(value: object, tmp_path: Path) -> None:
    network = chain(nn.ReLU())
    output = next(reversed(network.graph.nodes))
    output.args = ((output.args[0], 0),)
    if isinstance(value, torch.Generator):
        next(iter(network.graph.nodes)).next.kwargs = {"generator": value}
    else:
        output.args = ((output.args[0], value),)
    told = refusal(network, tmp_path / "net.rmfx")
    assert "cannot be saved: node '" in told and "has no JSON form" in told


def test_hooks_on_the_network_are_refused(tmp_path: Path) -> None:
    network = chain(nn.ReLU())
    network.register_forward_hook(lambda *_: None)
    assert "the network has hooks" in refusal(network, tmp_path / "net.rmfx")


def test_only_graph_modules_are_saved(tmp_path: Path) -> None:
    assert "ReLU is no torch.fx.GraphModule; convert first" in refusal(nn.ReLU(), tmp_path / "net.rmfx")


# -- writing is all or nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing/net.rmfx", "there is no folder"),
        (".", "it is a folder; give the name of a file"),
        ("/proc/net.rmfx", "cannot write /proc/net.rmfx"),
        ("a\0b", "is no path"),
    ],
)
def test_a_path_that_cannot_be_written(path: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=reason):
        save(everything()[0], os.path.join(tmp_path, path))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "net.rmfx"
    save(everything()[0], path)
    old = path.read_bytes()
    large = chain(nn.Linear(700, 700))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # writing past it fails like a full disk
        with pytest.raises(FileFormatError, match="what was there before is unchanged"):
            save(large, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["net.rmfx"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_the_old_file(
    interruption: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.rmfx"
    save(everything()[0], path)
    old = path.read_bytes()

    def interrupted(tensors: object, target: Path, metadata: object) -> None:
        target.write_bytes(b"half")
        raise interruption

    monkeypatch.setattr(archive, "save_file", interrupted)
    with pytest.raises(interruption):
        save(chain(nn.ReLU()), path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["net.rmfx"]


def test_a_symbolic_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "net.rmfx"
    link.symlink_to(tmp_path / "real" / "net.rmfx")
    save(everything()[0], link)
    assert link.is_symlink() and (tmp_path / "real" / "net.rmfx").is_file()
    assert steps(load(link)) == steps(everything()[0])


# -- damaged and hostile files -----------------------------------------------------------------------------------------


def complaint(path: Path) -> str:
    with pytest.raises(FileFormatError) as caught:
        load(path)
    return str(caught.value)


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "net.rmfx"
    assert "there is no such file" in complaint(path)
    assert "there is no such file" in complaint(tmp_path)
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


def test_a_saved_file_is_as_readable_as_any_new_one(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    network, _ = everything()
    assert save(network, tmp_path / "net.rmfx").stat().st_mode == ordinary.stat().st_mode
