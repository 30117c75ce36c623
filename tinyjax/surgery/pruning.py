"""Removing the neurons that the others can best stand in for (the optimal brain surgeon on one layer).

The consumers see the hidden vector h; with G = E[h h'] over samples, removing neuron j and re-fitting the consumers'
weights W on the others changes their output by at least tr(W_j' [(G^-1)_jj]^-1 W_j) in mean square, reached by
W - G^-1_{:, j} [(G^-1)_jj]^-1 W_j. All of it comes from the sums that growing needs anyway.
"""

import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from tinyjax.core.kernels import (
    cols,
    consumers_have_bias,
    matrices,
    recurrent_leaves,
    require_growable,
    rows,
    site_leaves,
)
from tinyjax.core.kinds import RESIDUAL_STREAM
from tinyjax.core.layout import Layout
from tinyjax.core.params import Params, replace_leaves
from tinyjax.core.site import Site
from tinyjax.core.slots import free_slots
from tinyjax.core.whole_numbers import whole_number
from tinyjax.surgery.thinning import empty_slots

HIGHEST = jax.lax.Precision.HIGHEST


@runtime_checkable
class HiddenMoments(Protocol):
    """What `prune` reads of the statistics: `gram` `(*stack, 2, H, H)`, the sums of h h' over both halves."""

    @property
    def gram(self) -> Array: ...  # noqa: D102


