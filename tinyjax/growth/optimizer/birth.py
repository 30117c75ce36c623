"""An optimizer under which a newborn slot is stepped exactly as a freshly initialised optimizer would.

Growth changes no shape, so Adam's step count goes on while a newborn's moments start at zero: its first steps would be
up to 6.6 times too long. `with_birth` remembers at which step each slot was born and shows the wrapped optimizer
moments that its own bias correction turns into those of a fresh start. Nothing else is touched, nothing approximated.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from tinyjax.core.params import named_leaves
from tinyjax.growth.optimizer.mixing import require_unmixed
from tinyjax.growth.optimizer.moments import Shown, corrected_states, replace_corrected, show
from tinyjax.growth.optimizer.probes import probe


class BirthState(NamedTuple):
    """State of `with_birth`.

    Attributes:
        inner: state of the wrapped optimizer.
        count: 0-d int32, its steps so far.
        births: for axis i a tree like the parameters: the step at which each index of that axis was born, int32, shaped
            to broadcast against the leaf (all 1 where it has no axis i). An entry was born with its youngest index.
    """

    inner: Any
    count: Array
    births: tuple[Any, ...]


def with_birth(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Steps newborn slots exactly as a fresh optimizer would, and old ones as before.

    Exact for any gradients, whatever stands before or after Adam in the chain: schedules, decay, clipping, trust ratios
    and masks see the same updates. While a slot is young ($b^a$ above rounding: about 16,000 steps for b2 = 0.999 in
    float32) a step costs two of the wrapped optimizer's; then one.

    Args:
        optimizer: sgd with momentum, Lion, RMSProp, Adagrad, Adam, AdamW, NAdam, LAMB, ..., also in `chain`,
            `multi_transform`, `masked`, `inject_hyperparams`. `MultiSteps` and `schedule_free` go outside:
            `schedule_free(with_birth(adam))`. (The average that `schedule_free` takes stays common to all slots.)

    Returns:
        The optimizer, with a `BirthState`; mark births with `reset_grown`.

    Raises:
        ValueError: by `init` or `update`, for an optimizer that cannot be supported (named), or that mixes the entries
            of a leaf so that free slots would not stay free (`optax.centralize`).

    Example:
        >>> optimizer = tinyjax.with_birth(optax.adam(1e-3))
        >>> opt_state = optimizer.init(params)
        >>> born = {"hidden_1": jnp.arange(12) == 4}
        >>> opt_state = tinyjax.growth.optimizer.reset_grown(optimizer, opt_state, params, site, born)
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> BirthState:
        probe(inner, params)
        require_unmixed(inner, params)
        return BirthState(inner.init(params), jnp.zeros([], jnp.int32), _never(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, BirthState]:
        shown = probe(inner, updates)
        first, after = inner.update(updates, state.inner, params, **extra)
        if not shown or not state.births:
            return first, BirthState(after, state.count + 1, state.births)
        old, new = corrected_states(state.inner), corrected_states(after)

        def young() -> tuple[Any, Any]:
            states = [_shown_state(*nodes, state) for nodes in zip(shown, old, new)]
            result, final = inner.update(updates, replace_corrected(state.inner, states), params, **extra)
            # The moments shown were a trick: the true ones go on.
            final = replace_corrected(final, new)
            return jax.tree.map(lambda x, like: x.astype(like.dtype), (result, final), (first, after))

        youngest = jnp.max(jnp.stack([jnp.max(x, initial=0) for x in jax.tree.leaves(state.births)]))
        is_young = (youngest > 0) & (state.count + 1 - youngest < _horizon(shown, first))
        result, final = jax.lax.cond(is_young, young, lambda: (first, after))
        # The transform's own count, which stands still where a wrapper skips a step.
        return result, BirthState(final, new[0].count, state.births)

    return optax.GradientTransformationExtraArgs(init, update)


def _never(params: Any) -> tuple[Any, ...]:
    """Births of parameters that were there from the start."""
    rank = max((jnp.ndim(x) for x in jax.tree.leaves(params)), default=0)

    def along(axis: int, x: Array) -> Array:
        return jnp.zeros([n if i == axis else 1 for i, n in enumerate(jnp.shape(x))], jnp.int32)

    return tuple(jax.tree.map(lambda x, axis=axis: along(axis, x), params) for axis in range(rank))


def _shown_state(shown: dict[str, Shown], old: Any, new: Any, state: BirthState) -> Any:
    """A state with the moments to show in the place of its own."""
    births = [named_leaves(tree) for tree in state.births]

    def moment(field: str) -> Any:
        def leaf(path: Any, after: Array, before: Array) -> Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            birth = jnp.zeros([], jnp.int32)
            for axis in births:
                birth = jnp.maximum(birth, axis[name])
            age = jnp.where(birth > 0, state.count + 1 - birth, new.count)
            return show(shown[field], after, before, new.count, age)

        return jax.tree_util.tree_map_with_path(leaf, getattr(new, field), getattr(old, field))

    return old._replace(**{field: moment(field) for field in shown})


def _horizon(shown: tuple[dict[str, Shown], ...], updates: Any) -> int:
    """Steps after which a slot's bias correction is 1 to rounding."""
    decay = max(moment.decay for node in shown for moment in node.values())
    eps = min(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(updates))
    return 1 if decay == 0 else math.ceil(math.log(eps) / math.log(decay))
