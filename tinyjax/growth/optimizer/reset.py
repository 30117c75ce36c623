"""After a growth: what the optimizer's state holds for the slots just written.

`fresh` gives them the state of a new optimizer, age included; `zeros` the state but not the age (with Adam that makes
first steps up to 6.6 times too long, a control); `all_afresh` starts all slots afresh (another control).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from tinyjax.core.arguments import require_names
from tinyjax.core.layout import Layout
from tinyjax.core.params import Params, named_leaves, path_name
from tinyjax.core.site import Site, Sites, as_sites
from tinyjax.growth.optimizer.birth import BirthState
from tinyjax.growth.optimizer.mixing import require_unmixed
from tinyjax.growth.optimizer.moments import corrected_states
from tinyjax.surgery.trainable import Trainable, all_params, owner, trained_names

Newborn = Mapping[str, Mapping[int, Array]]
"""For each trained leaf by path: newborn indices by axis, booleans."""

Rule = Callable[[optax.GradientTransformation, Any, Params, Newborn], Any]


def fresh(optimizer: optax.GradientTransformation, opt_state: Any, params: Params, newborn: Newborn) -> Any:
    """Newborn entries start as in a new optimizer; `with_birth` counts their age from here.

    Args:
        optimizer: the optimizer of `opt_state`.
        opt_state: its state.
        params: the trained parameters.
        newborn: newborn indices of their leaves.

    Returns:
        The new state.

    Raises:
        ValueError: when the optimizer corrects biases by a step count and is not wrapped in `with_birth`.

    Example:
        >>> born = {"hidden_1": jnp.arange(12) == 4}
        >>> opt_state = tinyjax.growth.optimizer.reset_grown(
        ...     optimizer, opt_state, params, site, born, rule=tinyjax.growth.optimizer.fresh
        ... )
    """
    outside = jax.tree.map(lambda node: () if _is_births(node) else node, opt_state, is_leaf=_is_births)
    if corrected_states(outside):
        raise ValueError(
            "the rule `fresh` needs to know the age of every slot: wrap the optimizer as `with_birth(optimizer)`, "
            "or choose the rule `zeros`"
        )
    state = zeros(optimizer, opt_state, params, newborn)
    return jax.tree.map(lambda node: _born_now(node, newborn) if _is_births(node) else node, state, is_leaf=_is_births)


def zeros(optimizer: optax.GradientTransformation, opt_state: Any, params: Params, newborn: Newborn) -> Any:
    """Newborn entries start with the values of a new optimizer, at the age of the others.

    Args:
        optimizer: the optimizer of `opt_state`.
        opt_state: its state.
        params: the trained parameters.
        newborn: newborn indices of their leaves.

    Returns:
        The new state.

    Example:
        >>> born = {"hidden_1": jnp.arange(12) == 4}
        >>> opt_state = tinyjax.growth.optimizer.reset_grown(
        ...     optimizer, opt_state, params, site, born, rule=tinyjax.growth.optimizer.zeros
        ... )
    """
    return _blank(opt_state, optimizer.init(params), params, newborn)


def all_afresh(optimizer: optax.GradientTransformation, opt_state: Any, params: Params, newborn: Newborn) -> Any:
    """A new optimizer for all entries, if anything was born.

    Args:
        optimizer: the optimizer of `opt_state`.
        opt_state: its state.
        params: the trained parameters.
        newborn: newborn indices of their leaves.

    Returns:
        The new state.

    Example:
        >>> born = {"hidden_1": jnp.arange(12) == 4}
        >>> opt_state = tinyjax.growth.optimizer.reset_grown(
        ...     optimizer, opt_state, params, site, born, rule=tinyjax.growth.optimizer.all_afresh
        ... )
    """
    masks = [jnp.any(mask) for axes in newborn.values() for mask in axes.values()]
    born = jnp.any(jnp.stack(masks)) if masks else jnp.asarray(False)
    return jax.tree.map(lambda new, old: jnp.where(born, new, old), optimizer.init(params), opt_state)


def reset_grown(
    optimizer: optax.GradientTransformation,
    opt_state: Any,
    params: Params,
    sites: Sites | Iterable[Site] | Site,
    born: Mapping[str, Bool[Array, " capacity"]],
    *,
    rule: Rule = fresh,
    trainable: Trainable = all_params,
) -> Any:
    """The optimizer's state after a growth.

    Args:
        optimizer: the optimizer of `opt_state`; for `fresh`, Adam-like ones are wrapped in `with_birth`.
        opt_state: its state.
        params: the full parameters, in which the sites were found.
        sites: the sites that `born` names.
        born: by site name, which slots were just written (`info.born`), `(capacity,)` booleans, traced or not.
        rule: `fresh`, `zeros` or `all_afresh`, or any function with their signature.
        trainable: the part of the parameters that the optimizer sees.

    Returns:
        The new state; slots that were not born keep theirs.

    Raises:
        ValueError: for an unknown site, a mask of another length, an optimizer that mixes the entries of a leaf along
            slots so that free ones would not stay free, or what the rule refuses.

    Example:
        >>> neurons = tinyjax.methods.tiny0(statistics, num_neurons=2)
        >>> params, born = tinyjax.surgery.write(params, site, neurons, amplitude=1.0)
        >>> opt_state = tinyjax.growth.optimizer.reset_grown(optimizer, opt_state, params, site, {site.name: born})
    """
    sites = as_sites(sites)
    require_names(sites, born)
    trained = trained_names(trainable, params)
    if not any(map(_is_births, jax.tree.leaves(opt_state, is_leaf=_is_births))):  # else `with_birth` has tried it
        require_unmixed(optimizer, trainable(params), _slot_axes(sites, trained))
    axes: dict[str, dict[int, Array]] = {}
    for name, mask in born.items():
        if jnp.shape(mask) != (sites[name].capacity,):
            raise ValueError(f"`born` of site `{name}` has shape {jnp.shape(mask)}, not ({sites[name].capacity},)")
        for member in sites[name].members:
            axis, vector = _along_axis(member.layout, jnp.asarray(mask, bool))
            leaf = axes.setdefault(member.leaf, {})
            leaf[axis] = leaf[axis] | vector if axis in leaf else vector
    newborn = {name: axes.get(full, {}) for name, full in trained.items()}
    part = trainable(params)
    require_state(optimizer, opt_state, part)
    return rule(optimizer, opt_state, part, newborn)


def require_state(optimizer: optax.GradientTransformation, opt_state: Any, part: Params) -> None:
    """Raises a ValueError unless a state is one of this optimizer, for these parameters."""
    expected = jax.tree.structure(jax.eval_shape(optimizer.init, part))
    if jax.tree.structure(opt_state) != expected:
        raise ValueError(
            "`opt_state` is no state of `optimizer` for these parameters: it comes from another optimizer (not wrapped "
            "in `with_birth`?) or another `trainable`. Make it by `optimizer.init(trainable(params))`"
        )


def _slot_axes(sites: Sites, trained: Mapping[str, str]) -> dict[str, set[int]]:
    """The axes along which slots lie, by path of a trained leaf."""
    found: dict[str, set[int]] = {}
    for layout in (member.layout for site in sites for member in site.members):
        assert layout.slot is not None
        found.setdefault(layout.leaf, set()).add(layout.axes[layout.slot])
    return {name: found[full] for name, full in trained.items() if full in found}


def _along_axis(layout: Layout, mask: Array) -> tuple[int, Array]:
    """The axis of a leaf along which its slots lie, and which indices of it belong to marked slots."""
    assert layout.slot is not None
    axis = layout.axes[layout.slot]
    along = [f for f in range(len(layout.factors)) if layout.axes[f] == axis]
    sizes = [layout.factors[f] for f in along]
    mask = mask.reshape([-1 if f == layout.slot else 1 for f in along])
    return axis, jnp.broadcast_to(mask, sizes).ravel()


def _is_births(node: Any) -> bool:
    return isinstance(node, BirthState)


def _spread(vector: Array, axis: int, rank: int) -> Array:
    """A vector along one axis of an array of that rank."""
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)])


def _blank(state: Any, new: Any, params: Params, newborn: Newborn) -> Any:
    """Every leaf with a parameter's shape takes the values of `new` at newborn entries; births stay."""
    shapes = {name: jnp.shape(leaf) for name, leaf in named_leaves(params).items()}

    def leaf(path: tuple[Any, ...], old: Any, fresh: Any) -> Any:
        if _is_births(old):
            return old._replace(inner=_blank(old.inner, fresh.inner, params, newborn))
        name = owner(path_name(path), newborn)
        if name is None or jnp.shape(old) != shapes[name] or not newborn[name]:
            return old
        rank = jnp.ndim(old)
        mask = jnp.zeros([1] * rank, bool)
        for axis, vector in newborn[name].items():
            mask |= _spread(vector, axis, rank)
        return jnp.where(mask, fresh, old)

    return jax.tree_util.tree_map_with_path(leaf, state, new, is_leaf=_is_births)


def _born_now(state: BirthState, newborn: Newborn) -> BirthState:
    """Newborn indices are born at the current step."""

    def tree(axis: int, births: Any) -> Any:
        def leaf(path: tuple[Any, ...], old: Array) -> Array:
            vector = newborn.get(path_name(path), {}).get(axis)
            return old if vector is None else jnp.where(_spread(vector, axis, old.ndim), state.count, old)

        return jax.tree_util.tree_map_with_path(leaf, births)

    return state._replace(births=tuple(tree(axis, births) for axis, births in enumerate(state.births)))