def prune(
    params: Params, site: Site, statistics: HiddenMoments, *, num_neurons: int
) -> tuple[Params, Bool[Array, " capacity"]]:
    """Empties the `num_neurons` neurons whose removal moves the consumers' pre-activations the least.

    One at a time, cheapest first; after each, the remaining rows (and the bias) are re-fitted by least squares. A
    neuron that others duplicate costs nothing. In a stack the costs of the layers add.

    Args:
        params: the parameters the site was found in.
        site: a growable site.
        statistics: the site's statistics, measured at these parameters.
        num_neurons: how many to remove; no more than there are used slots are removed.

    Returns:
        The parameters, and which slots were emptied, `(capacity,)` booleans.

    Raises:
        ValueError: for a site that cannot grow or a residual stream, `num_neurons` outside 0 .. capacity, or a Gram
            matrix of another size.

    Example:
        >>> params, removed = tinyjax.prune(params, site, statistics, num_neurons=1)
        >>> int(tinyjax.width(params, site)), int(removed.sum())
        (3, 1)
    """
    require_growable(site)
    if site.kind == RESIDUAL_STREAM:
        raise ValueError(f"site `{site.name}` is a residual stream, which `prune` does not refit; `thin` empties slots")
    num_neurons = whole_number(num_neurons, "`num_neurons`")
    if not 0 <= num_neurons <= site.capacity:
        raise ValueError(f"`num_neurons` {num_neurons} of site `{site.name}` is outside 0 .. {site.capacity}")
    _, weight = matrices(params, site)
    gram = jnp.sum(statistics.gram, axis=-3)
    if gram.shape[-1] != weight.shape[-2]:
        raise ValueError(
            f"`gram` is for {gram.shape[-1]} inputs; the consumers of site `{site.name}` have {weight.shape[-2]}"
        )
    shape = weight.shape
    gram, weight = gram.reshape(-1, *gram.shape[-2:]), weight.reshape(-1, *shape[-2:]).astype(gram.dtype)
    groups, own = _rows_of_slots(site.consumers[0].layout), _own_columns(site)
    used = ~free_slots(params, site)

    def remove(_: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        gram, weight, removed = carry
        inverse = jax.vmap(_inverse)(gram)
        costs = jnp.sum(jax.vmap(_costs, in_axes=(0, 0, None, None))(inverse, weight, groups, own), axis=0)
        costs = jnp.where(used & ~removed, costs, jnp.inf)
        j = jnp.argmin(costs)
        found = jnp.isfinite(costs[j])
        refitted = jax.vmap(_without, in_axes=(0, 0, None))(inverse, jnp.where(own[j], 0, weight), groups[j])
        left = jnp.ones(gram.shape[-1], bool).at[groups[j]].set(False) | ~found
        gram = jnp.where(left[:, None] & left, gram, 0)
        return gram, jnp.where(found, refitted, weight), removed.at[j].set(removed[j] | found)

    carry = (gram, weight, jnp.zeros(site.capacity, bool))
    _, weight, removed = jax.lax.fori_loop(0, num_neurons, remove, carry)
    params = _put(params, site, weight.reshape(shape))
    return empty_slots(params, site, removed), removed


def _rows_of_slots(layout: Layout) -> Array:
    """For each slot the rows of the consumer's matrix that belong to it, `(capacity, offsets)`."""
    assert layout.slot is not None
    sizes = [layout.factors[f] for f in layout.rows]
    index = jnp.arange(math.prod(sizes)).reshape(sizes)
    return jnp.moveaxis(index, layout.rows.index(layout.slot), 0).reshape(layout.factors[layout.slot], -1)


def _own_columns(site: Site) -> Array:
    """For each slot the columns of the consumers' matrix that are the slot itself (recurrent units), `(capacity, M)`.

    What a unit tells itself is not missed when it is gone.
    """
    recurrent, slots = recurrent_leaves(site), jnp.eye(site.capacity, dtype=bool)
    return jnp.concatenate(
        [slots if k.leaf in recurrent else jnp.zeros((site.capacity, cols(k)), bool) for k in site.consumers], axis=1
    )


def _inverse(gram: Array) -> Array:
    """(G + r diag G)^-1 with the smallest r that rounding allows: exact duplicates need one; silent inputs stay out."""
    scale = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    ridge = 1e-10 if gram.dtype == jnp.float64 else 1e-6
    correlation = gram * scale[:, None] * scale + ridge * jnp.eye(len(gram), dtype=gram.dtype)
    return jnp.linalg.inv(correlation) * scale[:, None] * scale


def _blocks(inverse: Array, group: Array) -> Array:
    """[(G^-1)_jj], the identity where all of slot j's inputs are silent."""
    block = inverse[group[:, None], group]
    silent = jnp.diagonal(block) == 0
    return block + jnp.diag(silent.astype(block.dtype))


def _costs(inverse: Array, weight: Array, groups: Array, own: Array) -> Array:
    """tr(W_j' [(G^-1)_jj]^-1 W_j) for every slot; 0 for the part of it that is silent, or its own."""

    def cost(group: Array, own: Array) -> Array:
        is_read = jnp.diagonal(inverse)[group] != 0
        rows = jnp.where(is_read[:, None] & ~own, weight[group], 0)
        return jnp.sum(rows * jnp.linalg.solve(_blocks(inverse, group), rows))

    return jax.vmap(cost)(groups, own)


def _without(inverse: Array, weight: Array, group: Array) -> Array:
    """The weights re-fitted without the inputs of `group`, whose rows become zero."""
    step = jnp.linalg.solve(_blocks(inverse, group), weight[group])
    return (weight - jnp.matmul(inverse[:, group], step, precision=HIGHEST)).at[group].set(0)


def _put(params: Params, site: Site, weight: Array) -> Params:
    """The parameters with the consumers' matrix replaced."""
    leaves = site_leaves(params, site)
    bias = consumers_have_bias(site)
    first = 0
    for kernel in site.consumers:
        block = weight[..., first : first + cols(kernel)]
        first += cols(kernel)
        leaves[kernel.leaf] = kernel.layout.from_matrix(block[..., : rows(kernel), :]).astype(leaves[kernel.leaf].dtype)
        if bias and kernel.bias is not None:
            old = leaves[kernel.bias.leaf]
            leaves[kernel.bias.leaf] = kernel.bias.from_matrix(block[..., rows(kernel) :, :]).astype(old.dtype)
    return replace_leaves(params, leaves)
