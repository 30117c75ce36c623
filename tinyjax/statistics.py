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

from tinyjax.spectra import Spectra, Spectrum

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
        curvature: sigma''(0) of the activation, as `tinyjax.parity` measures it; 0 without third moments.
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


class Moments(NamedTuple):
    """Means over samples: the fields of `Statistics` without their leading axis, divided by the number of samples.

    `spectrum` is that of `gram_prev` where it is known, and `other` the mean of the other half in its eigenbasis.
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
    spectrum: Spectrum | None = None
    other: Array | None = None
    gram_out: Array | None = None
    third_moments: Array | None = None
    grams: Array | None = None
    reads: Array | None = None


def turned(statistics: Statistics) -> Statistics:
    """The statistics of the network whose slots act with the other sign: N~ and P are linear in b_prev, S is even."""
    null, slope = statistics.null, statistics.slope
    if null is not None:
        null = null._replace(cross_prev=-null.cross_prev, link=-null.link)
    linear = {name: None if (x := getattr(statistics, name)) is None else -x for name in LINEAR}
    return dataclasses.replace(statistics, null=null, slope=None if slope is None else -slope, **linear)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of the samples of `a` and of `b` together.

    The sums are meaningful only if both were taken at the same parameters; weights and width are those of `b`.

    Raises:
        ValueError: the two do not describe the same layers, or hold third moments, each along its own outputs.

    Example:
        >>> more = data.Batch(images[::-1], batch.label[::-1])
        >>> both = tinyjax.merge(estimate(params, batch), estimate(params, more))
        >>> float(jnp.sum(both.count))
        128.0
    """
    structures = [jax.tree.map(jnp.shape, x) for x in (a, b)]
    if structures[0] != structures[1]:
        raise ValueError(
            "`merge` got statistics of different shapes or fields; merge only statistics of one site at one capacity, "
            f"estimated with the same options. Got {structures[0]} and {structures[1]}."
        )
    if a.third_outputs is not None:
        raise ValueError(
            "third moments of two records cannot be added: they belong to the residual of either's samples"
        )
    added = _replace_sums(b, lambda name: jax.tree.map(jnp.add, getattr(a, name), getattr(b, name)))
    return dataclasses.replace(added, ridge=None, ridge_update=None, spectra=None)


def merge_over(statistics: Statistics, axis_name: str | tuple[str, ...]) -> Statistics:
    """The statistics of all devices along a mesh axis together; for use inside `jax.shard_map`.

    Every device estimates on its own samples; only the sums travel (`jax.lax.psum`). The losses of the devices must be
    means over their own samples, and the parameters replicated.

    Args:
        statistics: of the samples of this device.
        axis_name: the axis of the mesh, or several.

    Returns:
        The same record on every device: what follows from it (ridges, neurons) is computed on each, alike.

    Raises:
        ValueError: the site is too wide for statistics to be added.

    Example:
        >>> def on_a_device(params, batch):
        ...     return tinyjax.merge_over(tinyjax.estimate(loss_fn, params, batch, site), "data")
        >>> P, mesh = jax.sharding.PartitionSpec, jax.sharding.Mesh(jax.devices(), ("data",))
        >>> specs = dict(in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
        >>> statistics = jax.jit(jax.shard_map(on_a_device, mesh=mesh, **specs))(params, batch)
    """
    anew = {"gates": statistics.gates, "third moments": statistics.third_outputs}
    chosen = [what for what, value in anew.items() if value is not None]
    if statistics.link is None or chosen:
        why = f"chooses its {chosen[0]} anew on every device" if chosen else "is too wide"
        raise ValueError(f"this site {why}, so that its statistics cannot be added: let `jit` shard the batch instead")
    added = _replace_sums(statistics, lambda name: jax.lax.psum(getattr(statistics, name), axis_name))
    return dataclasses.replace(added, ridge=None, ridge_update=None, spectra=None)


