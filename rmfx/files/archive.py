"""The container of a saved network: one safetensors file whose header also holds a JSON document.

A single safetensors file needs no second container around it: its header takes strings beside the table of tensors, may
be 100 MB long (the graph of a 1202-layer network is about 2 MB), and every reader of safetensors can still list and
read the weights. The document stands in the header under the key ``"rmfx"``: ``{"version": 1, "sha256": "...",
"content": ...}``. The digest covers the document and all tensors, so that a flipped bit anywhere is found; it detects
damage, and is no signature. One key, since safetensors writes several in random order: equal networks make equal files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save_file
from torch import Tensor

from rmfx.errors import FileFormatError
from rmfx.files.atomic import replacing
from rmfx.files.values import Json, fields

KEY = "rmfx"
VERSION = 1
HEADER_LIMIT = 90_000_000  # safetensors reads headers up to 100 MB; the rest is left for the table of tensors
_LENGTH = 8  # bytes at the head of the file, which hold the length of its header
_FIELDS = {"version": int, "sha256": str, "content": object}


def write(path: str | os.PathLike[str], content: Json, tensors: Mapping[str, Tensor]) -> Path:
    """Write both to ``path``, completely or not at all.

    Args:
        content: a JSON value.
        tensors: on the CPU, contiguous, no two sharing memory.

    Raises:
        FileFormatError: when the path cannot be written, the disk is full, a dtype is unknown to safetensors, or the
            content is larger than a header may be. What was at ``path`` before is then unchanged.
    """
    digest = _digest(content, tensors)
    document = json.dumps({"version": VERSION, "sha256": digest, "content": content}, allow_nan=False)
    if len(document) > HEADER_LIMIT:
        size = f"{len(document):,} bytes as JSON, the limit is {HEADER_LIMIT:,}"
        raise FileFormatError(f"cannot be saved: the graph takes {size}")
    with replacing(path, FileFormatError) as scratch:
        try:
            save_file(dict(tensors), scratch, metadata={KEY: document})
        except (SafetensorError, KeyError) as problem:
            raise FileFormatError(f"cannot write {path}: {problem}; what was there before is unchanged") from problem
    return Path(path)


def read(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """The content and tensors of :func:`write`, on the CPU, in memory of their own.

    Raises:
        FileFormatError: when the file is missing, damaged, not of this format, or of another version.
    """
    header, tensors = _open(path)
    if KEY not in header:
        raise FileFormatError(f"{path} is a safetensors file, but was not written by rmfx.save")
    document = _parse(path, header[KEY])
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION:
        raise FileFormatError(
            f"{path} has file version {version!r}, this rmfx reads version {VERSION}: "
            "load it with the rmfx that wrote it"
        )
    _, digest, content = fields(document, "saved network", _FIELDS)
    try:
        whole = _digest(content, tensors) == digest
    except RecursionError as problem:
        raise FileFormatError(f"{path} holds no document of rmfx.save: it nests too deep") from problem
    if not whole:
        raise FileFormatError(f"{path} is damaged: its checksum does not fit its contents")
    return content, tensors


def _open(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        file = Path(path)
    except TypeError as problem:
        raise FileFormatError(f"{path!r} is no path: {problem}") from problem
    if not os.path.isfile(file):
        raise FileFormatError(f"cannot read {path}: there is no such file")
    try:
        whole = file.read_bytes()  # at once: `safe_open` opens the path twice, and it may be replaced in between
        tensors = safetensors_load(whole)
        header = json.loads(whole[_LENGTH : _LENGTH + int.from_bytes(whole[:_LENGTH], "little")])
    except Exception as problem:  # the parser of safetensors and torch's dtypes fail in many classes
        raise FileFormatError(f"cannot read {path}: it is no whole .rmfx file ({problem})") from problem
    return header.get("__metadata__") or {}, tensors


def _parse(path: str | os.PathLike[str], text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as problem:
        raise FileFormatError(f"{path} holds no JSON document: {problem}") from problem


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _digest(content: Json, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the version, the content, and each tensor's name, dtype, shape and bytes."""
    found = hashlib.sha256(json.dumps([VERSION, content], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
