"""Pruning against brute force: least squares on the samples with a neuron's columns left out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.handmade_sites import flat, mlp, stacked
from tinyjax.surgery import free_slots, prune, thin, width


class Moments(NamedTuple):
    gram: jax.Array


def moments(h):
    """Sums over even and odd rows."""
    h = np.asarray(h)
    return Moments(jnp.asarray(np.stack([h[0::2].T @ h[0::2], h[1::2].T @ h[1::2]])))


def hidden(params, x):
    h = np.tanh(x @ np.asarray(params["fc1"]["kernel"]) + np.asarray(params["fc1"]["bias"]))
    return np.c_[h, np.ones(len(h))]


def refit(h, target, columns):
    """Best weights of `target` on some columns of h, and what is left."""
    weight, *_ = np.linalg.lstsq(h[:, columns], target, rcond=None)
    return weight, np.sum((target - h[:, columns] @ weight) ** 2)


def test_prune_removes_the_neuron_that_least_squares_can_spare():
    example = mlp()
    site = example.sites["fc1"]
    params = thin(example.params, site, 5)
    x = np.random.default_rng(0).normal(size=(40, 5))
    h = hidden(params, x)
    target = h @ np.r_[params["fc2"]["kernel"], params["fc2"]["bias"][None]]
    left = {j: [c for c in (0, 1, 2, 3, 4, 6) if c != j] for j in range(5)}
    best = min(left, key=lambda j: refit(h, target, left[j])[1])
    new, removed = jax.jit(lambda p: prune(p, site, moments(h), num_neurons=1))(params)
    assert removed.tolist() == [j == best for j in range(6)]
    weight = np.r_[new["fc2"]["kernel"], new["fc2"]["bias"][None]]
    np.testing.assert_allclose(weight[left[best]], refit(h, target, left[best])[0], atol=1e-6)
    assert free_slots(new, site)[best] and int(width(new, site)) == 4


def test_prune_is_greedy_and_refits_after_each_removal():
    example = mlp()
    site = example.sites["fc1"]
    h = hidden(example.params, np.random.default_rng(1).normal(size=(40, 5)))
    target = h @ np.r_[example.params["fc2"]["kernel"], example.params["fc2"]["bias"][None]]
    columns = list(range(7))
    for _ in range(3):
        gone = min(columns[:-1], key=lambda j: refit(h, target, [c for c in columns if c != j])[1])
        columns.remove(gone)
    new, removed = prune(example.params, site, moments(h), num_neurons=3)
    assert np.flatnonzero(~removed).tolist() == columns[:-1]
    weight = np.r_[new["fc2"]["kernel"], new["fc2"]["bias"][None]]
    np.testing.assert_allclose(weight[columns], refit(h, target, columns)[0], atol=1e-5)


def test_a_duplicate_costs_nothing_and_the_function_stays():
    example = mlp()
    params = example.params
    for leaf in ("kernel", "bias"):
        params["fc1"][leaf] = params["fc1"][leaf].at[..., 4].set(params["fc1"][leaf][..., 1])
    params["fc1"]["bias"] = params["fc1"]["bias"].astype(jnp.float64)
    x = np.random.default_rng(2).normal(size=(40, 5))
    new, removed = prune(params, example.sites["fc1"], moments(hidden(params, x)), num_neurons=1)
    assert set(np.flatnonzero(removed)) <= {1, 4} and removed.sum() == 1
    np.testing.assert_allclose(example.apply(new, x), example.apply(params, x), atol=1e-6)


def test_a_flattened_axis_loses_all_positions_of_a_channel():
    example = flat()
    rng = np.random.default_rng(3)
    h = np.c_[rng.normal(size=(80, 24)), np.ones(80)]
    p = example.params["params"]
    target = h @ np.r_[p["out"], p["out_bias"][None]]
    left = {j: [c for c in range(25) if c == 24 or c % 4 != j] for j in range(4)}
    best = min(left, key=lambda j: refit(h, target, left[j])[1])
    new, removed = prune(example.params, example.sites[0], moments(h), num_neurons=1)
    assert removed.tolist() == [j == best for j in range(4)]
    weight = np.r_[new["params"]["out"], new["params"]["out_bias"][None]]
    np.testing.assert_allclose(weight[left[best]], refit(h, target, left[best])[0], atol=1e-6)


def test_layers_of_a_stack_vote_together():
    example = stacked()
    rng = np.random.default_rng(4)
    h = rng.normal(size=(3, 40, 4))
    target = [h[layer] @ example.params["u"][layer] for layer in range(3)]
    left = {j: [c for c in range(4) if c != j] for j in range(4)}
    best = min(left, key=lambda j: sum(refit(h[i], target[i], left[j])[1] for i in range(3)))
    stats = Moments(jnp.stack([moments(h[i]).gram for i in range(3)]))
    new, removed = prune(example.params, example.sites[0], stats, num_neurons=1)
    assert removed.tolist() == [j == best for j in range(4)]
    for i in range(3):
        np.testing.assert_allclose(new["u"][i][jnp.array(left[best])], refit(h[i], target[i], left[best])[0], atol=1e-6)


def test_only_used_slots_are_removed_and_misuse_is_named():
    example = mlp()
    site = example.sites["fc1"]
    params = thin(example.params, site, 2)
    stats = moments(hidden(params, np.random.default_rng(5).normal(size=(40, 5))))
    new, removed = prune(params, site, stats, num_neurons=4)
    assert removed.tolist() == [True, True, False, False, False, False] and int(width(new, site)) == 0
    with pytest.raises(ValueError, match=r"`num_neurons` 7 of site `fc1` is outside 0 .. 6"):
        prune(params, site, stats, num_neurons=7)
    with pytest.raises(ValueError, match="`gram` is for 3 inputs; the consumers of site `fc1` have 7"):
        prune(params, site, Moments(jnp.ones((2, 3, 3))), num_neurons=1)
