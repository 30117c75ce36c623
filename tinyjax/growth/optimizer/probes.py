"""What an optimizer does with its moments, found by trying it on stand-in parameters with one entry a leaf.

Decay rates are hidden in closures, so they are measured: one step with a known gradient, one with none. The rule by
which moments are corrected is found the same way, by trying: shown moments at step t must give the update of true
moments at step a. What passes no trial is refused by name, when the optimizer is wrapped rather than epochs later.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tinyjax.core.params import named_leaves
from tinyjax.growth.optimizer.moments import (
    Shown,
    corrected_states,
    fields,
    is_corrected,
    nesterov,
    plain,
    replace_corrected,
    show,
)

ELEMENTWISE = frozenset(
    {
        "TraceState",
        "ScaleByLionState",
        "ScaleByRmsState",
        "ScaleByRStdDevState",
        "ScaleByRssState",
        "ScaleByRpropState",
        "ScaleByAdaDeltaState",
    }
)
"""States of one value an entry that a fresh optimizer starts from the same value at any step."""

CONTAINERS = frozenset(
    {"MaskedState", "PartitionState", "InjectStatefulHyperparamsState", "InjectHyperparamsState", "ApplyIfFiniteState"}
)
"""States that hold other states and scalars."""

OUTSIDE = frozenset({"MultiStepsState", "ScheduleFreeState", "LookaheadState", "ConditionallyTransformState"})
"""Wrappers that go around `with_birth`, not inside."""

UNKNOWN_CORRECTION = (
    "`with_birth` knows no way to give new slots a fresh start in this optimizer: its update depends on the step count "
    "in another way than the bias correction of Adam, NAdam or RMSProp (as in RAdam, Adamax, ADOPT). "
    "Use one of those three, or `reset_grown(..., rule=zeros)` without `with_birth`."
)
PROBE = 2.0**-10  # small enough to pass clipping by norm, a power of two so that its square is exact


def probe(optimizer: optax.GradientTransformationExtraArgs, tree: Any) -> tuple[dict[str, Shown], ...]:
    """How each bias-corrected state of an optimizer is to be shown the moments of young entries.

    Args:
        optimizer: the optimizer.
        tree: parameters, or a tree of the same structure, ranks and dtypes; may be traced.

    Returns:
        For every corrected state, in the order of flattening, `Shown` by moment (`"mu"`, `"nu"`).

    Raises:
        ValueError: for an optimizer under which newborn slots cannot be exact, or free slots do not stay zero.
    """
    leaves, treedef = jax.tree.flatten(tree)
    kinds = tuple((jnp.ndim(x), jnp.promote_types(jnp.result_type(x), jnp.float32).name) for x in leaves)
    return _probe(optimizer, treedef, kinds)


@functools.lru_cache(maxsize=64)
def _probe(optimizer: Any, treedef: Any, kinds: tuple[tuple[int, str], ...]) -> tuple[dict[str, Shown], ...]:
    with jax.ensure_compile_time_eval():
        params = treedef.unflatten([np.zeros((1,) * ndim, dtype) for ndim, dtype in kinds])

        @jax.jit  # one program for all trials instead of one for each of its operations
        def step(grads: Any, state: Any) -> tuple[Any, Any]:
            return optimizer.update(grads, state, params, value=0.0)

        start = jax.jit(optimizer.init)(params)
        _refuse_unknown(start)
        _refuse_sequences(start)
        _refuse_restless(step, params, start)
        first = step(jax.tree.map(lambda x: np.full_like(x, PROBE), params), start)[1]
        second = step(params, first)[1]
        decays = [
            {field: _decay(getattr(one, field), getattr(two, field), field) for field in fields(one)}
            for one, two in zip(corrected_states(first), corrected_states(second))
        ]
        rng = np.random.default_rng(0)
        grads = [jax.tree.map(lambda x: x + PROBE * rng.normal(size=x.shape).astype(x.dtype), params) for _ in range(4)]
        state = start
        for grad in grads[:3]:
            state = step(grad, state)[1]
        return tuple(_rules(step, grads[3], state, start, i, decay) for i, decay in enumerate(decays))


def _decay(one: Any, two: Any, field: str) -> float:
    """The decay rate from a moment after a gradient of PROBE, and after one more of 0.

    1 - b is read off the first where that agrees with the ratio of the two: it loses nothing to rounding. It does not
    agree when an earlier transform rescales gradients; then the ratio serves.
    """
    if not jax.tree.leaves(one):
        return 0.0  # all leaves masked
    first, then = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)]) for x in (one, two))
    if not first.any():
        raise ValueError(UNKNOWN_CORRECTION)
    entry = np.flatnonzero(first)[0]  # others may be masked before they get here
    power = 1 if field == "mu" else 2
    gain = float(first[entry]) / PROBE**power
    ratio = float(then[entry]) / float(first[entry])
    return 1 - gain if abs(1 - gain - ratio) < 4 * float(jnp.finfo(first.dtype).eps) else ratio


def _rules(step: Any, grad: Any, state: Any, start: Any, i: int, decays: dict[str, float]) -> dict[str, Shown]:
    """The first combination of rules that passes the trials."""
    for mu_rule in (plain, nesterov):
        shown = {name: Shown(b, mu_rule if name == "mu" else plain) for name, b in decays.items()}
        as_shown = jax.jit(functools.partial(_as_shown, shown))
        if all(_passes(step, grad, state, start, i, as_shown, a) for a in (1, 2)):
            return shown
    raise ValueError(UNKNOWN_CORRECTION)


def _passes(step: Any, grad: Any, state: Any, start: Any, i: int, as_shown: Any, a: int) -> bool:
    """Whether state i at step t = 10, shown the moments of age a, updates as at step a. All other states are equal."""
    t = 10
    nodes = corrected_states(state)
    source = corrected_states(start)[i] if a == 1 else nodes[i]
    names = fields(nodes[i])
    moments = {name: getattr(source, name) for name in names}

    def at(count: int, moments: dict[str, Any]) -> tuple[Any, Any]:
        node = nodes[i]._replace(count=jnp.asarray(count, nodes[i].count.dtype), **moments)
        return step(grad, replace_corrected(state, [*nodes[:i], node, *nodes[i + 1 :]]))

    want, after = at(a - 1, moments)
    new = corrected_states(after)[i]
    got, _ = at(t - 1, as_shown({name: getattr(new, name) for name in names}, moments, jnp.asarray(t), jnp.asarray(a)))
    pairs = [(np.asarray(x, float), np.asarray(y, float)) for x, y in zip(jax.tree.leaves(want), jax.tree.leaves(got))]
    return all(np.all(np.abs(x - y) <= 1e-2 * np.abs(x)) for x, y in pairs)


def _as_shown(
    shown: dict[str, Shown], new: dict[str, Any], old: dict[str, Any], t: jax.Array, a: jax.Array
) -> dict[str, Any]:
    """The moments to show, by name."""
    return {
        name: jax.tree.map(lambda n, o, s=s: show(s, n, o, t, a), new[name], old[name]) for name, s in shown.items()
    }


def _refuse_unknown(node: Any) -> None:
    """Raises for a state that is neither known nor scalar."""
    name = type(node).__name__
    if is_corrected(node) or name in ELEMENTWISE or all(jnp.ndim(x) == 0 for x in jax.tree.leaves(node)):
        return
    if name in OUTSIDE:
        raise ValueError(
            f"`{name}` inside `with_birth`: wrap the optimizer inside it, as in `MultiSteps(with_birth(adam), 4)`"
        )
    if name not in CONTAINERS and (hasattr(node, "_fields") or not isinstance(node, tuple | list | dict)):
        raise ValueError(
            f"`with_birth` does not know how `{name}` treats new slots (its state is not one known value an entry): "
            "use another optimizer, or `reset_grown(..., rule=all_afresh)` without `with_birth`"
        )
    for child in jax.tree.leaves(node, is_leaf=lambda x: x is not node):
        _refuse_unknown(child)


def _refuse_sequences(state: Any) -> None:
    """Raises where two corrected transforms act on one leaf: what one is shown would change the other's gradient."""
    names = [set(named_leaves(getattr(node, fields(node)[0]))) for node in corrected_states(state)]
    for one, two in itertools.combinations(names, 2):
        if one & two:
            raise ValueError(
                f"two bias-corrected transforms act on `{min(one & two)}`; `with_birth` supports one a leaf"
            )


def _refuse_restless(step: Any, params: Any, state: Any) -> None:
    """Raises when zero gradients and zero parameters do not give exactly zero updates."""
    for _ in range(3):
        updates, state = step(params, state)
    if not all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(updates)):
        raise ValueError(
            "this optimizer moves parameters that are zero and have zero gradients (noise, yogi, or Adam with eps=0), "
            "so free slots would not stay free: use another, or mask its updates"
        )