def moments(statistics: Statistics) -> Moments:
    """Means over all samples.

    Example:
        >>> S = tinyjax.moments(statistics).gram_prev  # (D, D): the paper's S
        >>> S.shape
        (5, 5)
    """
    mean = _divide(statistics, lambda x: x[0] + x[1])  # XLA is slow to reduce an axis of two
    return mean if statistics.spectra is None else mean._replace(spectrum=statistics.spectra.of(2))


def half(statistics: Statistics, index: int) -> Moments:
    """Means over the even (`index` 0) or the odd (`index` 1) samples."""
    mean, spectra = _divide(statistics, lambda x: x[index]), statistics.spectra
    return mean if spectra is None else mean._replace(spectrum=spectra.of(index), other=spectra.other[index])


def keep_half(statistics: Statistics, index: int) -> Statistics:
    """The statistics of the even or of the odd samples alone: the other half is empty."""
    return keep_halves(statistics, jnp.arange(2) == index)


def energy_alone(statistics: Statistics) -> Statistics:
    """The statistics with zeros for all sums but the energy, so that the compiler forms no others."""
    kept = ("count", "energy")

    def value(name: str) -> Array | None:
        found = getattr(statistics, name)
        return found if name in kept else jax.tree.map(jnp.zeros_like, found)

    return _replace_sums(statistics, value)


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


def keep_halves(statistics: Statistics, kept: Array) -> Statistics:
    """The statistics of the halves marked in `kept` (2,) booleans; the others are empty.

    Ridges that were chosen for all samples grow as the samples become fewer.
    """
    total = jnp.sum(statistics.count, axis=-1)
    left = jnp.sum(jnp.where(kept, statistics.count, 0), axis=-1)
    fewer = total / jnp.where(left > 0, left, total)

    def keep(x: Array) -> Array:
        return jnp.where(kept.reshape(2, *[1] * (x.ndim - 1)), x, 0)

    found = _replace_sums(statistics, lambda name: jax.tree.map(keep, getattr(statistics, name)))
    ridges = {name: getattr(found, name) for name in ("ridge", "ridge_update")}
    found = dataclasses.replace(found, **{name: None if r is None else fewer * r for name, r in ridges.items()})
    if found.spectra is None:
        return found
    part = jnp.where(kept[0], jnp.where(kept[1], 2, 0), 1)
    of_part = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape)), found.spectra.of(part))
    return dataclasses.replace(found, spectra=Spectra(of_part, found.spectra.other))


def num_gates(statistics: Statistics) -> int:
    """C, of how many new gates (or patterns of whole heads) the record holds blocks; 1 for any other site."""
    return 1 if statistics.gates is None else jax.tree.leaves(statistics.gates)[-1].shape[-1]


def neurons_a_gate(statistics: Statistics) -> int:
    """How many neurons read through a block: the value dimensions of a whole head, else 1."""
    return statistics.gates.values.shape[-2] if isinstance(statistics.gates, Pattern) else 1


def one_gate(statistics: Statistics, index: int | Array) -> Statistics:
    """The statistics for one of the gates (or patterns) alone: an ordinary record."""
    if statistics.gates is None:
        return statistics
    size = statistics.gram_prev.shape[-1] // num_gates(statistics)

    def block(x: Array | None, axis: int) -> Array | None:
        return None if x is None else jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=x.ndim + axis)

    return dataclasses.replace(
        statistics,
        gram_prev=block(block(statistics.gram_prev, -1), -2),
        cross_prev=block(statistics.cross_prev, -2),
        link=block(statistics.link, -2),
        cross_asked=block(statistics.cross_asked, -2),
        gates=None,
        null=None,
    )


def _replace_sums(statistics: Statistics, value: Callable[[str], Array | None]) -> Statistics:
    return dataclasses.replace(statistics, **{name: value(name) for name in _SUMS})


def _divide(statistics: Statistics, select: Callable[[Array], Array]) -> Moments:
    count = select(statistics.count)
    count = jnp.where(count > 0, count, 1)  # no samples: the sums are zeros, and so are the means
    sums = {name: getattr(statistics, name) for name in _SUMS if name != "count"}
    return Moments(**jax.tree.map(lambda x: select(x) / count, sums), reads=statistics.reads)
