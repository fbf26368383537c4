"""The options of rmfx.convert: what to convert, how far it may grow, what to compose, at which sizes it holds."""

from __future__ import annotations

import pytest
import torch
from front import Lambda, hostile, operations
from nets import Residual, build, conv
from oracle import assert_equivalent
from torch import nn

import rmfx
from rmfx import Entry, RmfxError
from rmfx.hostile import randomise
from rmfx.modules import SizeGuard

PLACES = ("1.0", "1.1", "1.2")  # of NETS["basic_chain"]
NODES = ("add", "add_1", "add_2")


def statuses(converted: object) -> list[str]:
    return [entry.status for entry in rmfx.report(converted).entries]  # type: ignore[arg-type]


# -- policy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2], [0, 1, 2], []], ids=str)
@pytest.mark.parametrize("names", [PLACES, NODES], ids=["places", "nodes"])
@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_a_list_of_places(wanted: list[int], names: tuple[str, ...], kind: type) -> None:
    model, x = build("basic_chain")
    converted = rmfx.convert(model, policy=kind(names[i] for i in wanted))
    assert statuses(converted) == ["removed" if i in wanted else "kept" for i in range(3)]
    assert operations(converted).count("add") == 3 - len(wanted)
    assert_equivalent(model, converted, x)


def test_what_is_kept_says_why_and_what_it_would_cost() -> None:
    model, x = build("basic_chain")
    entries = rmfx.report(rmfx.convert(model, x, policy=["1.1"])).entries
    full = rmfx.report(rmfx.convert(model, x)).entries
    assert [entry.reason for entry in entries] == ["not asked for by policy", None, "not asked for by policy"]
    for entry, other in zip(entries, full, strict=True):
        assert (entry.carrier, entry.macs_after, entry.params_after) == (
            other.carrier,
            other.macs_after,
            other.params_after,
        )


@pytest.mark.parametrize("names", [["1.3"], ["1.0", "layer1"], {"nope"}])
def test_an_unknown_place_is_an_error_that_lists_the_places(names: list[str]) -> None:
    model, _ = build("basic_chain")
    unknown = sorted(set(names) - set(PLACES))[0]
    message = f"policy names '{unknown}', where no residual sum stands; there are: 1.0, 1.1, 1.2"
    for function in (rmfx.convert, rmfx.explain):
        with pytest.raises(RmfxError) as error:
            function(model, policy=names)
        assert str(error.value) == message


def test_an_unknown_place_where_there_is_none() -> None:
    with pytest.raises(RmfxError, match="there are: none$"):
        rmfx.convert(nn.Sequential(conv(3, 4), nn.ReLU()).eval(), policy=["layer1"])


def test_a_callable_sees_every_entry_and_decides() -> None:
    model, x = build("basic_chain")
    seen: list[Entry] = []

    def cheap(entry: Entry) -> bool:
        seen.append(entry)
        assert entry.macs_before is not None and entry.macs_after is not None
        return entry.macs_after < 1.9 * entry.macs_before

    converted = rmfx.convert(model, x, policy=cheap)
    assert statuses(converted) == ["kept", "removed", "kept"]
    assert [(entry.place, entry.node, entry.kind) for entry in seen] == [
        ("1.0", "add", "identity"),
        ("1.1", "add_1", "projection"),
        ("1.2", "add_2", "identity"),
    ]
    assert_equivalent(model, converted, x)


def test_a_policy_decides_on_linear_branches_too() -> None:
    model, x = build("repvgg")
    converted = rmfx.convert(model, x, policy=["add_1"])
    reasons = [entry.reason for entry in rmfx.report(converted).entries]
    assert statuses(converted) == ["kept", "kept"]
    assert reasons == ["not asked for by policy", "not asked for by policy (it takes 1 with it)"]
    assert_equivalent(model, converted, x)


def test_a_policy_that_asks_for_an_inner_sum_alone() -> None:
    model, x = build("nested")
    for wanted, statuses_wanted in (
        (["add"], ["removed", "kept"]),
        (["add", "add_1"], ["removed"] * 2),
        ([], ["kept"] * 2),
    ):
        converted = rmfx.convert(model, x, policy=wanted)
        assert statuses(converted) == statuses_wanted
        assert_equivalent(model, converted, x)


def test_statuses_are_told_apart() -> None:
    model = nn.Sequential(
        *(
            Residual(nn.Sequential(conv(4, 4), middle, conv(4, 4)))
            for middle in (nn.ReLU(), nn.GELU(), nn.GroupNorm(2, 4))
        )
    )
    x = hostile(2, 4, 8, 8)
    randomise(model.double(), x / 8)
    converted = rmfx.convert(model, x, policy=lambda entry: entry.place == "0")
    report = rmfx.report(converted)
    assert statuses(converted) == ["removed", "kept", "refused"]
    assert [report.count(status) for status in ("removed", "kept", "refused")] == [1, 1, 1]
    assert [entry.reason is None for entry in report.entries] == [True, False, False]
    assert_equivalent(model, converted, x)


# -- max_growth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(("limit", "removed"), [(1, 0), (1.5, 0), (1.7, 1), (1.99, 1), (2.0, 3), (3, 3), (1e9, 3)])
def test_max_growth(limit: float, removed: int, sized: bool) -> None:
    model, x = build("basic_chain")
    converted = rmfx.convert(model, x if sized else None, max_growth=limit)
    assert statuses(converted).count("removed") == removed
    for entry in rmfx.report(converted).entries:
        if entry.status == "kept":
            factor = "1.67" if entry.place == "1.1" else "2.00"
            assert entry.reason == f"MACs would grow {factor} times, more than max_growth={limit:g}"
    assert_equivalent(model, converted, x)


