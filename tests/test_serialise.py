"""Saving and loading: bit for bit the same, or refused; whatever stands in the file, nothing runs."""

from __future__ import annotations

import copy
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from saved import (
    Pair,
    assert_same_network,
    assert_same_outputs,
    everything,
    steps,
    traced,
)
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import rmfx
from rmfx.errors import FileFormatError
from rmfx.files import archive
from rmfx.files.serialise import load, save

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
        ("a" * 256, "File name too long"),
    ],
)
def test_a_path_that_cannot_be_written(path: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=reason):
        save(everything()[0], os.path.join(tmp_path, path))
    assert os.listdir(tmp_path) == []


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(FileFormatError, match="it is a pipe or a device and no file"):
            save(everything()[0], tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(FileFormatError, match="Too many levels of symbolic links"):
        save(everything()[0], tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    name = "日" * 85  # 255 bytes
    assert save(everything()[0], tmp_path / name).is_file() and os.listdir(tmp_path) == [name]


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


def test_a_file_replaced_while_it_is_read_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = chain(nn.Linear(3, 4)), chain(nn.Linear(3, 4), nn.Linear(4, 5))
    path, reopened = save(networks[0], tmp_path / "net.rmfx"), torch.UntypedStorage.from_file

    def another_writer(*arguments: Any, **options: Any) -> torch.UntypedStorage:
        save(networks[1], path)
        return reopened(*arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", another_writer)
    assert steps(load(path)) in [steps(network) for network in networks]


def test_a_saved_file_is_as_readable_as_any_new_one(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    network, _ = everything()
    assert save(network, tmp_path / "net.rmfx").stat().st_mode == ordinary.stat().st_mode
