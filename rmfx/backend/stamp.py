"""What the weights were when they were folded, to see on each call whether they still are."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_VERSION = operator.attrgetter("_version")
_WHOLE = 4096  # elements: running statistics, shifts, scales
_END = 32  # elements at either end of a larger tensor


@dataclass(frozen=True, eq=False)
class Stamp:
    """The weights of one call: which tensors, where they lie, how often they were written, and what they hold.

    Versions do not count all writes: fused optimisers raise none, nor do batch norms that update their statistics. So
    contents are compared, too: of small tensors all, of larger ones both ends, which any step of an optimiser changes.

    Attributes:
        weights: the tensors.
        storages: their memory. Held, so that none of it is given to another tensor while addresses are compared.
        addresses: where they lie.
        counted: those whose versions are compared.
        versions: of them at that time.
        views: of what they hold, those of one device and dtype together.
        contents: of those views at that time, in bytes.
        hashed: those that are compared as a whole by a hash: they have no version, or gaps between their elements.
        digest: of them at that time.

    >>> weight = torch.ones(2)
    >>> stamp = Stamp.of([weight])
    >>> stamp.holds([weight]), stamp.holds([torch.ones(2)])
    (True, False)
    >>> _ = weight.add_(1)
    >>> stamp.holds([weight])
    False
    >>> stamp = Stamp.of([weight])
    >>> weight.numpy()[0] = 5  # counted by nobody
    >>> stamp.holds([weight])
    False
    """

    weights: Sequence[Tensor]
    storages: Sequence[torch.UntypedStorage]
    addresses: Sequence[int]
    counted: Sequence[Tensor]
    versions: Sequence[int]
    views: Sequence[Sequence[Tensor]]
    contents: Sequence[bytes]
    hashed: Sequence[Tensor]
    digest: bytes

    @classmethod
    def of(cls, weights: Sequence[Tensor], by_hash: bool = False) -> Stamp:
        """The stamp of ``weights`` as they are now.

        Args:
            weights: strided tensors on any device.
            by_hash: compare everything that all of them hold.
        """
        hashed = [weight for weight in weights if by_hash or weight.is_inference() or not _is_dense(weight)]
        counted = [weight for weight in weights if not weight.is_inference()]
        views = [] if by_hash else _views([weight for weight in counted if _is_dense(weight)])
        return cls(
            weights,
            [weight.untyped_storage() for weight in weights],
            list(map(Tensor.data_ptr, weights)),
            counted,
            list(map(_VERSION, counted)),
            views,
            list(map(_bytes, views)),
            hashed,
            digest(hashed),
        )

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether ``weights``, as many as there were, are the same and unchanged."""
        return (
            all(map(operator.is_, weights, self.weights))
            and list(map(Tensor.data_ptr, weights)) == self.addresses
            and list(map(_VERSION, self.counted)) == self.versions
            and (_is_recorded() or all(map(operator.eq, map(_bytes, self.views), self.contents)))
            and (not self.hashed or digest(self.hashed) == self.digest)
        )


def _is_recorded() -> bool:
    """Whether a CUDA graph is recorded: nothing can be read on the host then, and its replays check nothing anyway."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _is_dense(weight: Tensor) -> bool:
    """Whether the elements lie side by side in memory, in any order."""
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return weight.numel() > 0 and last == weight.numel() - 1


def _views(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """What of dense tensors is compared, as vectors in their own memory; those of one device and dtype together."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for weight in weights:
        flat = weight.detach().as_strided((weight.numel(),), (1,), weight.storage_offset())
        parts = [flat] if len(flat) <= _WHOLE else [flat[:_END], flat[-_END:]]
        found.setdefault((weight.device, weight.dtype), []).extend(parts)
    return list(found.values())


def _bytes(views: Sequence[Tensor]) -> bytes:
    """What vectors hold: collected where they lie, and read on the host at once."""
    return torch.cat(list(views)).cpu().view(torch.uint8).numpy().tobytes()


def digest(tensors: Sequence[Tensor]) -> bytes:
    """A hash of the contents of ``tensors``, which it reads on the host: about 2 GB/s.

    >>> digest([torch.ones(2)]) == digest([torch.ones(2)]), digest([torch.ones(2)]) == digest([torch.zeros(2)])
    (True, False)
    """
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.digest()
