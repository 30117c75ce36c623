"""Resizing, compacting, capacity policies: the same function at every capacity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.handmade_sites import EXAMPLES, fill, flat, mlp, stacked
from tinyjax.surgery import compact, exact, full, geometric, multiple_of, resize, thin, width, write
from tinyjax.surgery.trainable import trained_names


def same(a, b, atol=1e-12):
    np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("name", EXAMPLES)
def test_padding_cutting_and_compacting_keep_the_function(name):
    example = EXAMPLES[name]()
    want = example.apply(example.params, example.x)
    bigger, sites = resize(example.params, example.sites, {s.name: s.capacity + 3 for s in example.sites})
    same(example.apply(bigger, example.x), want)
    for old, new in zip(example.sites, sites):
        assert new.capacity == old.capacity + 3 and int(width(bigger, new)) == old.capacity
    back, again = resize(bigger, sites, {s.name: s.capacity for s in example.sites})
    jax.tree.map(np.testing.assert_array_equal, back, example.params)
    assert again == example.sites
    small, widths = compact(bigger, sites)
    jax.tree.map(np.testing.assert_array_equal, small, example.params)
    assert widths == {s.name: s.capacity for s in example.sites}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_neuron_written_after_padding_is_the_neuron_written_before(name):
    example = EXAMPLES[name]()
    site = example.sites[0]
    params = thin(example.params, site, 2)
    neurons = fill(example, site, 1)._replace(delta=None)
    want = example.apply(write(params, site, neurons, amplitude=1.0)[0], example.x)
    params, sites = resize(params, example.sites, {site.name: 9})
    same(example.apply(write(params, sites[0], neurons, amplitude=1.0)[0], example.x), want)


HOLE = np.array([0, 3])


def with_hole(example):
    """`mlp` with slots 0 and 3 of its first hidden layer free."""
    for leaf, index in [("kernel", (slice(None), HOLE)), ("bias", HOLE)]:
        example.params["fc1"][leaf] = example.params["fc1"][leaf].at[index].set(0)
    example.params["fc2"]["kernel"] = example.params["fc2"]["kernel"].at[HOLE].set(0)
    return example


def test_cutting_moves_used_slots_to_the_front_only_if_needed():
    example = with_hole(mlp())
    want = example.apply(example.params, example.x)
    wide, sites = resize(example.params, example.sites, {"fc1": 10})
    cut, _ = resize(wide, sites, {"fc1": 6})
    jax.tree.map(np.testing.assert_array_equal, cut, example.params)
    five, sites = resize(wide, sites, {"fc1": 5})
    same(example.apply(five, example.x), want)
    np.testing.assert_array_equal(five["fc1"]["bias"], [*(example.params["fc1"]["bias"][i] for i in (1, 2, 4, 5)), 0])
    small, widths = compact(example.params, example.sites)
    assert widths == {"fc1": 4, "fc2": 4} and small["fc2"]["kernel"].shape == (4, 4)
    same(example.apply(small, example.x), want)


def test_an_empty_site_can_be_compacted_and_padded_again():
    example = mlp()
    params = thin(example.params, example.sites["fc2"], 0)
    small, widths = compact(params, example.sites)
    assert widths == {"fc1": 6, "fc2": 0}
    same(example.apply(small, example.x), example.apply(params, example.x))
    _, sites = resize(params, example.sites, widths)
    again, _ = resize(small, sites, {"fc2": 4})
    jax.tree.map(np.testing.assert_array_equal, again, params)


OPTIMIZERS = {
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "adamw": optax.adamw(1e-2, weight_decay=1e-3),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, 100))),
    "multi": optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.9)}, {"fc1": "a", "fc2": "b", "fc3": "a"}
    ),
    "masked": optax.masked(optax.adam(1e-2), {"fc1": True, "fc2": True, "fc3": False}),
    "inject": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "schedule_free": optax.contrib.schedule_free(optax.adam(1e-2), 1e-2),
    "multi_steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_been_resized(name):
    example, tx = mlp(), OPTIMIZERS[name]

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((example.apply(p, example.x) - 1.0) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(example.params, tx.init(example.params))
    params, state = step(params, state)
    grown, grown_state, sites = resize(params, example.sites, {"fc1": 8, "fc2": 8}, optimizer=tx, opt_state=state)
    for _ in range(3):
        params, state = step(params, state)
        grown, grown_state = step(grown, grown_state)
    same(example.apply(grown, example.x), example.apply(params, example.x))
    back, back_state, _ = resize(grown, sites, {"fc1": 6, "fc2": 4}, optimizer=tx, opt_state=grown_state)
    jax.tree.map(same, (back, back_state), (params, state))


def test_state_of_a_trained_part_and_averages_follow_the_same_slots():
    example, tx = flat(), optax.adam(1e-2)
    params = example.params
    params["params"] = {k: v.at[..., 1].set(0) if k != "out" else v for k, v in params["params"].items()}
    params["params"]["out"] = params["params"]["out"].reshape(6, 4, 3).at[:, 1].set(0).reshape(24, 3)

    def trainable(variables):
        return variables["params"]

    state = tx.init(trainable(params))
    state = (state[0]._replace(mu=trainable(params)), *state[1:])
    params, state, averages, sites = resize(
        params,
        example.sites,
        {"kernel": 3},
        optimizer=tx,
        opt_state=state,
        like=(params, trainable(params)),
        trainable=trainable,
    )
    jax.tree.map(np.testing.assert_array_equal, state[0].mu, trainable(params))
    jax.tree.map(np.testing.assert_array_equal, averages, (params, trainable(params)))
    assert sites["kernel"].capacity == 3 and params["params"]["out"].shape == (18, 3)


def test_factored_moments_start_afresh():
    example, tx = mlp(h1=130, h2=130), optax.adafactor(1e-2)
    state = jax.tree.map(lambda x: x + 1, tx.init(example.params))
    _, state, _ = resize(example.params, example.sites, {"fc1": 140}, optimizer=tx, opt_state=state)
    factored = state[0]
    assert factored.v_row["fc2"]["kernel"].shape == (130,) and factored.v_col["fc2"]["kernel"].shape == (140,)
    assert float(factored.v_col["fc2"]["kernel"].max()) == 0


def test_padding_works_inside_jit_and_cutting_refuses():
    example = stacked()
    padded = jax.jit(lambda p: resize(p, example.sites, {"w": 6})[0])(example.params)
    assert padded["u"].shape == (3, 6, 5)
    with pytest.raises(ValueError, match="cutting slots of site `w` depends on which slots are free"):
        jax.jit(lambda p: resize(p, example.sites, {"w": 2})[0])(example.params)
    with pytest.raises(ValueError, match="the size of a compact network"):
        jax.jit(lambda p: compact(p, example.sites)[0])(example.params)


def test_misuse_names_the_thing():
    example, tx = mlp(), optax.adam(1e-2)
    with pytest.raises(ValueError, match="capacity 3 of site `fc1` would cut used slots: its width is 6"):
        resize(example.params, example.sites, {"fc1": 3})
    with pytest.raises(ValueError, match="no site `fc9`"):
        resize(example.params, example.sites, {"fc9": 3})
    with pytest.raises(ValueError, match="`optimizer` and `opt_state` belong together"):
        resize(example.params, example.sites, {"fc1": 8}, optimizer=tx)
    with pytest.raises(ValueError, match="another structure"):
        resize(example.params, example.sites, {"fc1": 8}, optimizer=tx, opt_state=optax.sgd(1.0).init(example.params))
    refused = dataclasses.replace(example.sites[0], growable=False, reason="3 producers")
    with pytest.raises(ValueError, match="site `fc1` cannot grow: 3 producers"):
        resize(example.params, refused, {"fc1": 8})
    with pytest.raises(ValueError, match="`trainable` must pick leaves of the parameters, but it computed `a`"):
        trained_names(lambda p: {"a": 2 * p["b"]}, {"b": jnp.ones(2)})


def test_policies():
    needed, final = {"a": 11, "b": 3}, {"a": 64, "b": 128}
    assert exact(needed, final) == needed
    assert full(needed, final) == final
    assert multiple_of(8)(needed) == {"a": 16, "b": 8}
    assert multiple_of(8)(needed, final) == {"a": 16, "b": 32}
    assert multiple_of(8)({"a": 64, "b": 3}, {"a": 60, "b": 20}) == {"a": 64, "b": 20}
    assert geometric(2.0)(needed) == {"a": 16, "b": 4}
    assert geometric(2.0)(needed, final) == {"a": 16, "b": 32}
    example = mlp()
    params, sites = resize(thin(example.params, example.sites, 2), example.sites, multiple_of(3))
    assert [s.capacity for s in sites] == [3, 3] and params["fc2"]["kernel"].shape == (3, 3)


@pytest.mark.parametrize("policy", [exact, multiple_of(8), geometric(1.5), full])
def test_policies_hold_the_need_and_stop_at_the_final_widths(policy):
    final = {"a": 60, "b": 100}
    seen = set()
    for k in range(1, 21):
        needed = {"a": 3 * k, "b": 5 * k - 3}
        capacities = policy(needed, final)
        assert all(needed[s] <= capacities[s] <= final[s] for s in final)
        seen.add(tuple(capacities.items()))
    assert policy({"a": 70, "b": 5}, final)["a"] >= 70, "what is needed is given, beyond the final width too"
    # lock-step: two sites that grow side by side share their bumps
    assert len(seen) <= {"exact": 20, "full": 1}.get(policy.__name__, 9)


def test_policies_refuse_what_they_cannot_know():
    with pytest.raises(ValueError, match="`full` allocates the final widths: pass `final`"):
        full({"a": 3})
    with pytest.raises(ValueError, match="`final` gives site `a` no width"):
        multiple_of(8)({"a": 3}, {"b": 3})
    with pytest.raises(ValueError, match="`multiple` must be at least 1, got 0"):
        multiple_of(0)
    with pytest.raises(ValueError, match="`ratio` must be above 1, got 1"):
        geometric(1)
