"""Every layer of the file format is built again from its JSON; the lists of functions name what exists."""

from __future__ import annotations

import copy
import json
import math
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional

from rmfx.errors import FileFormatError
from rmfx.files import layer_json, vocabulary
from rmfx.files.layer_json import decode_layer, encode_layer
from rmfx.modules import (
    ChannelAffine,
    ChannelClamp,
    ChannelPad,
    ChannelsLast,
    ChannelSlice,
    Elementwise,
    FeatureNorm,
    MaskedActivation,
    SizeGuard,
)

MASK = torch.tensor([True, False, True])
NO_ARGUMENTS = "Identity Sigmoid LogSigmoid Tanh Tanhshrink Softsign Softmax2d"
IN_PLACE = "ReLU ReLU6 SELU SiLU Mish Hardswish Hardsigmoid"
ONE_NUMBER = "Softmax Softmin LogSoftmax GLU Softshrink Hardshrink ChannelShuffle PixelShuffle PixelUnshuffle"
PADS = "Zero Reflection Replication Circular"
DROPOUTS = "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"

EXAMPLES: list[nn.Module] = [
    *(getattr(nn, name)() for name in NO_ARGUMENTS.split()),
    *(getattr(nn, name)(inplace=flag) for name in IN_PLACE.split() for flag in (True, False)),
    *(getattr(nn, name)(2) for name in ONE_NUMBER.split()),
    *(getattr(nn, name)(0.25) for name in DROPOUTS.split()),
    *(getattr(nn, f"Conv{d}d")(4, 6, 3, stride=2, padding=1, dilation=2, groups=2) for d in (1, 2, 3)),
    nn.Conv2d(4, 6, (1, 3), padding="same", padding_mode="reflect", bias=False),
    *(getattr(nn, f"ConvTranspose{d}d")(4, 6, 3, 2, 1, output_padding=1, groups=2, bias=False) for d in (1, 2, 3)),
    *(getattr(nn, f"BatchNorm{d}d")(3, 1e-3, None, affine=d > 1, track_running_stats=d < 3) for d in (1, 2, 3)),
    *(getattr(nn, f"InstanceNorm{d}d")(3, affine=d > 1, track_running_stats=d < 3) for d in (1, 2, 3)),
    *(getattr(nn, f"MaxPool{d}d")(3, 2, 1, ceil_mode=True) for d in (1, 2, 3)),
    *(getattr(nn, f"AvgPool{d}d")(3, 2, 1, count_include_pad=False) for d in (1, 2, 3)),
    *(getattr(nn, f"Adaptive{kind}Pool{d}d")(2) for kind in ("Avg", "Max") for d in (1, 2, 3)),
    nn.AdaptiveAvgPool2d((1, None)),
    *(getattr(nn, f"LPPool{d}d")(2, 3) for d in (1, 2)),
    *(getattr(nn, f"{kind}Pad{d}d")(1) for kind in PADS.split() for d in (1, 2, 3)),
    *(getattr(nn, f"ConstantPad{d}d")(1, -math.inf) for d in (1, 2, 3)),
    nn.Linear(3, 4, bias=False),
    nn.Bilinear(2, 3, 4),
    nn.Embedding(5, 3, padding_idx=1),
    nn.MultiheadAttention(8, 2, bias=False, batch_first=True),
    nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
    nn.GroupNorm(2, 4, affine=False),
    nn.LayerNorm((4, 2), bias=False),
    nn.RMSNorm(4),
    nn.LocalResponseNorm(3, k=2.0),
    nn.Upsample(scale_factor=(2.0, 1.5), mode="bilinear", align_corners=True),
    nn.UpsamplingNearest2d(scale_factor=2),
    nn.UpsamplingBilinear2d(size=(3, 4)),
    nn.Fold((4, 4), 2),
    nn.Unfold(2, dilation=2),
    nn.Flatten(0, -2),
    ChannelSlice(1, 2, -1),
    ChannelPad(0, 3),
    FeatureNorm(nn.BatchNorm1d(3, affine=False)),
    nn.Unflatten(1, (2, 2)),
    nn.Hardtanh(-2, 3),
    Elementwise("sin"),
    Elementwise("pow", 2.5),
    nn.LeakyReLU(0.3),
    nn.PReLU(3, 0.1),
    nn.RReLU(),
    nn.ELU(0.5),
    nn.CELU(0.5),
    nn.GELU("tanh"),
    nn.Softplus(2, 10),
    nn.Threshold(0.5, -1),
    ChannelAffine(torch.tensor(2.0)),
    ChannelAffine(torch.rand(3), torch.rand(3), -1),
    ChannelAffine(nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))),
    ChannelAffine(nn.Parameter(torch.rand(3))),
    ChannelAffine(torch.rand(3), nn.Parameter(torch.rand(3))),
    ChannelAffine(nn.Parameter(torch.rand(3)), torch.rand(3)),
    ChannelClamp(torch.zeros(3), torch.ones(3), -1),
    MaskedActivation(nn.PReLU(3), MASK),
    MaskedActivation(nn.GELU(), MASK, -1),
    SizeGuard((3, 4), "ceil_mode"),
    ChannelsLast(),
]


