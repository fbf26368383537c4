"""How a tensor is carried through a nonlinearity that is meant for its neighbours (the paper's section 3.1).

* **direct**: the activation is the identity on the carried values (ReLU on what a ReLU has made);
* **masked**: the layer applies the activation to some channels and passes the others (PReLU, clamp, ``where``);
* **split**: carry ``[u; -u]`` through ReLU, where ``phi(t) - phi(-t) = t``, and recombine with ``[I, -I]``.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from rmfx.algebra.pointwise import Range, is_identity_on, split_constant
from rmfx.errors import InexactError

Carrier = Literal["direct", "masked", "split"]
CHOICES = ("auto", "direct", "masked", "split")


def choose_carrier(activation: nn.Module, values: Range, wanted: str) -> Carrier:
    """The carrier of ``values`` through ``activation``; direct wherever that is exact, else what is ``wanted``.

    Raises:
        InexactError: when the wanted carrier is not exact here.

    >>> choose_carrier(nn.ReLU(), (0.0, 6.0), "auto"), choose_carrier(nn.ReLU(), (-1.0, 1.0), "auto")
    ('direct', 'masked')
    """
    if is_identity_on(activation, values):
        return "direct"
    name = type(activation).__name__
    if wanted == "direct":
        low, high = values
        raise InexactError(f"carrier 'direct' needs {name} to be the identity on [{low:g}, {high:g}], which it is not")
    if wanted == "split":
        if split_constant(activation) is None:
            raise InexactError(f"carrier 'split' passes ReLU, not {name}")
        return "split"
    return "masked"
