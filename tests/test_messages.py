"""Bad input: every mistake of a caller gets a message that says what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from front import Lambda, operations
from nets import build, conv
from torch import nn

import rmfx
from rmfx import NormalFormError, RmfxError, TraceError, UnsupportedModelError
from rmfx.hostile import randomise

X = torch.zeros(2, 3, 8, 8)
FUNCTIONS = pytest.mark.parametrize("function", [rmfx.convert, rmfx.explain])


def small() -> nn.Module:
    return nn.Sequential(conv(3, 4), nn.ReLU()).eval()


def refused(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the RmfxError that ``function`` raises: one line, no traceback inside."""
    with pytest.raises(RmfxError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


# -- the model --------------------------------------------------------------------------------------------------------


@FUNCTIONS
def test_training_mode(function: Callable[..., Any]) -> None:
    message = refused(function, nn.Sequential(conv(3, 4)))
    assert message == (
        "the model is in training mode, and rmfx converts what a model computes in eval mode: call model.eval() first"
    )
    model = small()
    model[1].train()
    assert refused(function, model).startswith("1 (ReLU) is in training mode")
    assert function(model, keep_bn=True) is not None


@FUNCTIONS
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "rmfx converts a torch.nn.Module, but was given a builtins.int"),
        (None, "rmfx converts a torch.nn.Module, but was given a builtins.NoneType"),
        ("resnet18", "rmfx converts a torch.nn.Module, but was given a builtins.str"),
        (torch.relu, "rmfx converts a torch.nn.Module, but was given a"),
        (nn.ReLU, "rmfx converts a torch.nn.Module, but was given the class ReLU: build a model first, ReLU(...)"),
    ],
    ids=["number", "None", "name", "function", "class"],
)
def test_not_a_module(function: Callable[..., Any], model: object, message: str) -> None:
    assert refused(function, model).startswith(message)


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool])
def test_integer_weights(function: Callable[..., Any], dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(3, 1, 1).to(dtype), requires_grad=False)
    model = Lambda(lambda m, x: x * m.weight, weight=weight).eval()
    assert refused(function, model) == f"parameter weight is integer ({dtype}); only real floats convert"


@FUNCTIONS
def test_complex_weights(function: Callable[..., Any]) -> None:
    message = refused(function, nn.Linear(2, 2, dtype=torch.complex64).eval())
    assert message == "parameter weight is complex (torch.complex64); only real floats convert"


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Identity(), nn.Sequential(nn.Dropout(), nn.Identity())], ids=str)
@pytest.mark.parametrize("sized", [False, True])
def test_an_empty_network_stays_empty_and_says_so(model: nn.Module, sized: bool) -> None:
    converted = rmfx.convert(model.eval(), X if sized else None)
    assert operations(converted) == [] and not list(converted.children())
    assert torch.equal(converted(X + 1), X + 1)
    assert str(rmfx.report(converted)).startswith("no residual sums found")


@FUNCTIONS
@pytest.mark.parametrize("model", [nn.Module(), nn.ModuleList([nn.ReLU()]), nn.ModuleDict()])
def test_no_forward(function: Callable[..., Any], model: nn.Module) -> None:
    assert refused(function, model.eval()) == f"{type(model).__name__} has no forward method, so it computes nothing"


def test_a_norm_without_statistics_is_left_alone_with_its_reason() -> None:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()).eval()
    converted = rmfx.convert(model, X)
    assert operations(converted) == ["Conv2d", "BatchNorm2d", "ReLU"]
    (line,) = (line for line in rmfx.report(converted).passes if line.name == "fold_norm")
    ((place, reason),) = line.refused
    assert reason == "batch norm without running statistics normalises by the statistics of each batch"
    assert place == "_1"
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(model(x), converted(x))


def test_code_that_cannot_be_followed_names_file_and_line() -> None:
    model = Lambda(lambda m, x: x if x.sum() > 0 else -x).eval()
    message = refused(rmfx.convert, model)
    assert "test_messages.py:" in message and "x if x.sum() > 0 else -x" in message and "torch.fx.wrap" in message
    with pytest.raises(TraceError):
        rmfx.convert(model)


def test_writes_without_a_meaning_name_file_and_line() -> None:
    with pytest.raises(NormalFormError, match=r"test_messages.py:\d+.* write the out-of-place form"):
        rmfx.convert(Lambda(lambda m, x: (x[:, :1].mul_(2), x)[1]).eval())


@FUNCTIONS
def test_float8_weights_are_refused(function: Callable[..., Any]) -> None:
    assert "float8" in refused(function, nn.Linear(2, 2).to(torch.float8_e4m3fn).eval())


# -- example inputs ---------------------------------------------------------------------------------------------------


