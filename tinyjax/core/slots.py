"""Which slots of a hidden dimension are used, and the two weight matrices around it.

The parameters alone say how wide a network is: slot j is free when its fan-in (with its gate's, if it has one), its
shifts (biases) and its fan-out are all zero, in every layer of a stack. Scales and running statistics do not count,
they are inert on a slot that receives and emits nothing.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tinyjax.core.kernels import site_leaves
from tinyjax.core.layout import live
from tinyjax.core.params import Params
from tinyjax.core.site import Kernel, Site

COUNTED = ("fan_in", "gate", "shift", "fan_out")
"""Roles whose entries decide whether a slot is used."""

NEUTRAL = {"scale": 1, "var": 1}
"""What a leaf holds in an empty slot, by role; 0 for every other role.

A scale of 1 lets the gradient of a newborn through, a variance of 1 lets its signal through, a mean of 0 keeps the
output of an empty slot at zero in evaluation mode.
"""


def free_slots(params: Params, site: Site) -> Bool[Array, " capacity"]:
    """Which slots are empty: fan-in, gate, shifts and fan-out all zero, in every layer of a stack.

    Args:
        params: the parameters the site was found in.
        site: one hidden dimension.

    Returns:
        `(capacity,)` booleans, traced like `params`.

    Raises:
        ValueError: when a leaf of the site is missing, of another shape than the site says, or not floating point.

    Example:
        >>> int(tinyjax.surgery.free_slots(params, site).sum())
        8
    """
    leaves = site_leaves(params, site)
    used = jnp.zeros(site.capacity, bool)
    for member in site.members:
        if member.role in COUNTED:
            used |= live(member.layout.to_slots(leaves[member.leaf]))
    return ~used


def width(params: Params, site: Site) -> Int[Array, ""]:
    """Number of used slots, int32; `site.capacity - width` neurons can be added before a `resize`.

    Args:
        params: the parameters the site was found in.
        site: one hidden dimension.

    Returns:
        A 0-d int32 array, traced like `params`.

    Example:
        >>> int(tinyjax.width(params, site)), site.capacity
        (4, 12)
    """
    free = free_slots(params, site)
    return site.capacity - jnp.sum(free, dtype=jnp.int32)


def used_dimensions(leaves: Mapping[str, Array], site: Site) -> tuple[Array, Array]:
    """Which query-key and which value dimensions any head of a site of whole heads uses; all, where none is used.

    Returns:
        Booleans (k,) and (U,): a new head uses the same, so that the widths of those sites stay what they are.
    """
    query, key = site.pattern
    (producer,) = site.producers
    scores = _layers_in_use(leaves, site, query) | _layers_in_use(leaves, site, key)
    values = _layers_in_use(leaves, site, producer)
    for kernel in site.consumers:  # rows are (value dimension, head)
        matrix = kernel.layout.to_matrix(leaves[kernel.leaf])
        values |= any_besides(matrix.reshape(*matrix.shape[:-2], len(values), -1), len(site.stack))
    return scores | ~jnp.any(scores), values | ~jnp.any(values)


def _layers_in_use(leaves: Mapping[str, Array], site: Site, kernel: Kernel) -> Array:
    """Which of the last layers of a kernel hold anything but zeros, its bias included."""
    layouts = [layout for layout in (kernel.layout, kernel.bias) if layout is not None]
    depth = len(site.stack)
    found = [any_besides(layout.to_matrix(leaves[layout.leaf]), depth) for layout in layouts]
    return found[0] if len(found) == 1 else found[0] | found[1]


def any_besides(x: Array, axis: int) -> Array:
    """Where along an axis anything is not zero."""
    return jnp.any(x != 0, axis=tuple(d for d in range(x.ndim) if d != axis))
