"""rmfx as a pass of Inductor, for those who keep ``backend="inductor"`` and freeze weights."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._inductor.codecache import resolve_pre_grad_pass_timing
from torch._inductor.custom_graph_pass import CustomGraphPass

from rmfx.backend.admit import concrete, refusal
from rmfx.backend.settings import Settings, check_conversion
from rmfx.backend.stamp import digest
from rmfx.errors import RmfxError
from rmfx.front.live import bind_weights, weight_inputs
from rmfx.report import report

logger = logging.getLogger("rmfx")
_PLACE = "rmfx"  # of the new layers, in Dynamo's module


def inductor_pass(model: nn.Module, **options: Any) -> InductorPass:
    """A pass for ``torch._inductor.config.pre_grad_custom_pass``, which converts frozen networks.

    Inductor must freeze, or weights are inputs and not constants; and early, before it looks for parameters::

        torch._inductor.config.freezing = True
        torch._inductor.config.pre_grad_pass_timing = "early"
        torch._inductor.config.pre_grad_custom_pass = rmfx.backend.inductor_pass(model)

    What freezing means is Inductor's to say: of frozen weights, writes in place go unseen, with this pass or without.

    Args:
        model: whose weights the pass's ``uuid`` covers. Others are converted, too.
        options: keyword arguments of :func:`rmfx.convert`.

    Raises:
        RmfxError: for a bad option; lists the good ones.

    >>> inductor_pass(nn.Linear(2, 2), carrier="spilt")
    Traceback (most recent call last):
    rmfx.errors.RmfxError: inductor_pass: carrier must be one of 'auto', 'direct', ..., got 'spilt'
    """
    check_conversion("inductor_pass", options, set())
    return InductorPass(model, Settings(options))


class InductorPass(CustomGraphPass):
    """See :func:`inductor_pass`."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._model = model
        self._settings = settings

    def uuid(self) -> bytes:
        """A hash of weights and options: what was compiled for others is not taken from Inductor's cache."""
        weights = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        options = sorted(self._settings.conversion.items())
        return hashlib.sha256(repr((list(weights), options)).encode() + digest(list(weights.values()))).digest()

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite Dynamo's graph in place; what is not to be converted stays as it is, with a reason in the log.

        Raises:
            RmfxError: when the weights are not frozen, or it is too late for other ones.
        """
        if torch.is_grad_enabled():
            logger.info("rmfx: a graph is left as it is: gradients are enabled")
            return
        gm = graph.owning_module
        assert gm is not None
        _demand_freezing(gm)
        args = [_stand_in(node.meta["example_value"]) for node in graph.find_nodes(op="placeholder")]
        if reason := self._convert(gm, args):
            logger.warning("rmfx: a graph is left as it is: %s", reason)

    def _convert(self, gm: fx.GraphModule, args: list[Any]) -> str | None:
        """Why not, where it is not to be."""
        if reason := refusal(gm, args, self._settings):
            return reason
        held, read = bind_weights(gm, args)
        try:
            converted = self._settings.convert(held, tuple(args[index] for index in read))
        except RmfxError as error:
            return str(error)
        assert isinstance(converted, fx.GraphModule)
        logger.info("rmfx: %s", report(converted).summary())
        _replace(gm, converted, read)
        return None


def _demand_freezing(gm: fx.GraphModule) -> None:
    config = "torch._inductor.config"
    if weight_inputs(gm):
        raise RmfxError(
            f"weights are inputs of the graph, not constants: set {config}.freezing = True (in the options of "
            'torch.compile it comes too late for Dynamo), or use torch.compile(model, backend="rmfx")'
        )
    if resolve_pre_grad_pass_timing() != "early":
        raise RmfxError(f'the pass comes too late to bring weights: set {config}.pre_grad_pass_timing = "early"')


def _stand_in(value: Any) -> Any:
    """A tensor of the sizes of ``value``, whose values do not matter."""
    if not isinstance(value, Tensor):
        return value
    sizes = concrete(value.shape)
    return None if sizes is None else torch.zeros(sizes, dtype=value.dtype, device=value.device)


def _replace(gm: fx.GraphModule, converted: fx.GraphModule, read: list[int]) -> None:
    """Put the graph of ``converted`` into the place of that of ``gm``, to read its inputs at the positions ``read``."""
    gm.add_module(_PLACE, converted)
    inputs, output = gm.graph.find_nodes(op="placeholder"), gm.graph.output_node()
    given = [inputs[index] for index in read]
    copies = dict(zip(converted.graph.find_nodes(op="placeholder"), given, strict=True))
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.graph_copy(converted.graph, copies),)
    for node in copies.values():
        if node.op in ("call_module", "get_attr"):
            node.target = f"{_PLACE}.{node.target}"
    gm.graph.eliminate_dead_code()
    for name in converted.state_dict():  # each parameter needs a source of its own, which nothing guards
        sources: Any = gm._param_name_to_source  # Dynamo's own table, unknown to the class
        sources[f"{_PLACE}.{name}"] = ConstantSource(f"{_PLACE}.{name}")