@pytest.mark.parametrize("layer", EXAMPLES, ids=lambda layer: type(layer).__name__)
def test_a_layer_is_built_again(layer: nn.Module) -> None:
    rebuilt = decode_layer(json.loads(json.dumps(encode_layer(layer))))
    assert type(rebuilt) is type(layer)
    state, empty = layer.state_dict(), rebuilt.state_dict()
    assert {name: value.shape for name, value in empty.items()} == {name: value.shape for name, value in state.items()}
    assert all(value.is_meta for value in empty.values()), "building takes no memory"
    filled = copy.deepcopy(rebuilt).to_empty(device="cpu")
    filled.load_state_dict(state)
    assert repr(filled) == repr(layer)


@pytest.mark.parametrize(("told", "kind"), [(None, "buffer"), (False, "buffer"), (True, "parameter")])
def test_files_that_say_of_both_whether_they_train(told: bool | None, kind: str) -> None:
    entry = encode_layer(ChannelAffine(torch.rand(3), torch.rand(3)))
    entry["arguments"] = {"channels": 3, "axis": 1} | ({} if told is None else {"trained": told})
    assert layer_json.slots(decode_layer(entry)) == {"weight": kind, "bias": kind}


@pytest.mark.parametrize("told", [["slope"], "weight", 3, [["weight"]]])
def test_what_trains_is_named(told: object) -> None:
    entry = encode_layer(ChannelAffine(torch.rand(3)))
    entry["arguments"] |= {"trained": told}
    with pytest.raises(FileFormatError, match="ChannelAffine cannot be built"):
        decode_layer(entry)


def test_every_layer_of_the_format_has_an_example() -> None:
    assert {type(layer) for layer in EXAMPLES} == set(layer_json._KINDS)


def test_layers_do_not_nest_without_end() -> None:
    entry = encode_layer(nn.ReLU())
    for _ in range(4):
        entry = {**encode_layer(MaskedActivation(nn.ReLU(), MASK)), "arguments": {"activation": entry}}
        entry["arguments"] |= {"channels": 3, "axis": 1}
    with pytest.raises(FileFormatError, match="not a layer"):
        decode_layer(entry)


@pytest.mark.parametrize(
    ("namespace", "prefix", "names"),
    [
        (operator, "operator", vocabulary._OPERATOR),
        (math, "math", vocabulary._MATH),
        (torch, "torch", vocabulary._TORCH),
        (functional, "torch.nn.functional", vocabulary._FUNCTIONAL),
    ],
)
def test_every_listed_function_exists(namespace: object, prefix: str, names: str) -> None:
    assert [vocabulary.FUNCTIONS[f"{prefix}.{name}"] for name in names.split()] == [
        getattr(namespace, name) for name in names.split()
    ]


def test_every_listed_method_exists_and_changes_nothing_in_place() -> None:
    assert [name for name in sorted(vocabulary.METHODS) if not callable(getattr(torch.Tensor, name))] == []
    names = [*vocabulary.METHODS, *vocabulary._TORCH.split(), *vocabulary._FUNCTIONAL.split()]
    assert [name for name in names if name.endswith("_")] == []
