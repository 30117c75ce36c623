"""`reset_grown`: which entries of an optimizer's state a birth touches, under each rule and in each layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.handmade_sites import EXAMPLES, age, fill, flat, mlp, newborn_entries
from tinyjax.growth.optimizer import BirthState, all_afresh, reset_grown, with_birth, zeros
from tinyjax.surgery import thin, write

EXAMPLE = mlp()
BORN = {"fc1": np.arange(6) >= 4}


def test_an_entry_is_as_old_as_its_younger_side():
    tx = with_birth(optax.adam(1.0))
    params = EXAMPLE.params
    state = age(tx.init(params), 50)
    state = reset_grown(tx, state, params, EXAMPLE.sites, {"fc2": np.arange(4) == 3})
    state = age(state, 90)
    state = reset_grown(tx, state, params, EXAMPLE.sites, BORN)
    births = np.maximum(*(tree["fc2"]["kernel"] for tree in state.births))
    want = np.zeros((6, 4), int)
    want[:, 3], want[4:] = 50, 90
    np.testing.assert_array_equal(births, want)


@pytest.mark.parametrize("wrap", ["schedule_free", "multi_steps"])
def test_wrappers_go_outside_and_are_reset_too(wrap):
    base = with_birth(optax.adam(1e-2))
    tx = optax.contrib.schedule_free(base, 1e-2) if wrap == "schedule_free" else optax.MultiSteps(base, 2)
    tx = tx if isinstance(tx, optax.GradientTransformation) else tx.gradient_transformation()

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        params, state = jax.lax.scan(step, (params, tx.init(params)), length=3)[0]
        return params, reset_grown(tx, state, params, EXAMPLE.sites, BORN)

    params, state = run(EXAMPLE.params)
    inner = state.base_optimizer_state if wrap == "schedule_free" else state.inner_opt_state
    new = newborn_entries(EXAMPLE, BORN["fc1"])["fc1"]["kernel"]
    assert isinstance(inner, BirthState)
    assert np.unique(inner.births[1]["fc1"]["kernel"][0, 4:]).tolist() == [int(inner.count)]
    shadow, want = (
        (state.z, params) if wrap == "schedule_free" else (state.acc_grads, jax.tree.map(jnp.zeros_like, params))
    )
    np.testing.assert_array_equal(shadow["fc1"]["kernel"][new], want["fc1"]["kernel"][new])
    assert (shadow["fc1"]["kernel"] != want["fc1"]["kernel"])[~new].all()


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_layout_marks_the_entries_that_write_writes(name):
    example = EXAMPLES[name]()
    site = example.sites[0]
    tx = with_birth(optax.adam(1.0))
    before = thin(example.params, site, 2)
    neurons = fill(example, site, 1)._replace(delta=None)
    after, born = write(before, site, neurons, amplitude=1.0)
    state = age(tx.init(after), 7)
    state = reset_grown(tx, state, after, site, {site.name: born})

    def check(old, new, *births):
        marked = np.broadcast_to(
            np.any(np.stack([np.broadcast_to(b, old.shape) for b in births]) == 7, axis=0), old.shape
        )
        assert marked[np.asarray(old != new)].all()

    jax.tree.map(check, before, after, *state.births)
    count = sum(
        int(np.max(np.stack([np.broadcast_to(b, x.shape) for b in bs]), axis=0).astype(bool).sum())
        for x, *bs in zip(*map(jax.tree.leaves, (after, *state.births)))
    )
    slots = sum(int(np.prod(m.layout.shape)) // site.capacity for m in site.members)
    assert count == slots


def test_the_optimizer_may_see_only_a_part_of_the_parameters():
    example = flat()
    tx = with_birth(optax.adam(1e-2))

    def trainable(variables):
        return {"net": variables["params"]}

    part = trainable(example.params)
    state = age(tx.init(part), 5)
    born = {"kernel": jnp.arange(4) == 1}
    state = jax.jit(lambda s: reset_grown(tx, s, example.params, example.sites, born, trainable=trainable))(state)
    assert state.births[0]["net"]["scale"].tolist() == [0, 5, 0, 0]
    assert state.births[0]["net"]["out"].ravel().tolist() == [0, 5, 0, 0] * 6


def test_the_other_rules():
    params = EXAMPLE.params
    tx = optax.adam(1e-2)
    state = tx.update(params, tx.init(params), params)[1]
    zeroed = reset_grown(tx, state, params, EXAMPLE.sites, BORN, rule=zeros)
    mask = newborn_entries(EXAMPLE, BORN["fc1"])
    jax.tree.map(lambda z, s, m: np.testing.assert_array_equal(z, np.where(m, 0, s)), zeroed[0].mu, state[0].mu, mask)
    assert int(zeroed[0].count) == 1
    restarted = reset_grown(tx, state, params, EXAMPLE.sites, BORN, rule=all_afresh)
    jax.tree.map(np.testing.assert_array_equal, restarted, tx.init(params))
    nobody = {"fc1": np.zeros(6, bool)}
    for rule in (zeros, all_afresh):
        jax.tree.map(
            np.testing.assert_array_equal, reset_grown(tx, state, params, EXAMPLE.sites, nobody, rule=rule), state
        )


def test_misuse_names_the_thing():
    params, tx = EXAMPLE.params, optax.adam(1e-2)
    with pytest.raises(ValueError, match="wrap the optimizer as `with_birth"):
        reset_grown(tx, tx.init(params), params, EXAMPLE.sites, BORN)
    with pytest.raises(ValueError, match="no site `fc9`"):
        reset_grown(tx, tx.init(params), params, EXAMPLE.sites, {"fc9": BORN["fc1"]})
    with pytest.raises(ValueError, match=r"`born` of site `fc1` has shape \(4,\), not \(6,\)"):
        reset_grown(tx, tx.init(params), params, EXAMPLE.sites, {"fc1": np.ones(4, bool)})
