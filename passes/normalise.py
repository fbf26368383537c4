"""Brings a traced graph into normal form: one spelling per operation, one call site per layer, nothing in place.

    y = F.relu_(bn(x)); y += x       =>      bn = bn(x); relu = ReLU(bn); y = operator.add(relu, x)

Arguments have torch's own names first (``dim=``, not ``axis=``), so that no step needs to know others. With example
inputs, shapes are found: ranks are known then, and sizes are seen to agree. Each step stands where it does for a
reason:

1. in-place operations, before anything is removed: their readers are known only then;
2. operations that hide a sum, written out, so that the steps below meet sums and products only;
3. constant expressions, so that computed weights are weights for the steps below;
4. what does nothing in eval mode, and zeros that something is added to, so that the steps below see through it;
5. functions and methods that are layers, those first that need no ranks;
6. in one sweep, since each needs what is known of the values before: sizes that the network fixes become numbers, then
   channel operations, layers that need ranks, sums, products, scalings, and activations that are written out;
7. one call site per layer, when no step adds calls any more; instance norms by running statistics are batch norms, and
   layers between a permutation and its inverse are ones of channels, where no other call has their weights;
8. dead code, unused layers and weights;
9. ``meta["origin"]``, the name under which a value of the original network is known from here on, and
   ``meta["plain_value"]`` on what is no tensor, and ``meta["rank"]`` where layers tell it.

What is not known stays in the graph as it is. Every step is linear in the number of nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.front.aliasing import NO_OPS, is_plain_value, resolve_in_place
from rmfx.front.builders import NORM_OF_RANK
from rmfx.front.channels_last import undo_channels_last
from rmfx.front.compounds import write_out_compounds
from rmfx.front.constants import fold_constants
from rmfx.front.fixed_norms import fix_instance_norms
from rmfx.front.install import Installer, clone_sharing
from rmfx.front.keywords import spell_keywords
from rmfx.front.kind_table import KindTable, infer_kinds
from rmfx.front.kinds import Kind
from rmfx.front.numbers import write_numbers
from rmfx.front.opnames import is_eval_dropout, is_torch_function, op_name
from rmfx.front.shapes import find_shapes, forget_dtypes
from rmfx.front.spelling import spell
from rmfx.front.sweep import Sweep
from rmfx.front.zeros import drop_zeros
from rmfx.graph.tree import drop_unused
from rmfx.modules import SizeGuard

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CASTS = frozenset({"to", "type_as", "float", "double", "half", "bfloat16"})
_COPIES = frozenset({"clone", "contiguous"})
_VIEWS = {"view": "reshape", "view_as": "reshape_as"}
_ASSERTS = frozenset({"_assert", "_assert_async", "_assert_scalar"})


def normalise(
    gm: fx.GraphModule, *, keep_dropout: bool = False, inputs: tuple[Any, ...] | None = None
) -> fx.GraphModule:
    """Bring ``gm`` into normal form, in place; returns it.

    Args:
        gm: what :func:`rmfx.front.trace.trace` gives. Its layers are changed; tensors that it shares are not.
        keep_dropout: keep dropout layers (functional ones cannot be kept) and instance norms, for training.
        inputs: example inputs in the order of the placeholders; they tell ranks and sizes.

    Raises:
        NormalFormError: when an in-place operation cannot be given an out-of-place meaning.
    """
    installer = Installer(gm)
    spell_keywords(gm)
    if inputs is not None:
        find_shapes(gm, inputs)
    resolve_in_place(gm)
    write_out_compounds(installer)
    fold_constants(gm, installer)
    _respell_views(gm)
    if not keep_dropout:
        _drop_detachments(gm)
    _drop_no_ops(gm, nn.Identity if keep_dropout else NO_OPS)
    drop_zeros(gm)
    kinds = _spell(gm, installer)
    _one_call_site_each(gm, installer, kinds)
    if not keep_dropout:
        fix_instance_norms(gm)
    undo_channels_last(gm, kinds)
    _drop_dead_code(gm)
    drop_unused(gm)
    _stamp(gm)
    forget_dtypes(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def _stamp(gm: fx.GraphModule) -> None:
    tensors: set[fx.Node] = set()
    kinds = infer_kinds(gm)
    # a convolution takes a single image too; these norms do not
    batched = any(isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)) for module in gm.modules())
    for node in gm.graph.nodes:
        node.meta["rank"] = kinds[node].rank if batched else None
        node.meta["origin"] = node.name
        node.meta.setdefault("place", "")
        if is_plain_value(node, tensors):
            node.meta["plain_value"] = True
        else:
            tensors.add(node)


def _source(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    return first if isinstance(first, fx.Node) else None


# -- 4. what does nothing ---------------------------------------------------------------------------------------------


def _drop_no_ops(gm: fx.GraphModule, idle: type[nn.Module] | tuple[type[nn.Module], ...]) -> None:
    for node in list(gm.graph.nodes):
        if _is_assert(node):
            gm.graph.erase_node(node)
        elif _is_no_op(gm, node, idle) and (source := _source(node)) is not None:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)


def _drop_detachments(gm: fx.GraphModule) -> None:
    """``x.detach()`` stops gradients only, so where nothing is trained it is ``x``."""
    for node in list(gm.graph.nodes):
        if op_name(node) == "detach" and (source := _source(node)) is not None:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)


def _is_assert(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _ASSERTS and not node.users


def _is_no_op(gm: fx.GraphModule, node: fx.Node, idle: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), idle)
    return is_eval_dropout(node) or _is_plain_copy(node) or _is_idle_cast(node)


def _is_plain_copy(node: fx.Node) -> bool:
    """Whether the node copies a value of the network: nothing writes any more, so the copy is the tensor."""
    source = _source(node)
    return op_name(node) in _COPIES and source is not None and source.op not in ("placeholder", "get_attr")


def _is_idle_cast(node: fx.Node) -> bool:
    """Whether the node asks for the type that its source has: eager code hands the source itself on."""
    source, dtype = _source(node), node.meta.get("dtype")
    if op_name(node) not in _CASTS or source is None or dtype is None or set(node.kwargs) - {"dtype"}:
        return False
    asked = (*node.args[1:], *node.kwargs.values())
    no_device = all(isinstance(value, torch.dtype) or _is_dtype_of(value) for value in asked)
    return source.meta.get("dtype") == dtype and (no_device or op_name(node) == "type_as")


def _is_dtype_of(value: object) -> bool:
    return isinstance(value, fx.Node) and value.target is getattr and value.args[1] == "dtype"


def _respell_views(gm: fx.GraphModule) -> None:
    """``x.view(sizes)`` becomes ``x.reshape(sizes)``, which does not care how ``x`` lies in memory."""
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target in _VIEWS and not isinstance(node.args[-1], torch.dtype):
            node.target = _VIEWS[node.target]


# -- 5. and 6. one spelling per operation ------------------------------------------------------------------------------


def _spell(gm: fx.GraphModule, installer: Installer) -> KindTable:
    constant = _constant_reader(gm)
    _spell_layers(gm, installer, lambda node: Kind(), constant)
    if write_numbers(gm):  # weights may depend on them
        fold_constants(gm, installer)
        _spell_layers(gm, installer, lambda node: Kind(), constant)
    sweep = Sweep(gm, installer, constant)
    for node in list(gm.graph.nodes):
        sweep.visit(node)
    return sweep.kinds


def _spell_layers(
    gm: fx.GraphModule,
    installer: Installer,
    kind: Callable[[fx.Node], Kind],
    constant: Callable[[fx.Node], Tensor | None],
) -> None:
    for node in gm.graph.nodes:
        spelled = spell(node, kind, constant)
        if spelled is not None:
            installer.layer(node, spelled.layer, spelled.source)


def _constant_reader(gm: fx.GraphModule) -> Callable[[fx.Node], Tensor | None]:
    def read(node: fx.Node) -> Tensor | None:
        if node.op != "get_attr":
            return None
        value: object = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value if isinstance(value, Tensor) else None

    return read


# -- 7. one call site per layer ---------------------------------------------------------------------------------------


def _one_call_site_each(gm: fx.GraphModule, installer: Installer, kinds: KindTable) -> None:
    seen: set[int] = set()
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        target = str(node.target)
        module = gm.get_submodule(target)
        if id(module) in seen:
            module = clone_sharing(module)
            place, _, word = target.rpartition(".")
            node.target = installer.free_name(place, word)
            gm.add_submodule(node.target, module)
        seen.add(id(module))
        _make_plain(module, [kinds[source].rank for source in node.all_input_nodes])
        if len(node.kwargs) == 1 and not node.args:
            node.args, node.kwargs = tuple(node.kwargs.values()), {}


def _make_plain(module: nn.Module, ranks: list[int | None]) -> None:
    """A batch norm's subclass that inherits ``forward`` computes what the batch norm does, and becomes one.

    So does one that is synchronised between processes, which only training is, where the rank that it reads is known.
    """
    if isinstance(module, _NORMS) and type(module) not in _NORMS:
        module.__class__ = next(cls for cls in type(module).__mro__ if cls in _NORMS)
    if type(module) is nn.SyncBatchNorm and len(ranks) == 1 and ranks[0] in NORM_OF_RANK:
        module.__class__ = NORM_OF_RANK[ranks[0]]  # type: ignore[assignment]
        del module.process_group


# -- 8. what is left over ---------------------------------------------------------------------------------------------


def _drop_dead_code(gm: fx.GraphModule) -> None:
    for node in reversed(gm.graph.nodes):
        if not node.users and _is_pure(gm, node):
            gm.graph.erase_node(node)


def _is_pure(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return False
    if node.op == "call_module":
        return not isinstance(gm.get_submodule(str(node.target)), SizeGuard)
    return node.op != "call_function" or is_torch_function(node.target)
