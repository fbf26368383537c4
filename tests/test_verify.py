"""rmfx.verify: equal networks pass, and every mistake raises an error that names the place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from front import Lambda, hostile
from nets import NETS, build, conv
from torch import Tensor, fx, nn

import rmfx
from rmfx import RmfxError, UnsupportedModelError, Verification, VerificationError
from rmfx.algebra import kernels
from rmfx.hostile import randomise


def pair(name: str = "basic_chain", **options: Any) -> tuple[nn.Module, fx.GraphModule, Tensor]:
    model, x = build(name)
    return model, rmfx.convert(model, x, verify=False, **options), x


@pytest.mark.parametrize("name", NETS)
def test_equal_networks_pass_and_no_carried_tap_is_untested(name: str) -> None:
    model, converted, x = pair(name)
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    found = rmfx.verify(model, converted, x, probe=True)
    assert found.difference < 1e-14 and found.tolerance == 1e-12
    carried = [entry for entry in rmfx.report(converted).entries if entry.carrier]
    # the layers of an inner connection are laid out again by the outer one: its taps are no longer known
    inner = [entry.name for entry in carried if name in ("nested", "three_way") and not entry.carried_taps]
    assert list(found.untested) == inner and len(inner) == (name in ("nested", "three_way"))
    assert all(entry.carried_taps for entry in carried if entry.name not in inner)
    assert all(torch.equal(value, converted.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("carrier", ["masked", "split"])
def test_taps_of_every_carrier_are_seen(carrier: str) -> None:
    model, converted, x = pair("basic_signed", carrier=carrier)
    (entry,) = rmfx.report(converted).entries
    assert entry.carrier == carrier and len(entry.carried_taps) == 4
    for name, index in entry.carried_taps:
        assert abs(converted.get_parameter(name)[index].item()) == 1.0
    assert rmfx.verify(model, converted, x, probe=True).untested == ()


def test_a_dead_carried_channel_is_untested() -> None:
    model, x = build("basic_signed")
    with torch.no_grad():  # everything that is carried is zero
        model[0][1].weight.zero_()
        model[0][1].bias.zero_()
    converted = rmfx.convert(model, x)
    found = rmfx.verify(model, converted, x, probe=True)
    assert found.untested == ("1",) and "not exercised by these inputs: 1" in str(found)


# -- mistakes ---------------------------------------------------------------------------------------------------------

FIRST = {  # the first layer whose value both networks have, behind each layer of NETS["basic_chain"]
    "0.0": "0.0",
    "1.0.branch.0.0": "1.0.branch.1.0",
    "1.0.branch.1.0": "1.0.branch.1.0",
    "1.1.branch.0.0": "1.1.branch.1.0",
    "1.1.branch.1.0": "1.1.branch.1.0",
    "1.2.branch.0.0": "1.2.branch.1.0",
    "1.2.branch.1.0": "1.2.branch.1.0",
}


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("layer", FIRST)
def test_a_perturbed_weight_is_named(layer: str, part: str) -> None:
    model, converted, x = pair()
    with torch.no_grad():
        tensor = converted.get_parameter(f"{layer}.{part}").view(-1)
        tensor[tensor.abs().argmax()] *= 1 + 1e-6
    place = FIRST[layer].partition(".branch")[0].removesuffix(".0") if layer == "0.0" else layer.partition(".branch")[0]
    with pytest.raises(VerificationError, match=f"first at {FIRST[layer]} \\(in place '{place}'\\), by "):
        rmfx.verify(model, converted, x)


@pytest.mark.parametrize("layer", FIRST)
def test_a_dropped_bias(layer: str) -> None:
    model, converted, x = pair()
    converted.get_submodule(layer).bias = None
    with pytest.raises(VerificationError, match=f"the networks differ by .*first at {FIRST[layer]} "):
        rmfx.verify(model, converted, x)


@pytest.mark.parametrize("layer", ["1.branch.0.2", "1.branch.1.2"])
def test_a_dropped_clamp(layer: str) -> None:
    """A PReLU with slopes 0 and 1 where a per-channel clamp belongs loses the bound at 6."""
    model, converted, x = pair("inverted_relu6")
    clamp = converted.get_submodule(layer)
    prelu = nn.PReLU(len(clamp.low), dtype=torch.float64)
    with torch.no_grad():
        prelu.weight.copy_(clamp.low == -torch.inf)
    converted.set_submodule(layer, prelu.eval())
    with pytest.raises(VerificationError, match=r"first at 1\.branch\.2\.0 \(in place '1'\)"):
        rmfx.verify(model, converted, x)


def test_swapped_channels() -> None:
    model, converted, x = pair()
    layer = converted.get_submodule("1.2.branch.1.0")
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            tensor.copy_(tensor[[1, 0, *range(2, len(tensor))]])
    with pytest.raises(VerificationError, match="first at 1.2.branch.1.0"):
        rmfx.verify(model, converted, x)


@pytest.fixture
def slightly_wrong_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shift of every folded norm is wrong by 1e-6."""

    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        scale, shift = right(*args)
        return scale, shift + 1e-6

    right = kernels.norm_scale_shift
    monkeypatch.setattr(kernels, "norm_scale_shift", wrong)


