"""The record of sums from which every growth decision is taken.

Second moments are sums over samples, so batches, chunks, devices and hosts just add. The record keeps raw sums, for the
even and the odd samples apart, and `moments` divides once: one half can then judge what the other has chosen.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.neurons import Pattern
from tinyjax.statistics.spectra import Spectra
from tinyjax.statistics.sums import Sums, negated, second_moments

_FLAT = 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics(Sums):
    """The raw sums of `SecondMoments` at a site, axis 0 is (even samples, odd samples), and what belongs to them.

    Attributes:
        count: (2,) number of samples, in the dtype of the sums.
        weight_prev: (D, C) matrix of the producer, bias row last; (heads, inputs, C) at a site with heads.
        weight: (H, M) matrix of the consumer, bias row last.
        width: () number of used slots.
        bias_prev: whether the producer has a bias.
        bias: whether the consumer has a bias.
        ridge: () the ridge of neurons chosen on held-out samples, by `with_ridges`; None: not yet chosen. The same for
            the best update is `ridge_update`.
        gates: (B, C) for a gated unit the fan-ins of C new gates, bias row last iff the gate has one; D then counts C
            blocks side by side, b_prev = [g(beta_c' x) x for every gate beta_c], and `weight_prev` has the rows of one.
            For a site of whole attention heads the `Pattern` of C new ones: block c is then what head c collects, and
            U neurons read through it, its value dimensions. None elsewhere.
        heads: how many heads the slots come in, None without.
        spectra: of `gram_prev`, where it is known from earlier growths on the same samples; else None.
        shares: for each column of the consumers, how many of the rows of b it reads (of recurrent units: the readout of
            the last state one of many). S and G are over all rows; such a column counts as if it read its share of each
            of them. None where all read all.
        third_outputs: (R, Q) the orthonormal w_r of the third moments: the directions in which the residual is largest.
        curvature: sigma''(0) of the activation, as `tinyjax.discovery.paths.activations` measures it; 0 without third
            moments.
        reads: (R, Q) for a residual stream with R readers, 1 where an output belongs to the reader, else 0; None
            elsewhere.
        normed: whether a norm sees what a new neuron writes, so that only a fan-in of zero changes nothing.
        slope: sigma'(0), of all that lies between producer and consumers. b_prev in N~ and P carries its sign (what a
            slot makes falls at the consumers where the slope is negative), so that methods need not look; 1 where it
            carries the slope itself. None where it is no number, or differs between the uses of a kernel.
    """

    count: Array
    weight_prev: Array
    weight: Array
    width: Array
    bias_prev: bool = dataclasses.field(metadata={"static": True})
    bias: bool = dataclasses.field(metadata={"static": True})
    ridge: Array | None = None
    gates: Array | Pattern | None = None
    heads: int | None = dataclasses.field(default=None, metadata={"static": True})
    spectra: Spectra | None = None
    shares: tuple[float, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    third_outputs: Array | None = None
    curvature: float = dataclasses.field(default=0.0, metadata={"static": True})
    reads: Array | None = None
    normed: bool = dataclasses.field(default=False, metadata={"static": True})
    slope: float | None = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def is_flat(self) -> bool:
        """Whether the slope tells no sign: it is not known, or nothing."""
        return self.slope is None or abs(self.slope) < _FLAT


def turned(statistics: Statistics) -> Statistics:
    """The statistics of the network whose slots act with the other sign."""
    slope = statistics.slope
    return dataclasses.replace(negated(statistics), slope=None if slope is None else -slope)


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


def map_sums(function: Callable[..., Array], *records: Statistics) -> Statistics:
    """The first record with a function of the count and of every sum of all records in place of its own."""
    sums = [{"count": record.count} | second_moments(record) for record in records]
    found = {name: jax.tree.map(function, *(each[name] for each in sums)) for name in sums[0]}
    return dataclasses.replace(records[0], **found)
