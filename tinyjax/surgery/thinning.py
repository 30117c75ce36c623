"""Emptying slots: a network that starts thin in arrays of its final capacity."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from tinyjax.core.arguments import per_site
from tinyjax.core.kernels import require_growable, site_leaves
from tinyjax.core.layout import Layout
from tinyjax.core.params import Params, replace_leaves
from tinyjax.core.site import Site, Sites, as_sites
from tinyjax.core.slots import NEUTRAL
from tinyjax.core.whole_numbers import whole_number


def thin(params: Params, sites: Sites | Site, width: int | Mapping[str, int]) -> Params:
    """Empties all but the first `width` slots of each site; capacities and shapes stay.

    An emptied slot is what `resize` appends: zeros everywhere, but scale 1 and running variance 1 with mean 0. A stale
    mean would make the empty slot emit a constant in evaluation mode; a scale of 0 would block a newborn's gradient.

    Args:
        params: the parameters the sites were found in.
        sites: growable sites.
        width: number of slots to keep, for all sites or by name (sites left out stay as they are).

    Returns:
        The thinned parameters.

    Raises:
        ValueError: for a width outside 0 .. capacity, an unknown name, a site that cannot grow, integer leaves.

    Example:
        >>> params = tinyjax.thin(params, sites, {"hidden_1": 2, "hidden_2": 3})
        >>> [int(tinyjax.width(params, site)) for site in sites]
        [2, 3]
    """
    sites = as_sites(sites)
    for name, kept in per_site(sites, width).items():
        site = sites[name]
        require_growable(site)
        kept = whole_number(kept, f"`width` of site `{name}`")
        if not 0 <= kept <= site.capacity:
            raise ValueError(
                f"`width` {kept} of site `{name}` is outside 0 .. {site.capacity}, its capacity; "
                "`resize` makes room for more"
            )
        params = empty_slots(params, site, np.arange(site.capacity) >= kept)
    return params


def empty_slots(params: Params, site: Site, mask: Bool[ArrayLike, " capacity"]) -> Params:
    """Empties the slots marked in `mask`, see `thin`."""
    leaves = site_leaves(params, site)
    for member in site.members:
        leaves[member.leaf] = _emptied(member.layout, leaves[member.leaf], mask, NEUTRAL.get(member.role, 0))
    return replace_leaves(params, leaves)


@partial(jax.jit, static_argnums=(0, 3))
def _emptied(layout: Layout, leaf: Array, mask: ArrayLike, neutral: float) -> Array:
    """A leaf with `neutral` in the marked slots; jitted, or every operation is a program of its own."""
    slots = layout.to_slots(leaf)
    return layout.from_slots(jnp.where(jnp.asarray(mask)[:, None], jnp.asarray(neutral, slots.dtype), slots))