def test_convert_verifies_where_inputs_are_given(slightly_wrong_norms: None) -> None:
    model, x = build("basic_chain")
    with pytest.raises(VerificationError, match="first at 0.0"):
        rmfx.convert(model, x)
    with pytest.raises(VerificationError, match="first at 0.0"):
        rmfx.convert(model, example_kwargs={"input": x}, verify=True)
    assert isinstance(rmfx.convert(model, x, verify=False), fx.GraphModule)
    assert isinstance(rmfx.convert(model), fx.GraphModule)


def test_convert_verifies_a_float32_model_as_closely(slightly_wrong_norms: None) -> None:
    model, x = build("basic_chain")
    with pytest.raises(VerificationError, match="first at 0.0"):
        rmfx.convert(model.float(), x.float())


def test_other_shapes_and_outputs_that_are_not_finite_differ() -> None:
    model, converted, x = pair()
    for change in (lambda y: y[..., 1:], lambda y: (y, y), lambda y: y * torch.inf, lambda y: y + torch.nan):
        wrong = rmfx.convert(nn.Sequential(converted, Lambda(lambda m, y, c=change: c(y))).eval())
        with pytest.raises(VerificationError, match="differ by inf"):
            rmfx.verify(model, wrong, x)


def test_outputs_that_are_partly_nan_hide_no_mistake() -> None:
    model = nn.Sequential(conv(3, 4), Lambda(lambda m, y: y.log())).double().eval()
    x = hostile(2, 3, 9, 7)
    assert bool(model(x).isnan().any()) and rmfx.verify(model, copy.deepcopy(model), x).difference == 0.0
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.get_parameter("0.weight").mul_(1 + 1e-9)
    with pytest.raises(VerificationError):
        rmfx.verify(model, wrong, x)


def test_outputs_that_are_nowhere_finite_cannot_be_compared() -> None:
    model = nn.Sequential(conv(3, 4), Lambda(lambda m, y: (y * 0).log())).double().eval()
    with pytest.raises(UnsupportedModelError, match="all outputs of the original are infinite or NaN"):
        rmfx.verify(model, model, hostile(2, 3, 9, 7))


def test_a_network_that_writes_into_its_input_is_compared_on_what_it_was_given() -> None:
    model = Lambda(lambda m, x: m.conv(x.sub_(0.5).mul_(2)), conv=conv(3, 4)).double().eval()
    x = hostile(2, 3, 9, 7)
    assert rmfx.verify(model, copy.deepcopy(model), x).difference == 0.0
    wrong = Lambda(lambda m, x: m.conv(x.sub_(0.5)), conv=model.conv).double().eval()
    with pytest.raises(VerificationError):
        rmfx.verify(model, wrong, x)


