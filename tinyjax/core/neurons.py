"""New neurons: what a method returns and surgery writes."""

import math
from typing import Any, NamedTuple

from jaxtyping import Array


class Neurons(NamedTuple):
    """New neurons, before their amplitude.

    Attributes:
        alpha: (D, k) fan-in, bias row last iff the producer has a bias; (heads, D, k) for a site with heads.
        omega: (k, Q) fan-out, columns (output, head, offset).
        singular_values: (k,) descending; 0 for neurons beyond the rank, whose alpha and omega are zero.
        delta: (H, M) an update of the consumer that belongs to the neurons and is applied with their amplitude, or
            None.
        gate: (B, k) fan-in of the gates of gated units, which no amplitude scales; None elsewhere. With one, `alpha`
            has a block of rows for every gate of the statistics, and neuron k reads through block k alone. For whole
            heads their `Pattern`, and k counts the value dimensions of all of them, head after head.
        second_order: (k,) what the loss falls by at amplitude gamma is gamma^(3/2) times their sum, for neurons that do
            nothing to first order; None where all do.
    """

    alpha: Array
    omega: Array
    singular_values: Array
    delta: Array | None = None
    gate: Any = None
    second_order: Array | None = None


HE_NORM = math.sqrt(2.0)  # norm of a fan-in vector of variance 2 / fan_in


class Pattern(NamedTuple):
    """Queries and keys of new attention heads, and how many value dimensions they have.

    Attributes:
        query: (k, D, C) of C heads, the constant's row last iff the queries have a bias.
        key: (k, E, C), with a row of zeros last iff the keys have a bias.
        values: (U, C) booleans, which value dimensions a head may use.
    """

    query: Array
    key: Array
    values: Array
