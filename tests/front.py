"""What the tests of the front door share: bring a model into normal form, list operations, compare exactly."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rmfx.front.normal import check_normal
from rmfx.front.trace import trace
from rmfx.passes.normalise import normalise


def normal_form(model: nn.Module) -> fx.GraphModule:
    """The checked normal form of ``model``."""
    gm = normalise(trace(model))
    check_normal(gm)
    return gm


def operations(gm: fx.GraphModule) -> list[str]:
    """The class of every layer, and the name of every other operation, in order."""
    names = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            names.append(type(gm.get_submodule(str(node.target))).__name__)
        elif node.op in ("call_function", "call_method"):
            names.append(getattr(node.target, "__name__", str(node.target)))
    return names


def hostile(*shape: int, seed: int = 0) -> Tensor:
    """Float64 values, signed and well beyond +-6."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 8


def image(seed: int = 0) -> Tensor:
    """Two images of odd size."""
    return hostile(2, 4, 7, 5, seed=seed)


def run(model: nn.Module, *inputs: Any, **kwargs: Any) -> tuple[list[Any], Any]:
    """Leaves and structure of the output, on copies of the inputs."""
    with torch.no_grad():
        output = model(*copy.deepcopy(inputs), **copy.deepcopy(kwargs))
    leaves, structure = pytree.tree_flatten(output)
    return leaves, structure


def assert_exact(model: nn.Module, *inputs: Any, **kwargs: Any) -> fx.GraphModule:
    """The normal form of ``model`` in float64 gives bit-for-bit the same outputs, twice; returns the normal form."""
    model = model.double().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, structure = run(model, *inputs, **kwargs)
    gm = normal_form(model)
    for _ in range(2):
        actual, same_structure = run(gm, *inputs, **kwargs)
        assert same_structure == structure
        for want, got in zip(expected, actual, strict=True):
            assert torch.equal(want, got) if isinstance(want, Tensor) else want == got
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return gm


class Lambda(nn.Module):
    """A model whose ``forward`` is ``function(self, *inputs)``; ``layers`` are its submodules, parameters, buffers."""

    def __init__(self, function: Any, **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in layers.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def bn(channels: int, cls: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A batch norm whose statistics and weights are far from the identity."""
    random = torch.Generator().manual_seed(channels)
    norm = cls(channels)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(channels, generator=random) * 2)
        norm.running_var.copy_(torch.rand(channels, generator=random) * 3 + 0.2)
    return norm


def conv(c_in: int = 4, c_out: int = 4) -> nn.Conv2d:
    """A size-keeping convolution with a bias."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def layer(gm: fx.GraphModule, cls: type[nn.Module]) -> Any:
    """The only layer of a class."""
    found = [module for module in gm.modules() if type(module) is cls]
    assert len(found) == 1, f"{len(found)} layers are {cls.__name__}"
    return found[0]
