"""Another capacity, the same function: pads every leaf of a site with empty slots, or cuts empty slots off.

A leaf is changed by indexing its axes: each new slot names the old slot it continues, or none. Optimizer states and
other trees shaped like the parameters follow by the same indices, so nothing is forgotten at a growth.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinyjax.core.arguments import require_concrete, require_names
from tinyjax.core.kernels import require_growable, site_leaves
from tinyjax.core.params import Params, named_leaves, path_name, replace_leaves
from tinyjax.core.site import Site, Sites, as_sites, resized
from tinyjax.core.slots import NEUTRAL, free_slots, width
from tinyjax.core.whole_numbers import whole_number
from tinyjax.surgery.capacity_policies import Policy
from tinyjax.surgery.frozen import frozen_leaves, require_scalable
from tinyjax.surgery.keeping import Check, require_free_capacity, require_same_loss
from tinyjax.surgery.trainable import Initialiser, Trainable, all_params, owner, trained_names


class _Change(NamedTuple):
    """How a leaf changes: old shape, the old index of every new one (-1: new) for each changed axis, the padding."""

    shape: tuple[int, ...]
    axes: dict[int, np.ndarray]
    padding: int


def resize(
    params: Params,
    sites: Sites | Sequence[Site] | Site,
    capacities: Policy | Mapping[str, int],
    *,
    optimizer: Initialiser | None = None,
    opt_state: Any = None,
    like: Sequence[Any] = (),
    trainable: Trainable = all_params,
    check: Check | None = None,
) -> tuple[Any, ...]:
    """Gives sites another capacity without changing the network's function.

    New slots are empty (scale and running variance 1). Cutting removes free slots only, the last ones first; used slots
    move to the front when they would be cut otherwise. Slots keep their order.

    A model that computes numbers from its widths (attention scores over the root of their dimension, a mean square in
    a norm, a readout over a root of the width) would change with the capacity. `find_sites` has found the leaves that
    make up for it, `Site.powers`: they are multiplied by a power of new / old capacity, such that the mean square under
    a norm and the norm's epsilon keep their ratio; optimizer states are not. Where no leaf can make up for a number,
    the resize is refused. Of models that check shapes these numbers are known if `find_sites` was given `make_loss`;
    else `Site.unchecked` says why not, roots in attention scores and norms are told by their value, and `check`
    compares the losses.

    Args:
        params: the parameters the sites were found in.
        sites: all sites of the network that share leaves with the resized ones.
        capacities: new capacities by site name (others keep theirs), or a policy, called with the widths in use.
        optimizer: the Optax optimizer of `opt_state`.
        opt_state: optimizer state to take along: `optimizer.init` of the new parameters, in which leaves of unchanged
            shape are kept and the others pasted slot by slot. A leaf that does not have its parameter's axes (factored
            moments) starts afresh.
        like: other trees shaped like the parameters or their trained part (moving averages), resized the same way.
        trainable: the part of the parameters that `optimizer` sees.
        check: `(loss_fn, batch)`: the loss of the batch must be the same before and after. With a third entry,
            `make_loss`, the loss after is that of `make_loss(capacities)` (Linen and Haiku check shapes).

    Returns:
        `(params, sites)`, or `(params, opt_state, sites)`, with the resized `like` before the sites when given:
        `(params, like, sites)`, `(params, opt_state, like, sites)`. The sites know the new capacities.

    Raises:
        ValueError: for an unknown site, one that cannot grow, a capacity below its width (named), a number in the model
            that follows the capacity (named), a state without optimizer, a state that does not belong to the
            parameters; where a leaf that has to be multiplied is frozen; when the loss of `check` is another
            afterwards; or when cutting while traced.

    Example:
        >>> params, opt_state, sites = tinyjax.resize(
        ...     params, sites, {"hidden_1": 16}, optimizer=optimizer, opt_state=opt_state
        ... )
        >>> [site.capacity for site in sites]
        [16, 12]
    """
    sites = as_sites(sites)
    if (optimizer is None) != (opt_state is None):
        raise ValueError("`optimizer` and `opt_state` belong together: pass both or none")
    if callable(capacities):
        require_concrete(params, "the capacity that a policy chooses")
        capacities = capacities({site.name: int(width(params, site)) for site in sites.growable}, None)
    changes = _changes(params, sites, capacities)
    require_scalable(sites, capacities, lambda: frozen_leaves(params, optimizer, trainable))
    rescaled = _rescaled(params, sites, capacities)  # before new slots come: they are neutral
    new = _resize_like(rescaled, changes, dict.fromkeys(named_leaves(params), ""))
    if check is not None:
        require_same_loss(check, params, new, sites, capacities)
    result = [new]
    trained = trained_names(trainable, params)
    if optimizer is not None:
        result.append(paste(opt_state, optimizer.init(trainable(new)), changes, trained))
    if like:
        result.append(
            tuple(
                _resize_like(
                    _rescaled(tree, sites, capacities), changes, trained | {n: n for n in named_leaves(params)}
                )
                for tree in like
            )
        )
    return (*result, resized(sites, capacities))


def _rescaled(tree: Any, sites: Sites, capacities: Mapping[str, int]) -> Any:
    """The tree with leaves multiplied by what makes up for numbers that follow the capacity."""
    factors = {}
    for name, capacity in capacities.items():
        site = sites[name]
        for leaf, power in site.powers if capacity != site.capacity else ():
            factors[leaf] = factors.get(leaf, 1.0) * (capacity / site.capacity) ** power
    if not factors:
        return tree
    leaves = named_leaves(tree)
    scaled = {name: leaves[name] * factor for name, factor in factors.items() if name in leaves}
    return replace_leaves(tree, {name: x.astype(leaves[name].dtype) for name, x in scaled.items()})


def compact(
    params: Params, sites: Sites | Sequence[Site] | Site, *, check: Check | None = None
) -> tuple[Params, dict[str, int]]:
    """Drops the free slots of every growable site: the network at its exact widths, the same function.

    Args:
        params: the parameters the sites were found in, concrete.
        sites: sites; those that cannot grow stay as they are.
        check: as in `resize`.

    Returns:
        The parameters, and the widths by site name, from which to rebuild a model that checks shapes.

    Raises:
        ValueError: when called while tracing; and as `resize`.

    Example:
        >>> params, widths = tinyjax.compact(params, sites)
        >>> widths, params["params"]["hidden_2"]["kernel"].shape
        ({'hidden_1': 4, 'hidden_2': 4}, (4, 4))
    """
    sites = as_sites(sites)
    require_concrete(params, "the size of a compact network")
    widths = {site.name: int(width(params, site)) for site in sites.growable}
    return resize(params, sites, widths, check=check)[0], widths


def _changes(params: Params, sites: Sites, capacities: Mapping[str, int]) -> dict[str, _Change]:
    """What happens to each leaf."""
    if not isinstance(capacities, Mapping):
        raise ValueError(f"`capacities` must be a policy or a capacity by site name, got {capacities!r}")
    require_names(sites, capacities)
    moves: dict[tuple[str, int], dict[int, tuple[tuple[int, ...], np.ndarray]]] = {}
    shapes, padding = {}, {}
    for name, capacity in capacities.items():
        site = sites[name]
        require_growable(site)
        require_free_capacity(site, capacity)
        site_leaves(params, site)
        capacity = whole_number(capacity, f"the capacity of site `{name}`")
        source = _source(params, site, capacity)
        for member in site.members if capacity != site.capacity else ():
            layout, slot = member.layout, member.layout.slot
            assert slot is not None
            axis = layout.axes[slot]
            sizes = tuple(f for f, a in zip(layout.factors, layout.axes) if a == axis)
            moves.setdefault((layout.leaf, axis), {})[slot - layout.axes.index(axis)] = sizes, source
            shapes[layout.leaf], padding[layout.leaf] = layout.shape, NEUTRAL.get(member.role, 0)
    changes = {leaf: _Change(shape, {}, padding[leaf]) for leaf, shape in shapes.items()}
    for (leaf, axis), factors in moves.items():
        changes[leaf].axes[axis] = _axis_index(factors)
    return changes


def _source(params: Params, site: Site, capacity: int) -> np.ndarray:
    """For each new slot the old slot it continues, -1 for a new one."""
    if capacity >= site.capacity:
        return np.r_[np.arange(site.capacity), np.full(capacity - site.capacity, -1)]
    require_concrete(params, f"cutting slots of site `{site.name}`")
    free = np.asarray(free_slots(params, site))
    used = np.flatnonzero(~free)
    if capacity < len(used):
        raise ValueError(
            f"capacity {capacity} of site `{site.name}` would cut used slots: its width is {len(used)}. "
            "Empty some with `thin` or `prune` first."
        )
    if used.size == 0 or used[-1] < capacity:
        return np.arange(capacity)
    return np.r_[used, np.flatnonzero(free)][:capacity]


def _axis_index(factors: Mapping[int, tuple[tuple[int, ...], np.ndarray]]) -> np.ndarray:
    """The old index of every new index of an axis, some of whose factors change; -1 where it is new."""
    sizes = next(iter(factors.values()))[0]
    index = np.arange(np.prod(sizes, dtype=int)).reshape(sizes)
    for position, (_, source) in factors.items():
        new = np.full_like(index, -1, shape=(*index.shape[:position], 1, *index.shape[position + 1 :]))
        index = np.take(np.concatenate([index, new], axis=position), source, axis=position)  # -1 takes the appended one
    return index.ravel()


@jax.jit
def _gather(x: Array, axes: Mapping[int, np.ndarray], padding: Any) -> Array:
    """`x` indexed along axes, `padding` where the index is -1; jitted, or every operation is a program of its own."""
    for axis, index in axes.items():
        slab = jnp.full((*x.shape[:axis], 1, *x.shape[axis + 1 :]), padding, x.dtype)
        x = jnp.take(jnp.concatenate([x, slab], axis=axis), jnp.where(index < 0, x.shape[axis], index), axis=axis)
    return x


@jax.jit
def _over(fresh: Array, x: Array, axes: Mapping[int, np.ndarray]) -> Array:
    """`x` indexed along axes, `fresh` where an index is -1."""
    return jnp.where(_gather(jnp.ones(x.shape, bool), axes, False), _gather(x, axes, 0), fresh)


def _resize_like(tree: Any, changes: Mapping[str, _Change], names: Mapping[str, str]) -> Any:
    """A tree shaped like the parameters; `names` maps its paths (as suffixes) to the parameters' paths."""

    def leaf(path: tuple[Any, ...], x: Any) -> Any:
        name = owner(path_name(path), names)
        change = None if name is None else changes.get(names[name] or name)
        if change is None or np.shape(x) != change.shape:
            return x
        return _gather(jnp.asarray(x), change.axes, change.padding)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def paste(old: Any, new: Any, changes: Mapping[str, _Change], trained: Mapping[str, str]) -> Any:
    """The old optimizer state in the shapes of the new one, whose values fill what is new."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            "`opt_state` has another structure than `optimizer.init` of the resized parameters: "
            "it comes from another optimizer or another `trainable`"
        )

    def leaf(path: tuple[Any, ...], x: Any, fresh: Any) -> Any:
        if np.shape(x) == np.shape(fresh):
            return x
        name = owner(path_name(path), trained)
        change = None if name is None else changes.get(trained[name])
        if change is None or np.ndim(x) != len(change.shape):
            return fresh
        # A state may keep only some axes of its parameter (a vector an axis): those it has change with it.
        axes = {
            axis: index
            for axis, index in change.axes.items()
            if (x.shape[axis], fresh.shape[axis]) == (change.shape[axis], len(index))
        }
        shape = tuple(len(axes[axis]) if axis in axes else size for axis, size in enumerate(x.shape))
        return _over(fresh, x, axes) if shape == fresh.shape else fresh

    return jax.tree_util.tree_map_with_path(leaf, old, new)
