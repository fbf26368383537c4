"""What the weights were when they were folded, to see on each call whether they still are."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_VERSION = operator.attrgetter("_version")


@dataclass(frozen=True, eq=False)
class Stamp:
    """The weights of one call: which tensors, where they lie, how often they were written, or what they hold.

    Attributes:
        weights: the tensors.
        storages: their memory. Held, so that none of it is given to another tensor while addresses are compared.
        addresses: where they lie.
        counted: those whose versions are compared; the contents of the others are.
        versions, digest: the same at that time.

    >>> weight = torch.ones(2)
    >>> stamp = Stamp.of([weight])
    >>> stamp.holds([weight]), stamp.holds([torch.ones(2)])
    (True, False)
    >>> _ = weight.add_(1)
    >>> stamp.holds([weight])
    False
    """

    weights: Sequence[Tensor]
    storages: Sequence[torch.UntypedStorage]
    addresses: Sequence[int]
    counted: Sequence[Tensor]
    versions: Sequence[int]
    hashed: Sequence[Tensor]
    digest: bytes

    @classmethod
    def of(cls, weights: Sequence[Tensor], by_hash: bool = False) -> Stamp:
        """The stamp of ``weights`` as they are now.

        Args:
            weights: strided tensors on any device.
            by_hash: compare what all of them hold, instead of what tensors without a version counter hold.
        """
        hashed = [weight for weight in weights if by_hash or weight.is_inference()]
        counted = [] if by_hash else [weight for weight in weights if not weight.is_inference()]
        return cls(
            weights,
            [weight.untyped_storage() for weight in weights],
            list(map(Tensor.data_ptr, weights)),
            counted,
            list(map(_VERSION, counted)),
            hashed,
            digest(hashed),
        )

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether ``weights``, as many as there were, are the same and unchanged: 0.1 us for each, without a hash."""
        return (
            all(map(operator.is_, weights, self.weights))
            and list(map(Tensor.data_ptr, weights)) == self.addresses
            and list(map(_VERSION, self.counted)) == self.versions
            and (not self.hashed or digest(self.hashed) == self.digest)
        )


def digest(tensors: Sequence[Tensor]) -> bytes:
    """A hash of the contents of ``tensors``, which it reads on the host: about 2 GB/s.

    >>> digest([torch.ones(2)]) == digest([torch.ones(2)]), digest([torch.ones(2)]) == digest([torch.zeros(2)])
    (True, False)
    """
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.digest()
