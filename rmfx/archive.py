"""The container of a saved network: one safetensors file whose header also holds JSON documents.

A single safetensors file needs no second container around it: its header is a map of strings beside the table of
tensors, may be 100 MB long (the graph of a 1202-layer network is about 2 MB), and every reader of safetensors can still
list and read the weights. The header holds the format's name, its version, the documents, and a SHA-256 of everything,
so that a flipped bit anywhere is found. The digest detects damage; it is no signature and proves no origin.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmfx.atomic import replacing
from rmfx.errors import FileFormatError
from rmfx.values import Json

FORMAT = "rmfx"
VERSION = 1
DOCUMENTS = ("graph", "report")
HEADER_LIMIT = 90_000_000  # safetensors reads headers up to 100 MB; the rest is left for the table of tensors


def write(path: str | os.PathLike[str], documents: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> Path:
    """Write both to ``path``, completely or not at all.

    Args:
        documents: one JSON value for each name in ``DOCUMENTS``.
        tensors: on the CPU, contiguous, no two sharing memory.

    Raises:
        FileFormatError: when the path cannot be written, the disk is full, a dtype is unknown to safetensors, or the
            documents are larger than a header may be. What was at ``path`` before is then unchanged.
    """
    texts = {name: json.dumps(documents[name], allow_nan=False, separators=(",", ":")) for name in DOCUMENTS}
    size = sum(map(len, texts.values()))
    if size > HEADER_LIMIT:
        raise FileFormatError(f"cannot be saved: the graph takes {size:,} bytes as JSON, the limit is {HEADER_LIMIT:,}")
    header = {"format": FORMAT, "version": str(VERSION), **texts, "sha256": _digest(texts, tensors)}
    with replacing(path, FileFormatError) as scratch:
        try:
            save_file(dict(tensors), scratch, metadata=header)
        except (SafetensorError, KeyError) as problem:
            raise FileFormatError(f"cannot write {path}: {problem}; what was there before is unchanged") from problem
    return Path(path)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The documents and tensors of :func:`write`, on the CPU, in memory of their own.

    Raises:
        FileFormatError: when the file is missing, damaged, not of this format, or of another version.
    """
    header, tensors = _open(path)
    if header.get("format") != FORMAT:
        raise FileFormatError(f"{path} is a safetensors file, but was not written by rmfx.save")
    if header.get("version") != str(VERSION):
        raise FileFormatError(
            f"{path} has file version {header.get('version')!r}, this rmfx reads version {VERSION}: "
            "load it with the rmfx that wrote it"
        )
    texts = {name: header.get(name, "") for name in DOCUMENTS}
    if _digest(texts, tensors) != header.get("sha256"):
        raise FileFormatError(f"{path} is damaged: its checksum does not fit its contents")
    return {name: _parse(path, name, text) for name, text in texts.items()}, tensors


def _open(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileFormatError(f"cannot read {path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned, since the tensors of safetensors view the mapped file, and the file may be replaced.
            return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as problem:  # the parser of safetensors and torch's dtypes fail in many classes
        raise FileFormatError(f"cannot read {path}: it is no whole .rmfx file ({problem})") from problem


def _parse(path: str | os.PathLike[str], name: str, text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as problem:
        raise FileFormatError(f"{path}: its {name} is no JSON ({problem})") from problem


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _digest(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over version, documents, and each tensor's name, dtype, shape and bytes."""
    found = hashlib.sha256(f"{FORMAT} {VERSION}".encode())
    for name, text in sorted(texts.items()):
        found.update(json.dumps([name, text]).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
