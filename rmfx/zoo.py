"""Networks by name: ``torchvision:resnet18``, ``timm:regnetx_004``, ``rmfx:rmnet26x3_32``, ``net.py:factory``."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import rmfx.models
from rmfx.abort import Terminated
from rmfx.errors import ModelNameError, RmfxError
from rmfx.vision import import_timm, import_torchvision
from rmfx.weights import load_weights

SPELLINGS = "torchvision:NAME, timm:NAME, rmfx:NAME, or path/to/file.py:FACTORY"
_FILES = itertools.count(1)  # that were executed: each gets a number
_IMAGENET = (3, 224, 224)
_INPUT_SHAPES = {
    "torchvision:inception_v3": (3, 299, 299),
    **{f"rmfx:{name}": (3, 32, 32) for name in rmfx.models.CIFAR},
}


def build(
    name: str,
    *,
    weights: Path | None = None,
    pretrained: bool = False,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build the network called ``name``, in eval mode, in float32 on the CPU.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, ``rmfx:NAME`` (a function of :mod:`rmfx.models`), or
            ``path/to/file.py:FACTORY``, a function without arguments, or a module, in a Python file. The file
            is executed.
        weights: a ``.safetensors``, ``.pt`` or ``.pth`` state dict, which must fit exactly.
        pretrained: the weights published by torchvision or timm, downloaded when they are not cached.
        seed: of the random weights; the global generator is left as it was.
        arguments: for the function that builds the network (:func:`arguments_for`); none for a Python file.

    Raises:
        ModelNameError: for an unknown name (with the nearest known ones), a package that is not installed,
            weights that cannot be had or do not fit, or a factory that fails.

    >>> type(build("rmfx:rmnet26x3_32")).__name__
    'RMNet'
    >>> build("rmfx:rmnet26x3_23")
    Traceback (most recent call last):
    rmfx.errors.ModelNameError: rmfx has no network 'rmnet26x3_23'; did you mean rmfx:rmnet26x3_32?
    """
    if weights is not None and pretrained:
        raise ModelNameError("weights and pretrained exclude each other: give one of them")
    source, network = _split(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if source in _SOURCES:
            model = _SOURCES[source](network, pretrained, arguments or {})
        else:
            model = _from_file(Path(source), network)
    if weights is not None:
        load_weights(model, weights, name)
    return model.eval()


def arguments_for(name: str, channels: int, classes: int) -> dict[str, int]:
    """What :func:`build` needs to be told for images with so many channels and classes, as far as it can.

    >>> arguments_for("timm:resnet18", 1, 10)
    {'num_classes': 10, 'in_chans': 1}
    >>> arguments_for("rmfx:rmnet41x4_8", 3, 10), arguments_for("net.py:factory", 3, 10)
    ({'num_classes': 10}, {})
    """
    source, network = _split(name)
    if source == "timm":
        return {"num_classes": classes, "in_chans": channels}
    if source == "torchvision":
        return {"num_classes": classes}
    if source != "rmfx":
        return {}
    _check_known("rmfx", network)
    known = inspect.signature(getattr(rmfx.models, network)).parameters
    wanted = {"num_classes": classes, "in_channels": channels}
    return {argument: value for argument, value in wanted.items() if argument in known}


def names(source: str) -> list[str]:
    """All network names of ``source``: ``"torchvision"``, ``"timm"`` or ``"rmfx"``.

    Raises:
        ModelNameError: when ``source`` is none of them, or its package is not installed.

    >>> "rmnet26x3_32" in names("rmfx")
    True
    """
    if source == "torchvision":
        return list(import_torchvision().models.list_models())
    if source == "timm":
        return list(import_timm().list_models())
    if source == "rmfx":
        return sorted(filter(_is_factory, rmfx.models.__all__))
    raise ModelNameError(f"no source of networks is called {source!r}: choose torchvision, timm or rmfx")


def input_shape(name: str, model: nn.Module, size: int | None = None) -> tuple[int, ...]:
    """The shape of one input of ``model``, without the batch: ``(channels, height, width)``.

    Args:
        name: as for :func:`build`, or the path of a saved network.
        model: what was built.
        size: height and width; by default those the network was published with.

    Raises:
        ModelNameError: when ``size`` is needed and missing, or the channels cannot be told.
    """
    known = _known_shape(name, model)
    if known is not None:
        return known if size is None else (known[0], size, size)
    if size is None:
        raise ModelNameError(f"the input size of {name} is not known: give --size 32 or --input-shape 3,32,32")
    return _first_channels(model, name), size, size


def example_input(
    name: str, model: nn.Module, size: int | Sequence[int] | None = None, *, batch: int = 1, seed: int = 0
) -> Tensor:
    """A random normal input for ``model``, in the dtype and on the device of its parameters.

    Args:
        name, model: as for :func:`input_shape`.
        size: height and width as one number, or the whole shape without the batch; by default the published one.
        batch, seed: of the input.

    Raises:
        ModelNameError: when ``size`` is needed and missing, or a size is not positive.

    >>> example_input("rmfx:rmnet26x3_32", build("rmfx:rmnet26x3_32")).shape
    torch.Size([1, 3, 32, 32])
    """
    shape = input_shape(name, model, size) if size is None or isinstance(size, int) else tuple(size)
    if min((batch, *shape)) < 1:
        raise ModelNameError(f"input sizes must be positive, got batch {batch} and shape {tuple(shape)}")
    parameter = next(model.parameters(), torch.zeros(()))
    values = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
    return values.to(parameter.device, parameter.dtype)


def _split(name: str) -> tuple[str, str]:
    source, colon, network = name.rpartition(":") if ".py:" in name else name.partition(":")
    if not colon or not network:
        raise ModelNameError(f"{name!r} names no network: write {SPELLINGS}{_same_name(name)}")
    if source in _SOURCES or source.endswith(".py"):
        return source, network
    raise ModelNameError(f"{name!r}: there is no source {source!r}; write {SPELLINGS}")


def _same_name(name: str) -> str:
    for source in ("torchvision", "timm", "rmfx"):
        with contextlib.suppress(ModelNameError):  # a source that is not installed has no suggestion
            if name in names(source):
                return f"; did you mean {source}:{name}?"
    return ""


def _from_torchvision(network: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    _check_known("torchvision", network)
    with _fetching(f"torchvision:{network}", pretrained):
        return import_torchvision().models.get_model(network, weights="DEFAULT" if pretrained else None, **arguments)


def _from_timm(network: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    timm = import_timm()
    if not network.startswith("hf-hub:"):
        _check_known("timm", network.partition(".")[0])  # what follows the dot names a set of weights
    with _fetching(f"timm:{network}", pretrained):
        return timm.create_model(network, pretrained=pretrained, **arguments)


def _from_rmfx(network: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    _check_known("rmfx", network)
    if pretrained:
        raise ModelNameError(f"rmfx:{network} has no published weights: train it, then give them with --weights")
    return getattr(rmfx.models, network)(**arguments)


_SOURCES: dict[str, Callable[[str, bool, Mapping[str, Any]], nn.Module]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "rmfx": _from_rmfx,
}


def _check_known(source: str, network: str) -> None:
    known = names(source)
    if network in known:
        return
    close = difflib.get_close_matches(network, known, n=3)
    hint = f"did you mean {' or '.join(f'{source}:{match}' for match in close)}?" if close else "no name is close"
    raise ModelNameError(f"{source} has no network {network!r}; {hint}")


@contextlib.contextmanager
def _fetching(name: str, pretrained: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # download stacks raise errors of many unrelated types
        what = "the pretrained weights of " if pretrained else ""
        advice = "; give a local file with --weights" if pretrained else ""
        raise ModelNameError(f"{what}{name} cannot be had: {_first_line(error)}{advice}") from error


def _from_file(path: Path, factory: str) -> nn.Module:
    if not path.is_file():
        raise ModelNameError(f"{path} does not exist: write path/to/file.py:FACTORY")
    with _importing_from(path.resolve().parent):
        try:
            made = _look_up(path, factory)
            model = made if isinstance(made, nn.Module) else made()
        except (RmfxError, Terminated):
            raise
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise ModelNameError(f"{path}:{factory} raised {type(error).__name__}: {_first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelNameError(f"{path}:{factory} gave {type(model).__name__}: it must give a torch.nn.Module")
    return model


def _look_up(path: Path, factory: str) -> Callable[[], object]:
    module = _executed(path)
    found = getattr(module, factory, None)
    if callable(found):
        return found
    offered = sorted(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
    raise ModelNameError(f"{path} has no function {factory!r}; it defines {', '.join(offered) or 'none'}")


def _executed(path: Path) -> ModuleType:
    """The file as a module under a name of its own: dataclasses and pickle look up where a class is from by name."""
    name = f"_rmfx_file_{next(_FILES)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelNameError(f"{path} is not a Python file")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    with contextlib.ExitStack() as undo:
        undo.callback(sys.modules.pop, name, None)
        spec.loader.exec_module(module)
        undo.pop_all()  # only a file that could be executed stays
    return module


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let the file import its neighbours, as ``python file.py`` does."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the file may have edited sys.path itself
            sys.path.remove(str(folder))


def _known_shape(name: str, model: nn.Module) -> tuple[int, ...] | None:
    published = getattr(model, "pretrained_cfg", None)
    if name.startswith("timm:") and published and published.get("input_size"):
        return tuple(published["input_size"])
    if name in _INPUT_SHAPES:
        return _INPUT_SHAPES[name]
    return _IMAGENET if name.partition(":")[0] in _SOURCES else None


def _first_channels(model: nn.Module, name: str) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return module.in_channels
    raise ModelNameError(f"{name} has no convolution to tell the input channels from: give --input-shape")


def _is_factory(name: str) -> bool:
    signature = inspect.signature(getattr(rmfx.models, name))
    return all(p.default is not p.empty for p in signature.parameters.values())


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
