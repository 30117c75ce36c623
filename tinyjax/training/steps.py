"""Gradient steps: one, and one after another over an epoch."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array

from tinyjax.core.batch import map_samples
from tinyjax.core.params import Params, named_leaves, replace_leaves
from tinyjax.surgery import Trainable, all_params
from tinyjax.surgery.trainable import trained_names

LossFn = Callable[..., Any]
WithAux = Callable[[Params, Any], Params]


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Trainable = all_params,
    has_aux: bool = False,
) -> Callable[[Params, Any, Any], tuple[Params, Any, Array, Any]]:
    """A gradient step on the trained part of the parameters: pure, not yet jitted.

    Returns:
        `params, opt_state, loss, aux = step(params, opt_state, batch)`; aux is None without `has_aux`.

    Example:
        >>> step = jax.jit(tinyjax.train_step(loss_fn, optimizer))
        >>> params, opt_state, loss, _ = step(params, opt_state, batch)
    """
    gradient_step = _gradient_step(loss_fn, trainable, has_aux)
    update_step = _update_step(optimizer, trainable)

    def step(params: Params, opt_state: Any, batch: Any) -> tuple[Params, Any, Array, Any]:
        gradient, loss, aux = gradient_step(params, batch)
        return *update_step(params, opt_state, gradient), loss, aux

    return step


def train_epoch(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Trainable = all_params,
    has_aux: bool = False,
    with_aux: WithAux | None = None,
) -> Callable[[Params, Any, Any, Array], tuple[Params, Any, Array]]:
    """Gradient steps over data that lies on the device, as one `lax.scan`: pure, not yet jitted.

    For data sets that fit into the device's memory: no batch is copied and nothing is dispatched step by step.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, or `(loss, aux)` with `has_aux`.
        optimizer: an Optax optimizer.
        trainable: the part of the parameters that the optimizer sees.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
        with_aux: puts aux (new running statistics) into the parameters after a step.

    Returns:
        `params, opt_state, losses = epoch(params, opt_state, data, order)`: `order` (steps, batch) holds the samples of
        every step, `losses` is (steps,).

    Example:
        >>> epoch = jax.jit(tinyjax.train_epoch(loss_fn, optimizer))
        >>> order = jax.random.permutation(key, 64).reshape(-1, 16)
        >>> params, opt_state, losses = epoch(params, opt_state, batch, order)
        >>> losses.shape
        (4,)
    """
    one_step = train_step(loss_fn, optimizer, trainable=trainable, has_aux=has_aux)

    def epoch(params: Params, opt_state: Any, data: Any, order: Array) -> tuple[Params, Any, Array]:
        def body(state: tuple[Params, Any], rows: Array) -> tuple[tuple[Params, Any], Array]:
            # `clip` leaves out the masks of plain indexing, which cost a sixth of a small network's step
            batch = map_samples(lambda leaf: leaf.at[rows].get(mode="clip"), data)
            params, opt_state, loss, aux = one_step(*state, batch)
            return (params if with_aux is None else with_aux(params, aux), opt_state), loss

        (params, opt_state), losses = jax.lax.scan(body, (params, opt_state), order)
        return params, opt_state, losses

    return epoch


def _gradient_step(
    loss_fn: LossFn, trainable: Trainable, has_aux: bool
) -> Callable[[Params, Any], tuple[Params, Array, Any]]:
    """`gradient, loss, aux = step(params, batch)`, the gradient with respect to the trained part."""

    def step(params: Params, batch: Any) -> tuple[Params, Array, Any]:
        def loss_of(part: Params) -> tuple[Array, Any]:
            out = loss_fn(_put(params, part, trainable), batch)
            return out if has_aux else (out, None)

        (loss, aux), gradient = jax.value_and_grad(loss_of, has_aux=True)(trainable(params))
        return gradient, loss, aux

    return step


def _update_step(
    optimizer: optax.GradientTransformation, trainable: Trainable
) -> Callable[[Params, Any, Params], tuple[Params, Any]]:
    """`params, opt_state = step(params, opt_state, gradient)`."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(params: Params, opt_state: Any, gradient: Params) -> tuple[Params, Any]:
        part = trainable(params)
        updates, opt_state = optimizer.update(gradient, opt_state, part)
        return _put(params, optax.apply_updates(part, updates), trainable), opt_state

    return step


def _put(params: Params, part: Params, trainable: Trainable) -> Params:
    """The parameters with another trained part."""
    names = trained_names(trainable, params)
    return replace_leaves(params, {names[name]: leaf for name, leaf in named_leaves(part).items()})


def _mean_update(
    update_step: Callable[..., tuple[Params, Any]], params: Params, opt_state: Any, total: Any, count: Array
) -> tuple[Params, Any, Array]:
    """An update by the mean of `count` gradients, and the mean of their losses."""
    gradient, loss = jax.tree.map(lambda x: x / count, total)
    return *update_step(params, opt_state, gradient), loss
