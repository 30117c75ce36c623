"""The default on samples that it has not seen: real pixels, fewer and more samples than inputs (a slow test)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax
from tinyjax import data
from tinyjax.methods import best_update, held_out_ridge, held_out_update, predicted_gain, tiny
from tinyjax.statistics.averages import moments

FRESH, WIDTH, NEURONS = 1000, 8, 8
SHARES = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0)  # samples / inputs
GRID = 10.0 ** np.arange(-6, 4.1, 0.5)


def loss_fn(params, batch):
    logits = jax.nn.relu(batch.image @ params["w"] + params["b"]) @ params["u"] + params["c"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()


def train(params, batch, steps):
    """Adam on random batches of 128."""
    optimizer = optax.adam(3e-3)
    one = tinyjax.train_step(loss_fn, optimizer)

    @jax.jit
    def run(params, batch):
        def step(state, key):
            rows = jax.random.choice(key, len(batch.label), (128,))
            return one(*state, jax.tree.map(lambda x: x[rows], batch))[:2], None

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    return run(params, batch) if steps else params


@pytest.mark.slow
def test_the_default_gains_on_unseen_digits_whatever_the_size_of_the_batch():
    """Gain of 8 neurons on V_res of 1000 fresh images: never negative, and 0.9 of the best ridge of a wide grid.

    As shares of mean |V_res|^2 there; `-s` prints the table.
    """
    dataset = data.load("mnist5k")
    mean, std = data.channel_moments(dataset.train)
    parts = [data.as_batch(part, mean=mean, std=std) for part in (dataset.train, dataset.validation, dataset.test)]
    images = np.concatenate([part.image for part in parts]).reshape(-1, 784).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    every = data.Batch(jnp.asarray(images[order]), jnp.asarray(np.concatenate([part.label for part in parts])[order]))
    fresh = jax.tree.map(lambda x: x[-FRESH:], every)
    rng = np.random.default_rng(1)
    shapes = {"w": (784, WIDTH), "b": (WIDTH,), "u": (WIDTH, 10), "c": (10,)}
    start = {
        name: jnp.asarray(rng.normal(size=shape) * (2 / shape[0]) ** 0.5 * (len(shape) > 1), jnp.float32)
        for name, shape in shapes.items()
    }
    site = tinyjax.find_sites(loss_fn, start, fresh)["w"]

    @jax.jit
    def estimate(params, batch):
        return tinyjax.estimate(loss_fn, params, batch, site)

    @jax.jit
    def gains(statistics, unseen):
        """Of the default and of the whole grid, as shares of what the update leaves; and the ridge chosen."""
        unseen = moments(unseen)
        delta = best_update(statistics, ridge=held_out_update)
        left = unseen.energy - 2 * jnp.sum(unseen.cross * delta) + jnp.sum(delta * (unseen.gram @ delta))
        chosen = held_out_ridge(statistics)

        def gain(ridge):
            neurons = tiny(statistics, num_neurons=NEURONS, ridge=ridge, update_ridge=held_out_update)
            return predicted_gain(unseen, neurons, delta) / left

        return gain(chosen), jax.lax.map(gain, jnp.asarray(GRID, jnp.float32)), chosen

    table = []
    for steps in (0, 30, 300):
        params = train(start, jax.tree.map(lambda x: x[:-FRESH], every), steps)
        unseen = estimate(params, fresh)
        for share in SHARES:
            default, grid, ridge = gains(
                estimate(params, jax.tree.map(partial(_first, int(share * 785)), every)), unseen
            )
            best = int(np.argmax(grid))
            table.append((steps, share, float(default), float(grid[best]), float(ridge), float(GRID[best])))
            print("steps, n / D, gain of the default and the best, ridges:", *(f"{x:.3g}" for x in table[-1]))
    for steps, share, default, best, *_ in table:
        assert default >= max(0.0, 0.9 * best), (steps, share, default, best)


def _first(count, x):
    return x[:count]
