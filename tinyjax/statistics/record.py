"""The record of sums from which every growth decision is taken.

All quantities of the paper (S, N, the best update, the expressivity bottleneck) are small functions of second moments
of three variables: the input b_prev of the widened layer, the input b of its consumer, and V_goal at the consumer's
pre-activation. Second moments are sums over samples, so batches, chunks, devices and hosts just add. The record keeps
raw sums, for the even and the odd samples apart, and divides once, here: one half can then judge what the other has
chosen.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.neurons import Pattern
from tinyjax.statistics.spectra import Spectra

_FLAT = 1e-3
LINEAR = ("cross_prev", "cross_asked", "link")
"""The sums in which b_prev enters once."""

_SUMS = (
    "count",
    "gram_prev",
    "cross_prev",
    "gram",
    "cross",
    "link",
    "energy",
    "energy_matrix",
    "cross_asked",
    "gram_out",
    "null",
    "offset_gram",
    "third_moments",
    "grams",
)


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Raw sums over samples (and over positions, for layers applied at many); axis 0 is (even samples, odd samples).

    D and H are the inputs of the producer and of the consumer, with the constant 1 last iff the layer has a bias; M
    is the consumer's number of outputs; O its number of kernel offsets (1 for a dense layer); Q = M O, ordered (M,
    O); C the number of slots. Free slots give rows and columns of exact zeros. A stack of layers puts its axis before
    all others.

    A site with heads (the value dimension of attention) keeps b_prev of all heads and offsets side by side, ordered
    (head, offset, input): D is then heads times offsets times its inputs in S, N~ and P, Q is M, O is 1 in P, and
    `weight_prev` is (heads, inputs, C).

    Attributes:
        count: (2,) number of samples, in the dtype of the sums.
        gram_prev: (2, D, D) S = sum of b_prev b_prev'.
        cross_prev: (2, D, Q) N~ = sum of b_prev v', v = V_goal = -n dloss/da. Already projected when `link` is None:
            then `cross_asked` is N~.
        gram: (2, H, H) G = sum of b b'.
        cross: (2, H, M) sum of b v'.
        link: (2, O, D, H) P = sum of b_prev b' for each kernel offset; None where it would be too large.
        energy: (2,) sum of |v|^2; of each consumer over its share, where there are `shares`.
        energy_matrix: (2, Q, Q) sum of v v', or None when it was not asked for.
        weight_prev: (D, C) matrix of the producer, bias row last.
        weight: (H, M) matrix of the consumer, bias row last.
        width: () number of used slots.
        bias_prev: whether the producer has a bias.
        bias: whether the consumer has a bias.
        ridge: () the ridge of neurons chosen on held-out samples, by `with_ridges`; None: not yet chosen.
        ridge_update: () the same for the best update.
        cross_asked: (2, D, Q) N~ where `link` is None, else None.
        null: sign-flipped sums, or None when they were not asked for.
        offset_gram: (2, O, D, O, D) sum over output pixels of what two kernel offsets read of b_prev, or None when it
            was not asked for.
        gates: (B, C) for a gated unit the fan-ins of C new gates, bias row last iff the gate has one; D then counts C
            blocks side by side, b_prev = [g(beta_c' x) x for every gate beta_c], and `weight_prev` has the rows of one.
            For a site of whole attention heads the `Pattern` of C new ones: block c is then what head c collects, and
            U neurons read through it, its value dimensions. None elsewhere.
        heads: how many heads the slots come in, None without.
        spectra: of `gram_prev`, where it is known from earlier growths on the same samples; else None.
        gram_out: (2, Q, Q) R, the metric on the outputs of a query-key pair; None for the identity.
        shares: for each column of the consumers, how many of the rows of b it reads (of recurrent units: the readout of
            the last state one of many). S and G are over all rows; such a column counts as if it read its share of each
            of them. None where all read all.
        third_moments: (2, R, D, D) sum of (w_r' v) b_prev b_prev' with v the residual of the best update, or None when
            they were not asked for.
        third_outputs: (R, Q) the orthonormal w_r: the directions in which the residual is largest.
        curvature: sigma''(0) of the activation, as `tinyjax.discovery.paths.activations` measures it; 0 without third
            moments.
        grams: (2, R, D, D) for a residual stream with R readers the S of each, of which `gram_prev` is the sum and a
            bound; None elsewhere. D then counts the inputs of all writers one below the other, each with the constant
            if it has a bias, and H the inputs of all readers: `gram`, `cross` and `weight` are block-diagonal.
        reads: (R, Q) 1 where an output belongs to the reader, else 0; None elsewhere.
        normed: whether a norm sees what a new neuron writes, so that only a fan-in of zero changes nothing.
        slope: sigma'(0), of all that lies between producer and consumers. b_prev in N~ and P carries its sign (what a
            slot makes falls at the consumers where the slope is negative), so that methods need not look; 1 where it
            carries the slope itself. None where it is no number, or differs between the uses of a kernel.
    """

    count: Array
    gram_prev: Array
    cross_prev: Array
    gram: Array
    cross: Array
    link: Array | None
    energy: Array
    energy_matrix: Array | None
    weight_prev: Array
    weight: Array
    width: Array
    bias_prev: bool = dataclasses.field(metadata={"static": True})
    bias: bool = dataclasses.field(metadata={"static": True})
    ridge: Array | None = None
    ridge_update: Array | None = None
    cross_asked: Array | None = None
    null: Null | None = None
    offset_gram: Array | None = None
    gates: Array | Pattern | None = None
    spectra: Spectra | None = None
    heads: int | None = dataclasses.field(default=None, metadata={"static": True})
    gram_out: Array | None = None
    shares: tuple[float, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    third_moments: Array | None = None
    third_outputs: Array | None = None
    curvature: float = dataclasses.field(default=0.0, metadata={"static": True})
    grams: Array | None = None
    reads: Array | None = None
    normed: bool = dataclasses.field(default=False, metadata={"static": True})
    slope: float | None = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def is_flat(self) -> bool:
        """Whether the slope tells no sign: it is not known, or nothing."""
        return self.slope is None or abs(self.slope) < _FLAT


def turned(statistics: Statistics) -> Statistics:
    """The statistics of the network whose slots act with the other sign: N~ and P are linear in b_prev, S is even."""
    null, slope = statistics.null, statistics.slope
    if null is not None:
        null = null._replace(cross_prev=-null.cross_prev, link=-null.link)
    linear = {name: None if (x := getattr(statistics, name)) is None else -x for name in LINEAR}
    return dataclasses.replace(statistics, null=null, slope=None if slope is None else -slope, **linear)


def without_rows(statistics: Statistics, rows: Sequence[int]) -> Statistics:
    """The statistics as if these entries of b were always zero: an update leaves their weights alone.

    Of a record without `link` the residual stays what it was, that of an update of all weights.
    """
    if not rows:
        return statistics
    index = jnp.asarray(rows)

    def emptied(sums: Any) -> dict[str, Array | None]:
        gram = sums.gram.at[..., index, :].set(0).at[..., :, index].set(0)
        link = None if sums.link is None else sums.link.at[..., index].set(0)
        return dict(gram=gram, cross=sums.cross.at[..., index, :].set(0), link=link)

    null = None if statistics.null is None else statistics.null._replace(**emptied(statistics.null))
    return dataclasses.replace(statistics, null=null, **emptied(statistics))


def _replace_sums(statistics: Statistics, value: Callable[[str], Array | None]) -> Statistics:
    return dataclasses.replace(statistics, **{name: value(name) for name in _SUMS})