def chaotic(gain: float) -> nn.Module:
    """A network that multiplies rounding by about ``gain``."""
    return Lambda(lambda m, x: (m.conv(x) * gain).sin(), conv=conv(3, 4)).double().eval()


def test_where_rounding_drowns_a_comparison_smaller_inputs_are_compared() -> None:
    model, x = chaotic(1e11), hostile(2, 3, 9, 7)
    found = rmfx.verify(model, copy.deepcopy(model), x)
    assert found.tolerance <= 1e-2
    with pytest.raises(VerificationError):
        rmfx.verify(model, chaotic(1e11), x)
    with pytest.raises(UnsupportedModelError, match="a mistake could hide behind it"):
        rmfx.verify(chaotic(1e16), chaotic(1e16), x)


def test_constants_that_code_makes_are_those_that_were_traced() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        scale = torch.arange(1, 4).view(3, 1, 1) / 7.0
        x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        return x * scale + m.b(m.a(x * scale).relu()) * torch.tensor(0.2)

    torch.manual_seed(0)
    model, x = Lambda(forward, a=conv(3, 4), b=conv(4, 3)).eval(), hostile(2, 3, 9, 7).float()
    plain = rmfx.convert(model, x)
    assert rmfx.report(plain).count("removed") == 1
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-4)


def test_a_network_that_cannot_be_run_at_all_is_wrong() -> None:
    model, x = Lambda(lambda m, x: m.conv(x), conv=conv(3, 4)).eval(), hostile(2, 3, 9, 7)
    broken = Lambda(lambda m, x: m.conv(x).view(-1, 5), conv=model.conv).eval()
    with pytest.raises(VerificationError, match="the converted network cannot be run"):
        rmfx.verify(model, broken, x)


def test_outputs_of_another_type_differ() -> None:
    model, x = Lambda(lambda m, x: (m.conv(x) > 0) * 3, conv=conv(3, 4)).double().eval(), hostile(2, 3, 9, 7)
    assert rmfx.convert(model, x)(x).dtype == torch.int64
    other = Lambda(lambda m, x: (m.conv(x) > 0) * 3.0, conv=model.conv).double().eval()
    with pytest.raises(VerificationError, match=r"an output is of torch.float64, that of the original of torch.int64"):
        rmfx.verify(model, other, x)


def test_a_network_that_is_no_graph_is_compared_without_naming_layers() -> None:
    model, _, x = pair()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[0][0].weight.mul_(1.001)
    with pytest.raises(VerificationError, match="is no GraphModule, so the layer cannot be named"):
        rmfx.verify(model, wrong, x)
    assert rmfx.verify(model, copy.deepcopy(model), x).difference == 0.0


# -- what is tried ----------------------------------------------------------------------------------------------------


def test_even_and_odd_sizes_and_other_batches_are_tried() -> None:
    model, converted, x = pair()
    assert rmfx.verify(model, converted, x).sizes == ((2, 3, 8, 8), (3, 3, 8, 8), (2, 3, 9, 9), (2, 3, 10, 10))
    assert rmfx.verify(model, converted, x, quick=True).sizes == ((2, 3, 8, 8),)


def test_a_mistake_at_odd_sizes_only_is_found() -> None:
    """With ceil_mode, windows hang over the border at odd sizes; at even ones the pools are equal."""
    model = nn.AvgPool2d(2, ceil_mode=True).eval()
    wrong = nn.AvgPool2d(2).eval()
    x = hostile(2, 3, 8, 8)
    assert rmfx.verify(model, wrong, x, quick=True).difference == 0.0
    with pytest.raises(VerificationError, match=r"at input \(2, 3, 9, 9\)"):
        rmfx.verify(model, wrong, x)