@FUNCTIONS
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            torch.zeros(2, 5, 8, 8),
            "(2, 5, 8, 8)): Given groups=1, weight of size [4, 3, 3, 3], expected input[2, 5, 8, 8]",
        ),
        (torch.zeros(2, 5), "(2, 5)): Expected 3D (unbatched) or 4D (batched) input to conv2d"),
        (torch.zeros(()), "()): "),
        (torch.zeros(0), "(0,)): "),
        ("image", "'image'): "),
        (7, "7): "),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit(function: Callable[..., Any], inputs: object, message: str) -> None:
    text = refused(function, small(), inputs)
    assert text.startswith("the model cannot be run on the example inputs (") and message in text


@FUNCTIONS
def test_the_number_and_names_of_inputs(function: Callable[..., Any]) -> None:
    assert refused(function, small(), (X, X)) == "2 example inputs were given, the network takes 1: ['input']"
    assert refused(function, small(), ()) == "no example input was given for 'input'"
    unknown = "the network has no further input named 'image': it takes ['input']"
    assert refused(function, small(), X, example_kwargs={"image": X}) == unknown
    assert refused(function, small(), example_kwargs={"image": X}) == unknown
    twice = "the network has no further input named 'input': it takes ['input']"
    assert refused(function, small(), X, example_kwargs={"input": X}) == twice


@pytest.mark.parametrize(
    "inputs", [np.zeros((2, 3, 64, 64)), {"input": torch.zeros(2, 3, 64, 64)}], ids=["numpy", "dict"]
)
def test_large_inputs_of_a_wrong_type_are_not_printed(inputs: object) -> None:
    assert len(refused(rmfx.convert, small(), inputs)) < 500


# -- options ----------------------------------------------------------------------------------------------------------


@FUNCTIONS
@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("carrier", "slide", "'auto', 'direct', 'masked', 'split', 'shift'"),
        ("carrier", None, "'auto', 'direct', 'masked', 'split', 'shift'"),
        ("downsample", "figure 2a", "'cheaper', 'conv', 'input'"),
        ("fuse", True, "'cheaper', 'always', 'never'"),
        ("policy", "some", "'all', 'auto' (or a plan, a callable, or a list of places)"),
        ("policy", "layer1.0", "'all', 'auto' (or a plan, a callable, or a list of places)"),
    ],
)
def test_choices(function: Callable[..., Any], option: str, value: object, choices: str) -> None:
    message = refused(function, small(), **{option: value})
    assert message == f"{option} must be one of {choices}, got {value!r}"


@FUNCTIONS
@pytest.mark.parametrize("limit", [0, -1, -0.5, float("nan"), float("-inf")])
def test_max_growth_is_positive(function: Callable[..., Any], limit: float) -> None:
    assert refused(function, small(), max_growth=limit) == f"max_growth must be a positive factor, got {limit!r}"


@pytest.mark.parametrize(("option", "value"), [("policy", None), ("policy", 3), ("max_growth", "2")])
def test_options_of_a_wrong_type(option: str, value: object) -> None:
    model, _ = build("basic_identity")
    assert option in refused(rmfx.convert, model, **{option: value})


def test_the_order_of_checks_is_options_then_model_then_inputs() -> None:
    bad = nn.Sequential(conv(3, 4))
    assert "carrier" in refused(rmfx.convert, bad, torch.zeros(1), carrier="none")
    assert "training mode" in refused(rmfx.convert, bad, torch.zeros(1))
    assert "example inputs" in refused(rmfx.convert, bad.eval(), torch.zeros(1))


def test_verification_needs_inputs() -> None:
    assert refused(rmfx.convert, small(), verify=True) == "verify=True needs example_inputs"


def test_verify_takes_modules() -> None:
    assert "torch.nn.Module" in refused(rmfx.verify, small(), 3, X)


# -- images without a batch -------------------------------------------------------------------------------------------


def basic() -> nn.Module:
    block = Lambda(lambda m, x: x + m.b(m.a(x).relu()), a=conv(4, 4), b=conv(4, 4))
    return randomise(block.double(), torch.randn(2, 4, 8, 8).double())


def test_images_without_a_batch_are_refused_where_the_example_shows_them() -> None:
    model, image = basic(), torch.randn(4, 8, 8).double()
    converted = rmfx.convert(model, image)
    (entry,) = rmfx.report(converted).entries
    assert entry.reason == "the layers take batched inputs of 4 dimensions, the example input gives 3"
    assert torch.equal(converted(image), model(image))


def test_images_without_a_batch_are_not_silently_wrong() -> None:
    model, image = basic(), torch.randn(4, 8, 8).double()
    assert torch.allclose(rmfx.convert(model)(image), model(image))


def test_all_errors_are_rmfx_errors() -> None:
    errors = [getattr(rmfx, name) for name in rmfx.__all__ if name.endswith("Error")]
    assert len(errors) >= 8 and all(issubclass(error, RmfxError) for error in errors)
    assert issubclass(UnsupportedModelError, RmfxError) and not issubclass(RmfxError, (ValueError, RuntimeError))
