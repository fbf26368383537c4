"""Write a file completely or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rmfx.errors import RmfxError


@contextmanager
def replacing(path: str | os.PathLike[str], error: type[RmfxError]) -> Iterator[Path]:
    """Yield a scratch path to write to; move what was written to ``path`` when the block ends well.

    The scratch path has the name of ``path`` and lies in a fresh folder beside it, so the final move stays on one
    file system and is one atomic ``os.replace``. Further files written into that folder (external tensor data) move
    first, ``path`` last. When the block fails in any way, a full disk and Ctrl-C included, the scratch folder is
    removed and whatever ``path`` held before stays whole. A symbolic link is written through, not replaced.

    Args:
        path: the file to write; its folder must exist.
        error: the class to raise for what the operating system refuses.

    Raises:
        error: at once when ``path`` cannot be written, or later when writing fails.

    >>> import pathlib, tempfile
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
    >>> with replacing(target, RmfxError) as scratch:
    ...     _ = scratch.write_text("whole")
    >>> target.read_text(), [entry.name for entry in target.parent.iterdir()]
    ('whole', ['note.txt'])
    """
    target = demand_writable(path, error)
    folder = _scratch_folder(target, error)
    try:
        yield folder / target.name
        _publish(folder, target)
    except OSError as problem:
        raise error(f"cannot write {target}: {_reason(problem)}; what was there before is unchanged") from problem
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def demand_writable(path: str | os.PathLike[str], error: type[RmfxError]) -> Path:
    """Where ``path`` leads when its symbolic links are followed, if a file can be written there; nothing is written.

    What exists and is no regular file is refused: a pipe or a device would be replaced by a file of that name.

    Raises:
        error: with what is in the way.
    """
    try:
        target = Path(os.path.realpath(path))
    except (TypeError, ValueError) as problem:  # no path at all, or a zero byte in it
        raise error(f"{path!r} is no path: {problem}") from problem
    if os.path.isdir(target):
        raise error(f"cannot write {target}: it is a folder; give the name of a file")
    if not os.path.isdir(target.parent):
        raise error(f"cannot write {target}: there is no folder {target.parent}; create it first")
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    except OSError as problem:  # a name that is too long, links in a circle
        raise error(f"cannot write {target}: {_reason(problem)}") from problem
    if not stat.S_ISREG(mode):
        raise error(f"cannot write {target}: it is a pipe or a device and no file, and would be lost")
    if not os.access(target, os.W_OK):
        raise error(f"cannot write {target}: the file there is read-only")
    return target


def _scratch_folder(target: Path, error: type[RmfxError]) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=f".{target.name[:50]}.", dir=target.parent))  # 50 are at most 200 bytes
    except OSError as problem:
        raise error(f"cannot write {target}: {_reason(problem)}") from problem


def _publish(folder: Path, target: Path) -> None:
    """Flush every file to the disk, then move them, ``target`` last; they are as readable as any new file here."""
    written = sorted(folder.iterdir(), key=lambda file: file.name == target.name)
    ordinary = folder / ".ordinary"
    ordinary.touch()
    for file in written:
        file.chmod(ordinary.stat().st_mode)
        _flush(file)
    ordinary.unlink()
    for file in written:
        os.replace(file, target.with_name(file.name))


def _flush(path: Path) -> None:
    """Force a file's contents onto the disk, so that a crash after the move finds them there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _reason(problem: OSError) -> str:
    return problem.strerror or str(problem)
