"""Which models are taken, and which are refused and why."""

from __future__ import annotations

import collections
import copy
import threading
import types
from typing import Any

import pytest
import torch
from front import Lambda, assert_exact, bn, image, run
from torch import nn

from rmfx.errors import UnsupportedModelError
from rmfx.front.trace import trace


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def _training_inside() -> nn.Module:
    model = nn.Sequential(conv(), nn.Sequential(nn.BatchNorm2d(4))).eval()
    model[1][0].train()
    return model


def _quantised() -> nn.Module:
    return nn.Sequential(torch.ao.nn.quantized.Quantize(0.1, 0, torch.quint8)).eval()


def _scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Sequential(nn.ReLU()).eval())).eval()


def _two_devices() -> nn.Module:
    return nn.Sequential(conv(), nn.Conv2d(4, 4, 1, device="meta")).eval()


def _complex() -> nn.Module:
    return nn.Sequential(collections.OrderedDict(first=nn.Linear(2, 2, dtype=torch.complex64))).eval()


def _integer() -> nn.Module:
    return Lambda(lambda m, x: x, table=nn.Parameter(torch.arange(3), requires_grad=False)).eval()


def _patched() -> nn.Module:
    model = Lambda(lambda m, x: x).eval()
    model.forward = types.MethodType(lambda self, x: x + 1, model)  # type: ignore[method-assign]
    return model


def _inferring() -> nn.Module:
    with torch.inference_mode():
        return nn.Sequential(conv()).eval()


def _uncopyable() -> nn.Module:
    model = Lambda(lambda m, x: x).eval()
    model.lock = threading.Lock()
    return model


REFUSED: list[tuple[Any, str]] = [
    (lambda: 3, "converts a torch.nn.Module, but was given a builtins.int"),
    (lambda: nn.ReLU, r"was given the class ReLU: build a model first, ReLU\(\.\.\.\)"),
    (lambda: nn.Sequential(conv()), r"^the model is in training mode, .* call model.eval\(\) first"),
    (_training_inside, r"^1.0 \(BatchNorm2d\) is in training mode"),
    (_quantised, r"^0 \(Quantize\) is quantised: convert the float model"),
    (_scripted, r"^0 \(RecursiveScriptModule\) is TorchScript"),
    (_two_devices, r"spread over several devices \(0.weight on cpu, 1.weight on meta\): move it to one"),
    (lambda: nn.Linear(2, 2, device="meta").eval(), "on the meta device, where weights have no values"),
    (_complex, r"^parameter first.weight is complex \(torch.complex64\)"),
    (_integer, r"^parameter table is integer \(torch.int64\)"),
    (_inferring, r"^0.weight was made under torch.inference_mode\(\).*convert copy.deepcopy\(model\)"),
    (lambda: nn.Sequential(nn.LazyLinear(3)).eval(), r"^0.weight is lazy .* run the model on one batch first"),
    (lambda: nn.ModuleList([conv()]).eval(), "ModuleList has no forward method, so it computes nothing"),
    (lambda: nn.DataParallel(conv()).eval(), "wrapped in DataParallel: give the model inside, model.module"),
    (_patched, "forward was replaced on the instance"),
    (_uncopyable, r"cannot be copied \(.*lock.*\): copy.deepcopy\(model\) must work"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_models_that_are_refused(build: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trace(build())


def test_a_copy_of_a_model_made_under_inference_mode_is_taken() -> None:
    assert len(trace(copy.deepcopy(_inferring())).graph.nodes) == 3


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="give the model inside, model._orig_mod"):
        trace(torch.compile(nn.Sequential(conv()).eval(), backend="eager"))


def test_hooks_on_all_modules_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.raises(UnsupportedModelError, match="hooks on all modules are registered"):
            trace(nn.Sequential(conv()).eval())
    finally:
        handle.remove()


def test_training_mode_is_traced_as_eval_when_allowed() -> None:
    model = nn.Sequential(conv(), bn(4), nn.Dropout(0.5)).double()
    gm = trace(model, allow_training=True)
    assert model.training and model[1].training and not any(module.training for module in gm.modules())
    assert torch.equal(run(gm, image())[0][0], run(copy.deepcopy(model).eval(), image())[0][0])


def test_integer_and_bool_buffers_are_taken() -> None:
    model = Lambda(lambda m, x: torch.where(m.mask, x, -x), mask=torch.tensor([True, False, True, False, True]))
    assert_exact(model, image())
