"""Brute-force check that a site reported growable really is."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinyjax.core.kernels import cols, have_bias, num_inputs, readers, rows
from tinyjax.core.neurons import Neurons
from tinyjax.core.params import named_leaves
from tinyjax.core.site import Sites
from tinyjax.discovery.sites import find_sites
from tinyjax.estimation.estimator import estimate
from tinyjax.surgery.fans import lead
from tinyjax.surgery.thinning import thin
from tinyjax.surgery.writing import write

STEP = 1e-5
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TRIALS = [(1, 0, 1.0), (0, 1, 1.0), (1, 1, 0.0), (1, 1, STEP), (1, 1, STEP / 2)]


class Report(NamedTuple):
    """What was measured at one site; every field must be (close to) zero.

    Attributes:
        silent_out: change of the loss by a neuron with fan-out zero.
        silent_in: change of the loss by a neuron with fan-in zero.
        untouched: change of the parameters by a neuron of amplitude zero.
        dust: largest gradient in an empty slot.
        slope: relative error of the first-order change of the loss.
        identity: relative error of the consumers' gradient.
    """

    silent_out: float
    silent_in: float
    untouched: float
    dust: float
    slope: float
    identity: float


def inspect(model: Any, slope: float = 1.0, only: Callable[[Any], bool] = lambda site: True) -> dict[str, Report]:
    """Reports on every growable site of a model (or on some), from one compilation."""
    found = find_sites(model.loss_fn, model.params, model.batch, has_aux=model.has_aux).growable
    sites = Sites(site for site in found if only(site))
    if not sites:
        return {}

    def loss_of(params: Any, batch: Any) -> Any:
        loss = model.loss_fn(params, batch)
        return loss[0] if model.has_aux else loss

    @partial(jax.jit, compiler_options=QUICK)
    def measure(params: Any, batch: Any, key: Any) -> Any:
        variants, drawn = [params], {}
        for site, k in zip(sites, jax.random.split(key, len(sites))):
            start = thin(params, site, site.capacity - 1)
            variants.append(start)
            ka, ko = jax.random.split(k)
            *layers, size = *lead(site.producers[0]), 1
            if site.pattern:  # value dimensions of a head: neurons side by side
                *layers, size = lead(site.producers[0])
            alpha = jax.random.normal(ka, (*layers, num_inputs(site), size), start_dtype(params))
            fan_out = sum(rows(c) // site.capacity // size * cols(c) for c in site.consumers)
            omega = jax.random.normal(ko, (*site.stack, size, fan_out), start_dtype(params))
            drawn[site.name] = alpha, omega
            gate = None
            if site.gate is not None or site.pattern:
                gate = estimate(model.loss_fn, start, batch, site, has_aux=model.has_aux).gates

            def add(a: Any, o: Any, g: Any, start: Any = start, site: Any = site, gate: Any = gate) -> Any:
                alpha, omega = drawn[site.name]
                return write(
                    start, site, Neurons(a * alpha, o * omega, jnp.ones(alpha.shape[-1]), gate=gate), amplitude=g
                )[0]

            variants.append(jax.vmap(add)(*jnp.array(TRIALS).T))
        stacked = jax.tree.map(lambda x: x[None], variants[0])
        for more in variants[1:]:
            batched = jax.tree.map(lambda x, like: x if x.ndim > like.ndim else x[None], more, params)
            stacked = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stacked, batched)

        def one(p: Any) -> Any:
            return (
                *jax.value_and_grad(lambda p: loss_of(p, batch) - model.penalty(p))(p),
                estimate(model.loss_fn, p, batch, sites, has_aux=model.has_aux),
            )

        return jax.lax.map(one, stacked), drawn, stacked

    (losses, grads, stats), drawn, variants = jax.tree.map(
        np.asarray, measure(model.params, model.batch, jax.random.key(5))
    )
    grads, variants = named_leaves(grads), named_leaves(variants)
    reports = {}
    for i, site in enumerate(sites):
        first = 1 + 6 * i
        base = losses[first]
        alpha, omega = drawn[site.name]
        record = jax.tree.map(lambda x, at=first: x[at], stats[site.name])
        n = record.count.reshape(-1, 2)[0].sum()
        moment = record.cross_prev.sum(axis=-3) / n
        if record.heads is None:
            expected = -slope * np.sum((np.swapaxes(alpha, -1, -2) @ moment) * omega)
        else:
            expected = -slope * in_heads(alpha, moment, omega)
        rate = [(losses[first + 4] - base) / STEP, (losses[first + 5] - base) / (STEP / 2)]
        found = 2 * rate[1] - rate[0]
        scale = np.sqrt(np.sum(alpha**2) * np.sum(omega**2)) * np.sqrt(np.sum(moment**2))
        dust = max(np.abs(m.layout.to_slots(grads[m.leaf][first])[..., -1, :]).max() for m in site.members)
        reports[site.name] = Report(
            silent_out=0.0 if record.normed else abs(losses[first + 1] - base),  # a norm sees a fan-in
            silent_in=abs(losses[first + 2] - base),
            untouched=max(np.abs(v[first + 3] - v[first]).max() for v in variants.values()),
            dust=dust,
            slope=abs(found - expected) / scale,
            identity=identity_error(
                site, jax.tree.map(lambda x: x[0], stats[site.name]), {k: v[0] for k, v in grads.items()}
            ),
        )
    return reports


def in_heads(alpha: Any, moment: Any, omega: Any) -> Any:
    """What the neurons of all heads do, read off a moment whose rows are (head, offset, input), by loops."""
    if alpha.ndim > 3:
        return sum(in_heads(*layer) for layer in zip(alpha, moment, omega))
    heads, inputs, _ = alpha.shape
    offsets = moment.shape[0] // (heads * inputs)
    moment, omega = moment.reshape(heads, offsets, inputs, -1), omega.reshape(-1, heads, offsets)
    pairs = [(h, o) for h in range(heads) for o in range(offsets)]
    return sum(alpha[h, :, 0] @ moment[h, o] @ omega[:, h, o] for h, o in pairs)


def start_dtype(params: Any) -> Any:
    return jax.tree.leaves(params)[0].dtype


def identity_error(site: Any, record: Any, grads: dict[str, Any]) -> float:
    """Law 1: -(1/n) B' V_goal against the gradient of every consumer leaf, relative to its largest entry."""
    n = record.count.reshape(-1, 2)[0].sum()
    cross, worst, row, col = -record.cross.sum(axis=-3) / n, 0.0, 0, 0
    for group in readers(site):
        height = rows(group[0]) + have_bias(group)
        for kernel in group:
            grad = kernel.layout.to_matrix(grads[kernel.leaf])
            if have_bias(group):
                grad = np.concatenate([grad, kernel.bias.to_matrix(grads[kernel.bias.leaf])], axis=-2)
            mine = cross[..., row : row + height, col : col + grad.shape[-1]]
            worst = max(worst, np.abs(mine - grad).max() / np.abs(grad).max())
            col += grad.shape[-1]
        row += height
    assert (row, col) == cross.shape[-2:]
    return worst
