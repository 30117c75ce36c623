"""What every method owes its callers: shapes, dtypes, traits, exact zeros, and clear refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tests.support.oracles import conv_record, make_conv_site, make_samples, record
from tinyjax import methods


@methods.traits(function_preserving=False, stochastic=False)
def partial_tiny(statistics, **options):
    """Two neurons of `tiny`, and nothing where more are asked for."""
    neurons = methods.tiny(statistics, **options)
    kept = jnp.arange(len(neurons.singular_values)) < 2
    return neurons._replace(
        alpha=jnp.where(kept, neurons.alpha, 0),
        omega=jnp.where(kept[:, None], neurons.omega, 0),
        singular_values=jnp.where(kept, neurons.singular_values, 0),
    )


METHODS = {
    "tiny": methods.tiny,
    "tiny0": methods.tiny0,
    "tiny_unprojected": methods.tiny_unprojected,
    "tiny_joint": methods.tiny_joint,
    "tiny_linear": methods.tiny_linear,
    "fisher_tiny": methods.fisher_tiny,
    "gradmax": methods.gradmax,
    "gradmax_dual": methods.gradmax_dual,
    "north": methods.north,
    "north_weight": methods.north_weight,
    "random": methods.random,
    "random0": methods.random0,
    "net2net": methods.net2net,
    "completed": methods.completed(methods.tiny, methods.random0),
    "second_order": methods.second_order,
    "completed, second order": methods.completed(partial_tiny, methods.second_order),
}
samples = make_samples(n=60, inputs=9, slots=5, live=3, outputs=6)
samples.b_prev[:, 2:4] = 0  # free slots of the layer below
samples.weight_prev[2:4] = 0
samples.b[:, :-1] = np.tanh(samples.b_prev @ samples.weight_prev)
samples.v[:, 1] = 0  # free slot of the layer above
samples.weight[:, 1] = 0
all_sums = functools.partial(record, energy_matrix=True, third_outputs=np.eye(6)[[0, 2, 4, 5]])


@functools.cache
def jitted(name):
    return jax.jit(functools.partial(METHODS[name], num_neurons=4))


def neurons_of(name, samples, dtype=jnp.float64):
    return jitted(name)(all_sums(samples, dtype), key=jax.random.key(0))


@functools.cache
def run(name, dtype):
    return neurons_of(name, samples, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", METHODS)
def test_shapes_and_dtypes(name, dtype):
    got = run(name, dtype)
    assert got.alpha.shape == (10, 4) and got.omega.shape == (4, 6) and got.singular_values.shape == (4,)
    assert (got.delta is not None) == (name in ("tiny_joint", "net2net"))
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))
    assert np.all(np.diff(got.singular_values) <= 0)


@pytest.mark.parametrize("name", METHODS)
def test_free_slots_of_the_neighbours_get_exact_zeros(name):
    got = run(name, jnp.float64)
    assert np.all(got.alpha[2:4] == 0) and np.all(got.omega[:, 1] == 0)
    assert got.delta is None or (np.all(got.delta[3:5] == 0) and np.all(got.delta[:, 1] == 0))
    assert np.any(got.alpha != 0) or np.any(got.omega != 0)


@pytest.mark.parametrize("name", METHODS)
def test_function_preserving_methods_keep_the_function(name):
    got = run(name, jnp.float64)
    pre = samples.b_prev @ got.alpha
    if got.delta is not None:  # goes with the neurons that are there, which are tanh
        move = np.tanh(pre) @ got.omega + samples.b @ got.delta
    else:  # not odd: a second-order neuron and its mirror cancel there
        move = pre / (1 + np.exp(-pre)) @ got.omega
    kept = np.all(np.abs(move) < 1e-12)
    assert kept == methods.is_function_preserving(METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_stochastic_methods_need_a_key_and_use_it(name):
    method, statistics = METHODS[name], all_sums(samples)
    if methods.is_stochastic(method):
        with pytest.raises(ValueError, match="draws random numbers: pass `key=`"):
            method(statistics, num_neurons=4)
        other = jax.jit(functools.partial(method, num_neurons=4))(statistics, key=jax.random.key(1))
        moved = [np.max(np.abs(a - b)) > 1e-6 for a, b in zip(other[:2], run(name, jnp.float64)[:2])]
        assert any(moved) == (name != "completed")  # there all four places are tiny's
    else:
        other = jax.jit(functools.partial(method, num_neurons=4))(statistics)
        np.testing.assert_allclose(other.alpha, run(name, jnp.float64).alpha, atol=1e-12)


def directions(vectors, axis):
    lengths = np.linalg.norm(vectors, axis=axis, keepdims=True)
    return np.asarray(vectors) / np.where(lengths == 0, 1, lengths)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 5e-3), (jnp.float64, 1e-7)])
@pytest.mark.parametrize("name", METHODS)
def test_law_4_the_unit_of_the_loss_changes_no_choice(name, dtype, tolerance):
    """How many neurons, what each reads and where it writes."""
    want = run(name, dtype)
    for c in (1e-3, 1e3):
        got = neurons_of(name, samples._replace(v=c * samples.v), dtype)
        np.testing.assert_array_equal(got.singular_values > 0, want.singular_values > 0)
        for side, axis in (("alpha", 0), ("omega", 1)):
            a, b = (directions(getattr(neurons, side), axis) for neurons in (got, want))
            np.testing.assert_allclose(a, b, atol=tolerance, err_msg=side)


# What becomes of the activity alpha' b of new neurons when the unit of the inputs changes; as the docstrings say.
SAME = (
    *("tiny", "tiny_unprojected", "tiny_joint", "fisher_tiny", "completed", "net2net", "second_order"),
    "completed, second order",
)
SAME_UP_TO_LENGTH = ("tiny0", "random0", "north_weight")  # the fan-in has a length of its own, no bias or the right one
UNIT_DEPENDENT = ("gradmax_dual", "random")


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-2), (jnp.float64, 1e-6)])
@pytest.mark.parametrize("name", (*SAME, *SAME_UP_TO_LENGTH, *UNIT_DEPENDENT))
def test_law_4_the_unit_of_the_inputs(name, dtype, tolerance):
    def activity(neurons, inputs):
        found = inputs @ np.asarray(neurons.alpha, np.float64)
        return found if name in SAME else directions(found, 0)

    def difference(c):
        """Of the neurons for inputs in another unit, in a network that undoes it."""
        units = np.append(np.full(9, c), 1.0)
        scaled = samples._replace(b_prev=samples.b_prev * units, weight_prev=samples.weight_prev / units[:, None])
        want = activity(run(name, dtype), samples.b_prev)
        return np.max(np.abs(activity(neurons_of(name, scaled, dtype), scaled.b_prev) - want)) / np.max(np.abs(want))

    differences = [difference(c) for c in (1e-3, 1e2)]
    if name in UNIT_DEPENDENT:
        assert max(differences) > 0.1
    else:
        assert max(differences) < tolerance


@pytest.mark.parametrize("name", METHODS)
def test_no_neurons_is_refused(name):
    with pytest.raises(ValueError, match="`num_neurons` must be an int >= 1"):
        METHODS[name](all_sums(samples), num_neurons=0, key=jax.random.key(0))


@pytest.mark.parametrize("name", [n for n in METHODS if not n.endswith(("joint", "linear", "order", "second_order"))])
def test_convolutional_sites(name):
    site = conv_record(make_conv_site())
    matrix = jnp.broadcast_to(jnp.eye(9) * site.energy[0] / 9, (2, 9, 9))
    statistics = dataclasses.replace(site, energy_matrix=matrix)
    got = jax.jit(functools.partial(METHODS[name], num_neurons=2))(statistics, key=jax.random.key(0))
    assert got.alpha.shape == (7, 2) and got.omega.shape == (2, 9)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))


def test_traits_are_read_through_wrappers():
    @functools.wraps(methods.random0)
    def wrapped(*args, **kwargs):
        return methods.random0(*args, **kwargs)

    for method in (wrapped, functools.partial(functools.partial(wrapped, num_neurons=2), key=None)):
        assert methods.is_function_preserving(method) and methods.is_stochastic(method)
    assert not methods.is_function_preserving(lambda statistics, **_: None)


MISSING = {"fisher_tiny": "`energy_matrix`", "second_order": "ask `estimate` for `third_moments=4`"}


@pytest.mark.parametrize(
    "name", ["tiny_unprojected", "tiny_joint", "gradmax", "gradmax_dual", "fisher_tiny", "second_order"]
)
def test_missing_sums_are_named(name):
    with pytest.raises(ValueError, match=MISSING.get(name, "`link`|dense consumer")):
        METHODS[name](record(samples, link=False), num_neurons=2)


def test_methods_declare_the_sums_they_need():
    assert methods.needs(methods.tiny, None) == {}
    assert methods.needs(functools.partial(methods.fisher_tiny, output_ridge=0.1)) == {"energy_matrix": True}
    both = methods.completed(methods.fisher_tiny, methods.second_order, useful=methods.within_significance)
    assert methods.needs(both) == {"energy_matrix": True, "third_moments": 4, "null_draws": 19}


def test_where_methods_start_from_the_residual_of_the_best_update():
    """Known of library methods with the ridges they come with; of no other can a growth leave the link out."""
    common, usual = methods.common_residual, methods.held_out_update
    assert common(methods.tiny0, methods.random0) is usual
    assert common(methods.completed(methods.tiny, methods.random0), None) is usual
    assert common(tinyjax.growth.normalized(methods.tiny, alpha=1.0)) is usual
    own = functools.partial(methods.tiny, ridge=0.0)
    for other in (
        own,
        tinyjax.growth.normalized(own, alpha=1.0),
        functools.partial(own, key=None),
        methods.completed(own, methods.random0),
    ):
        assert common(other, methods.random0) is None
    for other in (methods.gradmax, methods.tiny_joint, methods.tiny_unprojected, lambda statistics, **kwargs: None):
        assert common(methods.tiny, other) is None


def test_joint_refuses_convolutions():
    with pytest.raises(ValueError, match="`tiny_joint` needs a dense consumer"):
        methods.tiny_joint(conv_record(make_conv_site()), num_neurons=1)
