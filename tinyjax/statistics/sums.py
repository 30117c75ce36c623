"""Second moments of three variables, and their symbols: the one declaration that sums, means and the record share.

All quantities of the paper (S, N, the best update, the expressivity bottleneck) are small functions of second moments
of the input b_prev of the widened layer, the input b of its consumer, and v = V_goal = -n dloss/da at the consumer's
pre-activation a.
"""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
from jaxtyping import Array

T = TypeVar("T", bound="SecondMoments")


class Null(NamedTuple):
    """Sums with a random sign for each sample, R times: what the moments look like when nothing is asked for.

    Axis 0 is (even samples, odd samples), axis 1 the draw.

    Attributes:
        cross_prev: (2, R, D, Q) sum of sign b_prev v'.
        gram: (2, R, H, H) sum of sign b b'.
        cross: (2, R, H, M) sum of sign b v'.
        link: (2, R, O, D, H) sum of sign b_prev b'.
    """

    cross_prev: Array
    gram: Array
    cross: Array
    link: Array


class Extras(NamedTuple):
    """What to sum besides the usual sums.

    Attributes:
        energy_matrix: whether the `energy_matrix`.
        offset_gram: whether the `offset_gram`.
        signs: (R, n) of each sample in each null draw; None for no null sums.
    """

    energy_matrix: bool = False
    offset_gram: bool = False
    signs: Array | None = None


USUAL = Extras()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondMoments:
    """Sums or means over samples (and over positions, for layers applied at many).

    D and H are the inputs of the producer and of the consumer, with the constant 1 last iff the layer has a bias; M
    is the consumer's number of outputs; O its number of kernel offsets (1 for a dense layer); Q = M O, ordered (M,
    O); C the number of slots. Free slots give rows and columns of exact zeros. In sums an axis of two is in front,
    (even samples, odd samples), and a stack of layers puts its axis before all others.

    A site with heads (the value dimension of attention) keeps b_prev of all heads and offsets side by side, ordered
    (head, offset, input): D is then heads times offsets times its inputs in S, N~ and P, Q is M, O is 1 in P.

    Attributes:
        gram_prev: (D, D) S, of b_prev b_prev'.
        cross_prev: (D, Q) N~, of b_prev v'. Already projected, N, when `link` is None: then `cross_asked` is N~.
        gram: (H, H) G, of b b'.
        cross: (H, M) M, of b v'.
        link: (O, D, H) P, of b_prev b' for each kernel offset; None where it would be too large.
        energy: () of |v|^2; of each consumer over its share, where there are `shares`.
        energy_matrix: (Q, Q) E, of v v', or None when it was not asked for.
        cross_asked: (D, Q) N~ where `link` is None, else None.
        null: the same with flipped signs, or None when they were not asked for.
        offset_gram: (O, D, O, D) of what two kernel offsets read of b_prev, over output pixels, or None when it was not
            asked for.
        gram_out: (Q, Q) R, the metric on the outputs of a query-key pair; None for the identity.
        third_moments: (R, D, D) of (w_r' v) b_prev b_prev' with v the residual of the best update, or None when they
            were not asked for.
        grams: (R, D, D) for a residual stream with R readers the S of each, of which `gram_prev` is the sum and a
            bound; None elsewhere. D then counts the inputs of all writers one below the other, each with the constant
            if it has a bias, and H the inputs of all readers: `gram`, `cross` and `weight` are block-diagonal.
    """

    gram_prev: Array
    cross_prev: Array
    gram: Array
    cross: Array
    link: Array | None
    energy: Array
    energy_matrix: Array | None
    cross_asked: Array | None = None
    null: Null | None = None
    offset_gram: Array | None = None
    gram_out: Array | None = None
    third_moments: Array | None = None
    grams: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums(SecondMoments):
    """The raw sums of one path over the samples of a pass; axis 0 is (even samples, odd samples).

    Attributes:
        ridge_update: () of the update that N is already projected against; None: as yet not chosen.
    """

    ridge_update: Array | None = None


def second_moments(record: SecondMoments) -> dict[str, Any]:
    """The fields of `SecondMoments` by name."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(SecondMoments)}


def negated(record: T) -> T:
    """The record with -b_prev in place of b_prev: N~ and P are linear in it, S is even."""
    null = record.null
    if null is not None:
        null = null._replace(cross_prev=-null.cross_prev, link=-null.link)
    linear = {name: jax.tree.map(lambda x: -x, getattr(record, name)) for name in ("cross_prev", "cross_asked", "link")}
    return dataclasses.replace(record, null=null, **linear)
