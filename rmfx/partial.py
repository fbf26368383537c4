"""Converts the parts of a model whose code as a whole no front door can follow.

The outermost sub-modules that can be followed are converted each for itself and put back into a copy of the model,
whose own code goes on calling them. What stands between them is left as it is, and the report says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rmfx.account import check_places
from rmfx.check.verify import verify as verify_models
from rmfx.copying import deep_copy
from rmfx.errors import PartialConversionWarning, RmfxError, TraceError, VerificationError
from rmfx.front.trace import structural_copy
from rmfx.front.tracer import is_leaf
from rmfx.graph.cost import network_parameters
from rmfx.inputs import as_tuple
from rmfx.quiet import quiet_fakes
from rmfx.report import Entry, LeftOut, Report, Totals, attach, report

Inputs = tuple[tuple[Any, ...] | None, Mapping[str, Any]]
PartPolicy = str | Callable[[Entry], bool]
Converter = Callable[[nn.Module, Any, Mapping[str, Any], PartPolicy], nn.Module]
Explainer = Callable[[nn.Module, Any, Mapping[str, Any], PartPolicy], Report]


@dataclass(frozen=True, eq=False)
class Parts:
    """A model to convert in parts.

    Attributes:
        model: the whole; left untouched.
        inputs: its example inputs; positional ones are ``None`` where there are none.
        refused: why it cannot be converted as a whole.
        policy: the user's choice of places, by their names in the whole model.
        calls: of each sub-module that is called with inputs of one form only, these inputs.
    """

    model: nn.Module
    inputs: Inputs
    refused: TraceError
    policy: str | Callable[[Entry], bool] | Collection[str]
    calls: Mapping[str, Inputs]

    def convert(self, converter: Converter, verify: bool | None) -> nn.Module:
        """A copy of the model with its parts converted.

        Raises:
            TraceError: when no part that can be followed holds a residual sum.
            VerificationError: when the copy computes something else.
        """
        found, left = self._each(converter)
        converted = {path: part for path, part in found.items() if report(part).entries}
        self._demand_some(converted)
        result = deep_copy(self.model)
        for path, part in converted.items():
            result.set_submodule(path, part)
        whole = self._report({path: report(part) for path, part in converted.items()}, left, network_parameters(result))
        check_places(self.policy, whole)
        args, kwargs = self.inputs
        if args is not None and verify is not False:
            self._verify(result, args, kwargs)
        attach(result, whole)
        self._warn(whole)
        return result

    def explain(self, explainer: Explainer) -> Report:
        """The report that :meth:`convert` would leave.

        Raises:
            TraceError: when no part that can be followed holds a residual sum.
        """
        found, left = self._each(explainer)
        reports = {path: part for path, part in found.items() if part.entries}
        self._demand_some(reports)
        more = sum(part.totals.params_after - part.totals.params_before for part in reports.values())
        whole = self._report(reports, left, network_parameters(self.model) + more)
        check_places(self.policy, whole)
        self._warn(whole)
        return whole

    # -- the walk -----------------------------------------------------------------------------------------------------

    def _each(self, work: Callable[..., Any]) -> tuple[dict[str, Any], list[LeftOut]]:
        """What ``work`` makes of the outermost parts that can be followed, and the modules that cannot."""
        done: dict[str, Any] = {}
        left = [LeftOut("", str(self.refused))]
        pending = list(reversed(list(_children("", self.model))))
        while pending:
            path, part = pending.pop()
            if type(part).forward is nn.Module.forward:  # a list of modules
                pending += reversed(list(_children(path, part)))
                continue
            if is_leaf(part):
                continue
            args, kwargs = self.calls.get(path, (None, {}))
            try:
                done[path] = work(part, args, kwargs, self._policy_of(path))
            except VerificationError:
                raise
            except RmfxError as error:
                left.append(LeftOut(path, str(error)))
                pending += reversed(list(_children(path, part)))
        return done, left

    def _policy_of(self, path: str) -> PartPolicy:
        policy = self.policy
        if isinstance(policy, str):
            return policy
        if callable(policy):
            choose = policy
            return lambda entry: choose(_inside(path, entry))
        places = set(policy)
        return lambda entry: bool({_inside(path, entry).place, _inside(path, entry).node} & places)

    def _demand_some(self, reports: Mapping[str, Any]) -> None:
        if not reports:
            raise self.refused

    def _verify(self, result: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Each part was compared alone; here, that the code around them still works on them."""
        try:
            verify_models(self.model, result, args, example_kwargs=kwargs, quick=True)
        except (AttributeError, TypeError) as error:
            raise TraceError(
                f"{self.refused}. Its own code looks into the parts that were converted: {error}"
            ) from error

    def _warn(self, whole: Report) -> None:
        names = ", ".join(part.place for part in whole.left_out[1:]) or "none"
        warnings.warn(
            f"only parts of {type(self.model).__name__} were converted, since its code cannot be followed as a whole: "
            f"{self.refused}. Inner modules left out: {names}. partial=False makes this an error.",
            PartialConversionWarning,
            stacklevel=5,
        )

    # -- the report ---------------------------------------------------------------------------------------------------

    def _report(self, reports: Mapping[str, Report], left: list[LeftOut], params_after: int) -> Report:
        names: dict[str, tuple[str, ...]] = {name: (name,) for name in self.model.state_dict()}
        for path, part in reports.items():
            names |= {f"{path}.{old}": tuple(f"{path}.{n}" for n in new) for old, new in part.parameter_map.items()}
        return Report(
            entries=tuple(_inside(path, entry) for path, part in reports.items() for entry in part.entries),
            totals=Totals(network_parameters(self.model), params_after),
            passes=tuple(
                replace(line, name=f"{path}: {line.name}") for path, r in reports.items() for line in r.passes
            ),
            parameter_map=names,
            notes=tuple(f"{path}: {note}" for path, part in reports.items() for note in part.notes),
            carried_norms={
                f"{path}.{norm}": channels for path, r in reports.items() for norm, channels in r.carried_norms.items()
            },
            left_out=tuple(left),
            size_conditions=tuple(f"{path}: {text}" for path, part in reports.items() for text in part.size_conditions),
            concat_conditions=tuple(f"{path}: {text}" for path, r in reports.items() for text in r.concat_conditions),
        )


