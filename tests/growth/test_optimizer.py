"""Newborn slots under `with_birth` against a freshly initialised optimizer, old slots against the optimizer alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.handmade_sites import age, fill, mlp, newborn_entries
from tinyjax.growth.optimizer import reset_grown, with_birth
from tinyjax.surgery import free_slots, resize, thin, write

EXAMPLE = mlp()
BORN = {"fc1": np.arange(6) >= 4}
LABELS = {"fc1": "a", "fc2": "b", "fc3": "a"}


def cosine(offset):
    schedule = optax.cosine_decay_schedule(1e-2, 200_000)
    return lambda step: schedule(step + offset)


# Each makes the optimizer whose schedule, if any, has run `offset` steps already.
OPTIMIZERS = {
    "momentum": lambda offset: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adam": lambda offset: optax.adam(1e-2),
    "adam b1=0": lambda offset: optax.adam(1e-2, b1=0.0),
    "adamw": lambda offset: optax.adamw(1e-2, b1=0.8, b2=0.99, weight_decay=0.1),
    "nadam": lambda offset: optax.nadam(1e-2),
    "rmsprop": lambda offset: optax.rmsprop(1e-2, momentum=0.9, centered=True),
    "rmsprop corrected": lambda offset: optax.rmsprop(1e-2, bias_correction=True),
    "lion": lambda offset: optax.lion(1e-2),
    "adagrad": lambda offset: optax.adagrad(1e-2),
    "lamb": lambda offset: optax.lamb(1e-2),
    "clip, cosine": lambda offset: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(cosine(offset))),
    "multi": lambda offset: optax.multi_transform({"a": optax.adam(cosine(offset)), "b": optax.nadam(1e-2)}, LABELS),
    "masked": lambda offset: optax.masked(optax.adam(1e-2), {"fc1": True, "fc2": True, "fc3": False}),
    "inject": lambda offset: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
}
GRADIENTS = {
    "constant": lambda noise: np.broadcast_to(0.1 * np.sign(noise[0]), noise.shape),
    "noisy": lambda noise: 0.1 + noise,
    "growing": lambda noise: noise[0] * 1.05 ** np.arange(STEPS).reshape(-1, *[1] * (noise.ndim - 1)),
}
STEPS = 100


def racers(make, born):
    """A jitted function of (count at birth, gradients): updates of with_birth, the optimizer alone, a fresh one."""
    grown, alone = with_birth(make(0)), make(0)
    masks = newborn_entries(EXAMPLE, born)

    @jax.jit
    def run(steps, grads):
        fresh, params = make(steps), EXAMPLE.params

        def warm(carry, _):
            before = jax.tree.map(lambda g, m: jnp.where(m, 0.0, g[0]), grads, masks)
            return tuple(tx.update(before, s, params)[1] for tx, s in zip((grown, alone), carry)), None

        states = jax.lax.scan(warm, (grown.init(params), alone.init(params)), length=10)[0]
        states = [age(state, steps) for state in states]
        states[0] = reset_grown(grown, states[0], params, EXAMPLE.sites, {"fc1": jnp.asarray(born)})

        def step(carry, grad):
            params, *states = carry
            results = [tx.update(grad, s, params) for tx, s in zip((grown, alone, fresh), states)]
            updates = [r[0] for r in results]
            return (optax.apply_updates(params, updates[0]), *(r[1] for r in results)), updates

        return jax.lax.scan(step, (params, *states, fresh.init(params)), grads)[1]

    return run, masks


def gradients(kind):
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda x: rng.normal(size=(STEPS, *x.shape)), EXAMPLE.params)
    return jax.tree.map(GRADIENTS[kind], noise)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_newborn_slots_step_like_a_fresh_optimizer_and_old_ones_as_before(name):
    # A trust ratio mixes the entries of a leaf, so under lamb whole leaves are born.
    run, masks = racers(OPTIMIZERS[name], np.ones(6, bool) if name == "lamb" else BORN["fc1"])
    for kind in GRADIENTS:
        for steps in (0, 10, 1000, 100_000):
            for g, a, f, m in zip(*map(jax.tree.leaves, (*run(steps, gradients(kind)), masks))):
                np.testing.assert_allclose(g[:, m], f[:, m], rtol=1e-9, err_msg=f"new, {kind}, {steps}")
                np.testing.assert_allclose(g[:, ~m], a[:, ~m], rtol=1e-9, err_msg=f"old, {kind}, {steps}")


def test_without_births_the_first_steps_are_several_times_too_long():
    # `alone` had zero gradients at the newborn entries: zeroed moments without an age
    got, alone, _ = racers(OPTIMIZERS["adam"], BORN["fc1"])[0](100_000, gradients("noisy"))
    rms = [np.sqrt(np.mean(np.asarray(u["fc1"]["kernel"][:20, :, 4:]) ** 2)) for u in (got, alone)]
    assert rms[1] > 3 * rms[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_free_slots_stay_exactly_zero_through_training_and_a_birth(name):
    tx, site = with_birth(OPTIMIZERS[name](0)), EXAMPLE.sites["fc1"]
    neurons = fill(EXAMPLE, site, 1)
    neurons = neurons._replace(omega=neurons.omega.at[:, 2:].set(0), delta=None)  # no fan-out into free slots of fc2

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: jnp.mean((EXAMPLE.apply(p, EXAMPLE.x) - 1.0) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=10)
        params, born = write(params, site, neurons, amplitude=0.1)
        state = reset_grown(tx, state, params, site, {"fc1": born})
        return jax.lax.scan(step, (params, state), length=10)[0]

    params, _ = run(thin(EXAMPLE.params, EXAMPLE.sites, 2))
    assert free_slots(params, site).tolist() == [False] * 3 + [True] * 3
    assert free_slots(params, EXAMPLE.sites["fc2"]).tolist() == [False] * 2 + [True] * 2


def test_ages_survive_a_resize():
    tx, params = with_birth(optax.adam(1e-2)), EXAMPLE.params
    rng = np.random.default_rng(1)

    def train(params, state, steps):
        step = jax.jit(lambda g, s, p: tx.update(g, s, p))
        for _ in range(steps):
            grads = jax.tree.map(lambda x: 0 * x + rng.normal(), params)
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = train(params, tx.init(params), 20)
    state = reset_grown(tx, state, params, EXAMPLE.sites, BORN)
    params, state = train(params, state, 3)
    padded, padded_state, sites = resize(params, EXAMPLE.sites, {"fc1": 8, "fc2": 6}, optimizer=tx, opt_state=state)
    rng = np.random.default_rng(2)
    params, state = train(params, state, 4)
    rng = np.random.default_rng(2)
    padded, padded_state = train(padded, padded_state, 4)
    cut = lambda x, like: x[tuple(slice(n) for n in like.shape)]  # noqa: E731
    jax.tree.map(lambda x, y: np.testing.assert_allclose(cut(x, y), y, rtol=1e-12), padded, params)
    assert padded_state.births[0]["fc2"]["kernel"].ravel().tolist() == [0, 0, 0, 0, 20, 20, 0, 0]
    late = reset_grown(tx, padded_state, padded, sites, {"fc1": np.arange(8) == 7})
    assert late.births[0]["fc2"]["kernel"].ravel().tolist() == [0, 0, 0, 0, 20, 20, 0, 27]


def test_float32_and_bfloat16_stay_and_nothing_recompiles():
    tx = with_birth(optax.adam(1e-2, mu_dtype=jnp.bfloat16))
    params = jax.tree.map(lambda x: x.astype(jnp.float32), EXAMPLE.params)
    state = age(tx.init(params), 1000)
    update = jax.jit(chex.assert_max_traces(lambda g, s, p: tx.update(g, s, p), n=1))
    fresh, alone = optax.adam(1e-2), None
    state = reset_grown(tx, state, params, EXAMPLE.sites, BORN)
    alone = fresh.init(params)
    for _ in range(5):
        updates, state = update(params, state, params)
        want, alone = fresh.update(params, alone, params)
        got = updates["fc1"]["kernel"][:, 4:]
        np.testing.assert_allclose(got, want["fc1"]["kernel"][:, 4:], rtol=2e-2)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    assert state.inner[0].mu["fc1"]["bias"].dtype == jnp.bfloat16


def test_a_step_that_a_wrapper_skips_does_not_age_anyone():
    tx = with_birth(optax.apply_if_finite(optax.adam(1e-2), 5))
    params = EXAMPLE.params
    update = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(3):
        state = update(params, state, params)[1]
    state = reset_grown(tx, state, params, EXAMPLE.sites, BORN)
    _, skipped = update(jax.tree.map(lambda x: x * jnp.nan, params), state, params)
    assert int(skipped.count) == 3
    updates, _ = update(params, skipped, params)
    want = -1e-2 * np.sign(params["fc1"]["kernel"][:, 4:])
    np.testing.assert_allclose(updates["fc1"]["kernel"][:, 4:], want, rtol=1e-6)


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (optax.adafactor(1e-2), "`FactoredState` treats new slots"),
        (optax.contrib.muon(1e-2), "`MuonState` treats new slots"),
        (optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(), "`MultiStepsState` inside `with_birth`"),
        (optax.contrib.schedule_free(optax.adam(1e-2), 1e-2), "`ScheduleFreeState` inside `with_birth`"),
        (optax.radam(1e-2), "RAdam"),
        (optax.adamax(1e-2), "knows no way to give new slots a fresh start"),
        (optax.contrib.adopt(1e-2), "knows no way to give new slots a fresh start"),
        (optax.yogi(1e-2), "free slots would not stay free"),
        (optax.adam(1e-2, eps=0.0), "free slots would not stay free"),
        (optax.chain(optax.adam(1.0), optax.adam(1.0)), "two bias-corrected transforms act on `fc1/bias`"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(optimizer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(with_birth(optimizer).init, EXAMPLE.params)


def test_scalar_parameters_have_no_slots_and_train_as_before():
    tx, params = with_birth(optax.adam(1e-2)), {"temperature": jnp.asarray(2.0)}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["temperature"], -1e-2, rtol=1e-6)
