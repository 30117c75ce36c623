r"""Bias-corrected moments: what an entry of age a must hold so that a transform at step t treats it as at step a.

A corrected moment is m_t / (1 - b^t) with m_t = b m_{t-1} + (1 - b) g. An entry whose moment was zeroed a - 1 steps ago
should be read as m_a / (1 - b^a), but the transform knows only its own t. So it is shown another old moment x, with
b x + (1 - b) g = m_a (1 - b^t) / (1 - b^a); since (1 - b) g = m_a - b m_{a-1}, x = m_{a-1} + (c - 1) m_a / b with
c = (1 - b^t) / (1 - b^a). The gradient drops out and nothing cancels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

CORRECTED = frozenset({"ScaleByAdamState", "ScaleByRmsWithCountState", "ScaleByRStdDevWithCountState"})
"""Names of the Optax states whose moments are bias-corrected; fields `count` and `mu`, `nu` or both."""


class Shown(NamedTuple):
    """How one moment is shown to the transform.

    Attributes:
        decay: b, in [0, 1).
        rule: `(new, old, decay, t, a) -> x`, one of `plain` and `nesterov`.
    """

    decay: float
    rule: Callable[[Array, Array, float, Array, Array], Array]


def plain(new: Array, old: Array, decay: float, t: Array, a: Array) -> Array:
    """The old moment to show where the transform reads m / (1 - b^t).

    Args:
        new: m_a, the moment after this step's gradient.
        old: m_{a-1}.
        decay: b.
        t: the transform's step, counted from 1, broadcastable.
        a: the entry's step.

    Returns:
        x, equal to `old` where a == t.
    """
    return old + new * (_correction(decay, t) / _correction(decay, a) - 1) / decay


def nesterov(new: Array, old: Array, decay: float, t: Array, a: Array) -> Array:
    """As `plain`, where the transform reads b m_t / (1 - b^(t+1)) + (1 - b) g / (1 - b^t) (NAdam).

    Args:
        new: m_a, the moment after this step's gradient.
        old: m_{a-1}.
        decay: b.
        t: the transform's step, counted from 1, broadcastable.
        a: the entry's step.

    Returns:
        x, equal to `old` where a == t.
    """
    step = new - decay * old  # (1 - b) g
    ahead = _correction(decay, t + 1)
    ratio = ahead / _correction(decay, a + 1)
    shift = ahead * (1 / _correction(decay, a) - 1 / _correction(decay, t))
    return old + (new * (ratio - 1) + step * shift / decay) / decay


def _correction(decay: float, steps: Array) -> Array:
    """1 - b^k."""
    return -jnp.expm1(steps * math.log(decay))


def show(shown: Shown, new: Array, old: Array, t: Array, a: Array) -> Array:
    """The old moment to show, in at least float32."""
    if shown.decay == 0:  # no memory: the old moment is never read
        return old
    dtype = jnp.promote_types(old.dtype, jnp.float32)
    return shown.rule(new.astype(dtype), old.astype(dtype), shown.decay, t.astype(dtype), a.astype(dtype))


def is_corrected(node: Any) -> bool:
    """Whether a node of an optimizer state holds bias-corrected moments."""
    return type(node).__name__ in CORRECTED


def corrected_states(state: Any) -> list[Any]:
    """All nodes with bias-corrected moments, in the order of flattening."""
    return [node for node in jax.tree.leaves(state, is_leaf=is_corrected) if is_corrected(node)]


def replace_corrected(state: Any, nodes: Sequence[Any]) -> Any:
    """The state with those nodes replaced."""
    leaves, treedef = jax.tree.flatten(state, is_leaf=is_corrected)
    new = iter(nodes)
    return treedef.unflatten([next(new) if is_corrected(leaf) else leaf for leaf in leaves])


def fields(node: Any) -> tuple[str, ...]:
    """Names of the moments of a node."""
    return tuple(name for name in ("mu", "nu") if name in node._fields)