def _inside(path: str, entry: Entry) -> Entry:
    """``entry`` of the part at ``path``, as the whole model names it."""
    taps = tuple((f"{path}.{name}", index) for name, index in entry.carried_taps)
    return replace(entry, place=f"{path}.{entry.place}".rstrip("."), carried_taps=taps)


def _children(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        yield (f"{path}.{name}" if path else name), child


def find_parts(
    model: nn.Module,
    example_inputs: Any,
    kwargs: Mapping[str, Any],
    refused: TraceError,
    policy: str | Callable[[Entry], bool] | Collection[str],
) -> Parts:
    """Get ready to convert ``model`` in parts: with example inputs, find out what each sub-module is called with.

    Args:
        model, example_inputs, kwargs, policy: as for :func:`rmfx.convert`.
        refused: why it cannot be converted as a whole.
    """
    if example_inputs is None and not kwargs:
        return Parts(model, (None, {}), refused, policy, {})
    inputs = (as_tuple(() if example_inputs is None else example_inputs), dict(kwargs))
    return Parts(model, inputs, refused, policy, _record(model, *inputs))


def _record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Inputs]:
    """Inputs of the right form for each sub-module that is always called with inputs of one form."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    try:
        with mode, quiet_fakes():
            calls = _calls(structural_copy(model), *pytree.tree_map(fake, (args, dict(kwargs))))
    except Exception as error:  # code that decides by values cannot run without them
        if any(tensor.is_meta for tensor in model.parameters()):
            raise TraceError(f"the model runs on inputs with values only: {error}") from error
        calls = _calls(deep_copy(model), args, dict(kwargs))
    one_form = {path: seen[0] for path, seen in calls.items() if all(_form(call) == _form(seen[0]) for call in seen)}
    return {path: pytree.tree_map(_stand_in, call) for path, call in one_form.items()}


def _calls(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[Inputs]]:
    calls: dict[str, list[Inputs]] = {}

    def note(path: str) -> Any:
        return lambda module, given, named: calls.setdefault(path, []).append((given, named))

    for path, module in model.named_modules():
        module.training = False
        if path:
            module.register_forward_pre_hook(note(path), with_kwargs=True)
    with torch.no_grad():
        model(*args, **kwargs)
    return calls


def _form(call: Inputs) -> Any:
    leaves, structure = pytree.tree_flatten(call)
    return structure, [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves]


def _stand_in(value: Any) -> Any:
    """A tensor like ``value``, which may be fake; what is no tensor is itself."""
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device) if isinstance(value, Tensor) else value