def test_max_growth_and_policy_together() -> None:
    model, x = build("basic_chain")
    converted = rmfx.convert(model, x, max_growth=1.8, policy=["1.0", "1.1"])
    reasons = [entry.reason for entry in rmfx.report(converted).entries]
    assert reasons == [
        "MACs would grow 2.00 times, more than max_growth=1.8",
        None,
        "MACs would grow 2.00 times, more than max_growth=1.8",
    ]


# -- fuse -------------------------------------------------------------------------------------------------------------


def narrowing() -> nn.Module:
    """Two 1x1 convs that compose cheaply, then two layers that only compose dearly."""
    layers = (conv(4, 8, 1), conv(8, 4, 1), nn.ReLU(), conv(4, 1), conv(1, 8, 1))
    return randomise(nn.Sequential(*layers).double(), hostile(2, 4, 8, 8) / 8)


@pytest.mark.parametrize(
    ("fuse", "layers"),
    [
        ("always", ["Conv2d", "ReLU", "Conv2d"]),
        ("cheaper", ["Conv2d", "ReLU", "Conv2d", "Conv2d"]),
        ("never", ["Conv2d", "Conv2d", "ReLU", "Conv2d", "Conv2d"]),
    ],
)
def test_fuse(fuse: str, layers: list[str]) -> None:
    model = narrowing()
    converted = rmfx.convert(model, fuse=fuse)
    assert operations(converted) == layers
    assert_equivalent(model, converted, hostile(2, 4, 8, 8))


def test_the_report_says_what_was_not_fused() -> None:
    lines = {line.name: line for line in rmfx.report(rmfx.convert(narrowing())).passes}
    assert lines["fuse_convs"].applied == 1
    ((place, reason),) = lines["fuse_convs"].refused
    assert place and reason == "one layer would take 6.55 times the MACs of the two"


# -- size conditions --------------------------------------------------------------------------------------------------


def even_only() -> nn.Module:
    """A 4x4 conv of stride 2 beside a 1x1 of stride 2: their sizes agree at even inputs only."""
    branch = nn.Sequential(nn.Conv2d(4, 6, 4, 2, 1), nn.ReLU(), conv(6, 6))
    return randomise(
        nn.Sequential(conv(3, 4), Residual(branch, conv(4, 6, 1, 2))).double(), torch.randn(2, 3, 8, 8).double()
    )


def test_without_sizes_it_is_refused() -> None:
    converted = rmfx.convert(even_only())
    assert statuses(converted) == ["refused"]
    assert "changes the size in a way that not every branch follows" in (rmfx.report(converted).entries[0].reason or "")
    assert not any(isinstance(module, SizeGuard) for module in converted.modules())


def test_with_sizes_it_is_removed_and_guarded() -> None:
    model, x = even_only(), hostile(2, 3, 8, 8)
    converted = rmfx.convert(model, x)
    assert statuses(converted) == ["removed"] and operations(converted)[0] == "SizeGuard"
    assert_equivalent(model, converted, x)
    assert_equivalent(model, converted, hostile(5, 3, 8, 8))
    (entry,) = rmfx.report(converted).entries
    (condition,) = entry.size_conditions
    assert "(8, 8)" in condition and condition in str(rmfx.report(converted))
    assert entry.size_conditions == rmfx.explain(model, x).entries[0].size_conditions


@pytest.mark.parametrize("size", [(10, 8), (9, 9), (8, 7), (16, 16)])
def test_another_size_is_an_error(size: tuple[int, int]) -> None:
    converted = rmfx.convert(even_only(), hostile(2, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"converted for spatial size \(8, 8\), got .*Convert again with example inputs"
    ):
        converted(hostile(2, 3, *size))


def test_the_condition_survives_a_second_conversion_and_verification() -> None:
    model, x = even_only(), hostile(2, 3, 8, 8)
    converted = rmfx.convert(rmfx.convert(model, x))
    assert operations(converted).count("SizeGuard") == 1
    with pytest.raises(ValueError, match="converted for spatial size"):
        converted(hostile(2, 3, 9, 9))
    assert {shape[2:] for shape in rmfx.verify(model, converted, x).sizes} == {(8, 8)}


class Two(nn.Module):
    """Two images of different sizes, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.net = even_only()

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.net(x) * y.mean((2, 3), keepdim=True)[:, :1] * z.sum()


def test_every_image_is_guarded() -> None:
    x, y, z = hostile(2, 3, 8, 8), hostile(2, 5, 6, 7), hostile(2, 4)
    converted = rmfx.convert(Two().eval(), (x, y, z))
    assert [m.sizes for m in converted.modules() if isinstance(m, SizeGuard)] == [(8, 8), (6, 7)]
    with pytest.raises(ValueError, match=r"spatial size \(6, 7\), got \(6, 6\)"):
        converted(x, y[..., :6], z)


def test_sizes_that_always_agree_need_no_guard() -> None:
    model, x = build("basic_projection")
    converted = rmfx.convert(model, x)
    assert rmfx.report(converted).entries[0].size_conditions == ()
    assert not any(isinstance(module, SizeGuard) for module in converted.modules())


# -- concat -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concat", [False, True])
def test_concat_skips_go_when_asked_for(concat: bool) -> None:
    model = Lambda(lambda m, x: torch.cat((m.b(m.a(x).relu()), x), 1), a=conv(4, 6), b=conv(6, 3))
    x = hostile(2, 4, 7, 9)
    randomise(model.double(), x / 8)
    converted = rmfx.convert(model, x, concat=concat)
    assert ("cat" in operations(converted)) != concat
    assert_equivalent(model, converted, hostile(3, 4, 8, 8))
