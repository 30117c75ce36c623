"""Edges that a network does not have, against least squares, the network with the edge, and its quadratic loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tinyjax.methods import tiny_joint

SIZES = {"a": (5, 6), "b": (6, 4), "c": (4, 3)}
N = 120
exact = partial(tiny_joint, ridge=0.0, update_ridge=0.0)


def make():
    rng = np.random.default_rng(0)
    params = {k: {"w": jnp.asarray(rng.normal(size=s) / s[0] ** 0.5), "b": jnp.zeros(s[1])} for k, s in SIZES.items()}
    x = rng.normal(size=(N, 5))
    t = np.tanh(x @ rng.normal(size=(5, 3))) + x[:, :3] + 0.1 * rng.normal(size=(N, 3))
    return params, {"x": jnp.asarray(x), "t": jnp.asarray(t)}


def model(params, batch, moves=None):
    """Tanh layers; `moves` are added to pre-activations by the layer's name."""
    x = batch["x"]
    for name in SIZES:
        a = x @ params[name]["w"] + params[name]["b"] + (0 if moves is None else moves.get(name, 0))
        x = jnp.tanh(a) if name != "c" else a
    return x


def objective(z, batch):
    return jnp.mean(jnp.sum((z - batch["t"]) ** 2, axis=-1))


@pytest.fixture(scope="module")
def edges():
    params, batch = make()
    find = jax.jit(partial(tinyjax.analysis.score_edges, model, objective, rank=3, method=exact, update_ridge=0.0))
    return params, batch, find(params, batch)


def captured(params, batch):
    """Inputs of the three products and V_goal at them, on the first half of the samples, by hand."""
    x, t = (np.asarray(batch[k])[: N // 2] for k in ("x", "t"))
    w, b = ([np.asarray(params[k][e]) for k in SIZES] for e in ("w", "b"))
    first = np.tanh(x @ w[0] + b[0])
    second = np.tanh(first @ w[1] + b[1])
    goal_c = -2 * (second @ w[2] + b[2] - t)
    goal_b = goal_c @ w[2].T * (1 - second**2)
    goal_a = goal_b @ w[1].T * (1 - first**2)
    return dict(a=x, b=first, c=second), dict(a=goal_a, b=goal_b, c=goal_c)


def test_all_pairs_and_their_gains_are_those_of_least_squares(edges):
    params, batch, found = edges
    assert set(found) == {"a/w -> b/w", "a/w -> c/w", "b/w -> c/w"}
    inputs, goals = captured(params, batch)
    for name in ("a/w -> b/w", "a/w -> c/w"):
        source, target = (leaf[0] for leaf in name.split(" -> "))
        h, v = np.c_[inputs[target], np.ones(N // 2)], goals[target]
        left = [v - both @ np.linalg.lstsq(both, v, rcond=1e-12)[0] for both in (h, np.c_[h, inputs[source]])]
        gain = (np.sum(left[0] ** 2) - np.sum(left[1] ** 2)) / (N // 2)
        if name == "a/w -> c/w":  # M = 3 = rank: the whole edge
            np.testing.assert_allclose(found[name].gain, gain, rtol=1e-7)
        else:
            assert 0 < found[name].gain < gain


def test_the_slope_with_its_update_is_the_decrease_of_psi(edges):
    params, batch, found = edges
    half = {k: v[: N // 2] for k, v in batch.items()}
    inputs, goals = captured(params, batch)
    for name in ("a/w -> b/w", "a/w -> c/w"):
        source, target = (leaf[0] for leaf in name.split(" -> "))
        edge, h = found[name], np.c_[inputs[target], np.ones(N // 2)]
        alone = np.sum((h @ np.linalg.lstsq(h, goals[target], rcond=1e-12)[0]) ** 2) / (N // 2)
        move = jnp.asarray(inputs[source] @ np.asarray(edge.weight) + h @ np.asarray(edge.delta))
        loss = lambda g, move=move, target=target: float(objective(model(params, half, {target: g * move}), half))  # noqa: E731
        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        np.testing.assert_allclose(slope, -(alone + edge.gain), rtol=1e-6)


def test_the_score_is_the_decrease_where_the_loss_is_quadratic(edges):
    """Into the read-out of a squared error, on the half that the edge was not computed from."""
    params, batch, found = edges
    half = {k: v[N // 2 :] for k, v in batch.items()}
    edge, x = found["a/w -> c/w"], half["x"]
    hidden = jnp.tanh(jnp.tanh(x @ params["a"]["w"]) @ params["b"]["w"])
    move = x @ edge.weight + jnp.c_[hidden, jnp.ones(N // 2)] @ edge.delta
    at = [float(objective(model(params, half, {"c": g * move}), half)) for g in (0.0, 1.0, 2.0)]
    fit = np.polyfit([0.0, 1.0, 2.0], at, 2)
    np.testing.assert_allclose(edge.score.gain + edge.score.gain_update, fit[1] ** 2 / (4 * fit[0]), rtol=1e-7)
    np.testing.assert_allclose(edge.score.amplitude, -fit[1] / (2 * fit[0]), rtol=1e-7)


def test_what_is_left_out_and_misuse():
    params, batch = make()
    shared = lambda p, b: jnp.tanh(jnp.tanh(b["x"] @ p["w"]) @ p["w"]) @ p["u"]  # noqa: E731
    found = tinyjax.analysis.score_edges(
        shared, objective, {"w": jnp.eye(5), "u": jnp.ones((5, 3))}, batch, rank=1, method=exact, update_ridge=0.0
    )
    assert found == {}  # `w` is used twice, so that neither its input nor its output is one place
    with pytest.raises(ValueError, match="at least 8 samples"):
        tinyjax.analysis.score_edges(model, objective, params, {k: v[:6] for k, v in batch.items()}, rank=1)
    with pytest.raises(ValueError, match="`tiny_joint` does"):
        tinyjax.analysis.score_edges(model, objective, params, batch, rank=1, method=tinyjax.methods.tiny)