def test_sizes_that_the_model_does_not_take_are_left_out() -> None:
    model = nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(4 * 64, 5))
    x = hostile(2, 3, 8, 8)
    converted = rmfx.convert(randomise(model.double(), x / 8), x)
    assert rmfx.verify(model, converted, x).sizes == ((2, 3, 8, 8), (3, 3, 8, 8))


def test_float32_errors_are_reported() -> None:
    model, converted, x = pair()
    found = rmfx.verify(model.float(), converted.float(), x.float())
    assert 1e-8 < found.float32_original < 1e-5 and 1e-8 < found.float32_converted < 1e-5
    assert 0.1 < found.float32_ratio < 4
    quick = rmfx.verify(model, converted, x, quick=True)
    assert (quick.float32_original, quick.float32_converted) == (0.0, 0.0)
    assert str(found).startswith("equal: float64 difference") and "of the original, 4 inputs" in str(found)


def test_the_tolerance_follows_the_precision_of_the_weights() -> None:
    """Weights rounded to float32 cannot agree to 1e-12; the noise floor of the model says what they can."""
    model, converted, x = pair()
    rounded = copy.deepcopy(model).float()
    single = rmfx.convert(rounded, x.float())
    found = rmfx.verify(rounded, single, x.float())
    assert 1e-12 < found.difference < found.tolerance < 1e-4
    with torch.no_grad():
        single.get_parameter("1.1.branch.1.0.weight").mul_(1 + 1e-3)
    with pytest.raises(VerificationError):
        rmfx.verify(rounded, single, x.float())
    assert rmfx.verify(model, converted, x).tolerance == 1e-12


def test_a_network_that_amplifies_noise_is_held_against_its_noise_floor() -> None:
    """A difference of two nearly equal numbers of size 1e6: rounding alone exceeds 1e-12."""
    model = Lambda(lambda m, x: (m.a(x) + 1e6) - m.b(x), a=conv(3, 3, 1), b=conv(3, 3, 1, bias=True)).double().eval()
    with torch.no_grad():
        model.b.weight.copy_(model.a.weight)
        model.b.bias.fill_(1e6)
        model.a.weight.mul_(1 + 1e-7)
    x = hostile(2, 3, 8, 8)
    converted = rmfx.convert(model, x)
    found = rmfx.verify(model, converted, x)
    assert isinstance(found, Verification) and found.tolerance > 1e-12


def test_nothing_is_changed_and_the_seed_decides() -> None:
    model, converted, x = pair()
    before = [value.clone() for m in (model, converted) for value in m.state_dict().values()]
    random = torch.random.get_rng_state()
    first, again, other = (rmfx.verify(model, converted, x, seed=seed) for seed in (0, 0, 100))
    assert first == again and first.float32_original != other.float32_original
    after = [value for m in (model, converted) for value in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch.random.get_rng_state(), random)


def test_integer_inputs_are_kept() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).double().eval()
    indices = torch.tensor([[0, 4], [1, 2]])
    found = rmfx.verify(model, rmfx.convert(model, indices), indices)
    assert found.difference <= 1e-15 and set(found.sizes) == {(2, 2)}


def test_keyword_inputs() -> None:
    model = Lambda(lambda m, x: m.net(x), net=build("basic_identity")[0]).eval()
    x = build("basic_identity")[1]
    converted = rmfx.convert(model, example_kwargs={"x": x})
    assert len(rmfx.verify(model, converted, example_kwargs={"x": x}).sizes) == 4


@pytest.mark.parametrize("inputs", [None, ()])
def test_without_inputs_there_is_nothing_to_compare(inputs: object) -> None:
    model, converted, _ = pair()
    with pytest.raises(RmfxError, match="^verify needs example_inputs$"):
        rmfx.verify(model, converted, inputs)


def test_inputs_that_do_not_fit_are_an_error() -> None:
    model, converted, x = pair()
    message = (
        r"the original cannot .* \(.*expected input\[2, 2, 8, 8\] to have 3 channels.*\): give inputs that it takes"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        rmfx.verify(model, converted, x[:, :2])
