"""Parts of a record: half of the samples, one head, one gate."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.neurons import Pattern
from tinyjax.statistics.offsets import cross_at_offsets, energy_at_offsets, gram_at_offsets
from tinyjax.statistics.record import Statistics, map_sums
from tinyjax.statistics.spectra import Spectra


def one_head(statistics: Statistics, head: Array | int, taken: Array | None = None) -> Statistics:
    """The statistics of one head, as of a dense site, or as of a convolution where it is read at several offsets.

    Args:
        statistics: of a site with heads.
        head: which.
        taken: (heads, offsets, D, M) what neurons of other heads do, alpha omega; None for none.
    """
    heads, inputs = statistics.heads, statistics.weight_prev.shape[-2]
    assert heads is not None and statistics.link is not None
    outputs = statistics.cross_prev.shape[-1]
    block = statistics.gram_prev.shape[-1] // heads
    offsets = block // inputs
    gram = statistics.gram_prev.reshape(2, heads, block, heads, block)[:, head]
    cross = statistics.cross_prev.reshape(2, heads, block, outputs)[:, head]
    if taken is not None:
        others = jnp.einsum("sigj,gjm->sim", gram, taken.reshape(heads, block, outputs), precision="highest")
        cross = cross - others
    link = statistics.link.reshape(2, heads, block, -1)[:, head]
    hidden = statistics.weight.shape[0] - statistics.bias
    own, bias = statistics.weight[:hidden].reshape(heads, -1, outputs)[head], statistics.weight[hidden:]
    return dataclasses.replace(
        statistics,
        gram_prev=gram_at_offsets(jnp.take(gram, head, axis=2), offsets),
        cross_prev=cross_at_offsets(cross, offsets),
        link=link.reshape(2, offsets, inputs, -1),
        energy_matrix=energy_at_offsets(statistics.energy_matrix, offsets),
        weight_prev=statistics.weight_prev[head],
        weight=jnp.concatenate([own, bias]),
        ridge=None if statistics.ridge is None else statistics.ridge[head],
        offset_gram=jnp.take(gram, head, axis=2).reshape(2, offsets, inputs, offsets, inputs),
        null=None,
        heads=None,
    )


def keep_half(statistics: Statistics, index: int) -> Statistics:
    """The statistics of the even or of the odd samples alone: the other half is empty."""
    return keep_halves(statistics, jnp.arange(2) == index)


def energy_alone(statistics: Statistics) -> Statistics:
    """The statistics with zeros for all sums but the energy, so that the compiler forms no others."""
    zeros = map_sums(jnp.zeros_like, statistics)
    return dataclasses.replace(zeros, count=statistics.count, energy=statistics.energy)


def keep_halves(statistics: Statistics, kept: Array) -> Statistics:
    """The statistics of the halves marked in `kept` (2,) booleans; the others are empty.

    Ridges that were chosen for all samples grow as the samples become fewer.
    """
    total = jnp.sum(statistics.count, axis=-1)
    left = jnp.sum(jnp.where(kept, statistics.count, 0), axis=-1)
    fewer = total / jnp.where(left > 0, left, total)

    def keep(x: Array) -> Array:
        return jnp.where(kept.reshape(2, *[1] * (x.ndim - 1)), x, 0)

    found = map_sums(keep, statistics)
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
