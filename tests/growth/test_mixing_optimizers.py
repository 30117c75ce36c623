"""Optimizers that write what other entries hold into free slots are refused; the oracle trains a thinned network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax
from tests.support.zoo.layers import draw
from tinyjax.growth.optimizer import all_afresh, zeros

PARAMS = draw(0, w=(5, 6), c=(6,), u=(6, 6), d=(6,), v=(6, 3))
BATCH = draw(1, x=(32, 5), t=(32, 3))


def loss_fn(p, b):
    hidden = jnp.tanh(jnp.tanh(b["x"] @ p["w"] + p["c"]) @ p["u"] + p["d"])
    return jnp.mean((hidden @ p["v"] - b["t"]) ** 2)


SITES = tinyjax.find_sites(loss_fn, PARAMS, BATCH)
START = tinyjax.thin(PARAMS, SITES, 3)


def each(function, rank=1):
    """A transformation of every leaf of at least that rank."""
    return optax.stateless(lambda g, p: jax.tree.map(lambda x: function(x) if x.ndim >= rank else x, g))


def after(transformation):
    return optax.chain(transformation, optax.adam(1e-2))


def before(transformation):
    return optax.chain(optax.sgd(1e-2, momentum=0.9), transformation)


def from_step(first, function):
    """A transformation that begins later in a training."""
    late = lambda g, count: jax.tree.map(lambda x: jnp.where(count >= first, function(x), x), g)  # noqa: E731
    return optax.GradientTransformation(lambda p: jnp.zeros((), int), lambda g, s, p=None: (late(g, s), s + 1))


def towards_the_mean(g, p):
    return jax.tree.map(lambda x, y: x + 0.1 * (y - y.mean()), g, p)


MIXING = {
    "centralised": after(optax.centralize()),
    "centralised after momentum": before(optax.centralize()),
    "columns centred": after(each(lambda x: x - x.mean(0), 2)),
    "vectors centred": after(each(lambda x: x - x.mean() if x.ndim == 1 else x)),
    "standardised rows": after(each(lambda x: (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-8), 2)),
    "neighbours": before(each(lambda x: x + 0.1 * jnp.roll(x, 1, -1), 2)),
    "decay towards a mean": optax.chain(optax.stateless(towards_the_mean), optax.sgd(1e-2)),
    "a mean over all leaves": after(
        optax.stateless(lambda g, p: jax.tree.map(lambda x: x - sum(y.mean() for y in jax.tree.leaves(g)), g))
    ),
    "large leaves centred": after(each(lambda x: x - x.mean() if x.size > 16 else x)),
    "rows of many centred": after(each(lambda x: x - x.mean(-1, keepdims=True) if x.shape[-1] > 4 else x, 2)),
    "centred later": before(from_step(3, lambda x: x - x.mean())),
    "one leaf of many": after(
        optax.masked(optax.centralize(), {"w": False, "c": False, "u": True, "d": False, "v": False})
    ),
}
# They mix the entries of a leaf too, but what is zero stays zero.
SCALING = {
    "rows by their norm": after(each(lambda x: x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-8), 2)),
    "blocks clipped": after(optax.clip_by_block_rms(0.1)),
    "units clipped": after(optax.adaptive_grad_clip(0.01)),
    "by the norm of the update": before(optax.normalize_by_update_norm()),
    "trust ratios": before(optax.scale_by_trust_ratio()),
    "lars": optax.lars(1e-2),
    "softsign of a leaf": before(each(lambda x: x / (jnp.abs(x).max() + 1e-8))),
    "large leaves by their norm": after(each(lambda x: x / (jnp.linalg.norm(x) + 1e-8) if x.size > 16 else x)),
    "scaled later": before(from_step(3, lambda x: x / (jnp.linalg.norm(x) + 1e-8))),
    "a mask of the true shapes": before(optax.stateless(lambda g, p: g | {"w": g["w"] * np.eye(5, 6)})),
}


def widths_after_training(optimizer):
    params, state = START, optimizer.init(START)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss_fn)(params, BATCH), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
    return [int(tinyjax.width(params, site)) for site in SITES]


@pytest.mark.parametrize("name", MIXING)
def test_what_wakes_free_slots_is_refused(name):
    assert widths_after_training(MIXING[name]) != [3, 3]
    with pytest.raises(ValueError, match="free slots would not stay free: in a trial, entries of `[wcudv]` that were"):
        jax.eval_shape(tinyjax.with_birth(MIXING[name]).init, PARAMS)


@pytest.mark.parametrize("name", SCALING)
def test_what_only_scales_is_accepted(name):
    optimizer = tinyjax.with_birth(SCALING[name])
    assert widths_after_training(optimizer) == [3, 3]


def low_rank(x):
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    return (u[:, :1] * s[:1]) @ v[:1]


def whitened(x):
    values, vectors = jnp.linalg.eigh(x @ x.T)
    return vectors @ ((vectors.T @ x) / jnp.sqrt(values[:, None] + 1e-6))


def on_its_columns(x):
    basis, _ = jnp.linalg.qr(x)
    return basis @ (basis.T @ x)


@pytest.mark.parametrize("function, operation", [(low_rank, "svd"), (whitened, "eigh"), (on_its_columns, "")])
def test_a_decomposition_gives_zeros_only_up_to_rounding(function, operation):
    optimizer = after(optax.masked(each(function, 2), dict.fromkeys(PARAMS, False) | {"u": True}))
    with pytest.raises(ValueError, match=f"it mixes the entries of `u` by `.*{operation}"):
        jax.eval_shape(tinyjax.with_birth(optimizer).init, PARAMS)


def test_a_state_of_its_own_is_refused_by_its_name():
    for optimizer, name in ((optax.contrib.muon(1e-2), "MuonState"), (optax.adafactor(1e-2), "FactoredState")):
        with pytest.raises(ValueError, match=f"`{name}`"):
            jax.eval_shape(tinyjax.with_birth(optimizer).init, PARAMS)


def test_without_births_a_growth_refuses_it_along_the_axes_of_its_sites():
    born = {"w": np.arange(6) == 3}
    for optimizer in (optax.chain(optax.centralize(), optax.sgd(1e-2)), optax.yogi(1e-2)):
        with pytest.raises(ValueError, match="entries of `[wcu]` that were zero along axis"):
            tinyjax.growth.optimizer.reset_grown(optimizer, optimizer.init(START), START, SITES, born, rule=zeros)
    # Centred along the outputs of the last kernel, which no site runs through: nothing is woken.
    quiet = optax.masked(each(lambda x: x - x.mean(-1, keepdims=True)), dict.fromkeys(PARAMS, False) | {"v": True})
    optimizer = optax.chain(quiet, optax.sgd(1e-2))
    assert widths_after_training(optimizer) == [3, 3]
    tinyjax.growth.optimizer.reset_grown(optimizer, optimizer.init(START), START, SITES, born)
    for optimizer in (optax.contrib.muon(1e-2), optax.adafactor(1e-2)):
        tinyjax.growth.optimizer.reset_grown(optimizer, optimizer.init(START), START, SITES, born, rule=all_afresh)
