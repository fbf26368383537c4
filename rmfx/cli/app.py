"""The command ``rmfx``: its sub-commands, and what becomes of errors.

Exit codes:
    0  done
    1  the result is wrong or could not be made: a verification failed, an ONNX file differs, a training diverged,
       a bug in rmfx
    2  the request cannot be carried out as written: usage, unknown or unsupported model, a file that cannot be read
       or written, inactive device
    3  done, but with ``--strict`` and some residual sums refused
    4  done, but only for parts of the model: its code as a whole cannot be followed
    130  interrupted with Ctrl-C; no half-written file is left
    143  terminated by SIGTERM; the same
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Annotated, Any, NoReturn

import typer

from rmfx import abort, debug
from rmfx.cli import console
from rmfx.cli.bench import bench
from rmfx.cli.convert import convert
from rmfx.cli.demo import demo
from rmfx.cli.doctor import doctor
from rmfx.cli.explain import explain
from rmfx.cli.export import export
from rmfx.cli.finetune import finetune
from rmfx.cli.plan import plan
from rmfx.cli.prune import prune
from rmfx.cli.quantise import quantise
from rmfx.cli.train import train
from rmfx.cli.verify import verify
from rmfx.errors import (
    DivergedError,
    ExportError,
    InexactError,
    NormalFormError,
    NotPlainError,
    RmfxError,
    VerificationError,
)

_FAILED, _BAD_REQUEST, _TERMINATED = 1, 2, 128 + signal.SIGTERM
_LEAVING = {abort.INTERRUPTED: "interrupted", _TERMINATED: "terminated"}
_FAILURES = (DivergedError, ExportError, InexactError, NormalFormError, NotPlainError, VerificationError)

_HELP = """Remove the residual connections of a PyTorch network, exactly.

A MODEL is torchvision:NAME, timm:NAME, rmfx:NAME, path/to/file.py:FACTORY, or a saved .rmfx file. Results go to
standard output, progress and errors to standard error.

Exit codes: 0 done; 1 the result is wrong or could not be made; 2 the request cannot be carried out as written;
3 some residual sums were refused and --strict was given; 4 only parts of the model could be converted;
130 interrupted; 143 terminated. RMFX_DEBUG=1 adds tracebacks.
"""

app = typer.Typer(name="rmfx", help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
for command in (explain, plan, convert, verify, export, quantise, bench, train, finetune, prune, demo, doctor):
    app.command()(command)


def _show_version(asked: bool) -> None:
    if asked:
        console.out(f"rmfx {metadata.version('rmfx')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options that come before the command."""


def main() -> None:
    """Run the command line and leave the process with one of the exit codes above."""
    try:
        show_traceback = debug.enabled()
    except RmfxError as error:
        console.fail(str(error))
        sys.exit(_BAD_REQUEST)
    try:
        with _leaving_cleanly():
            app()
    except RmfxError as error:
        if show_traceback:
            raise
        console.fail(str(error))
        sys.exit(_FAILED if isinstance(error, _FAILURES) else _BAD_REQUEST)
    except SystemExit as leaving:
        if leaving.code in _LEAVING:
            console.fail(_LEAVING[leaving.code])
        raise


@contextlib.contextmanager
def _leaving_cleanly() -> Iterator[None]:
    """Let both signals that end a command raise an exception, so that scratch files are removed on the way out."""
    ours = [(number, old, new) for number, old, new in _HANDLERS if signal.getsignal(number) == old]
    for number, _, new in ours:
        signal.signal(number, new)
    try:
        yield
    finally:
        for number, old, _ in ours:
            signal.signal(number, old)


def _terminate(number: int, frame: object) -> NoReturn:
    raise abort.Terminated(_TERMINATED)


# A signal that somebody else handles, or that nohup ignores, stays theirs.
_HANDLERS: tuple[tuple[signal.Signals, Any, Any], ...] = (
    (signal.SIGINT, abort.leave, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL, _terminate),
)
