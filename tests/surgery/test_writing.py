"""Surgery: free slots, thinning, writing neurons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.handmade_sites import EXAMPLES, Neurons, fill, flat, mlp, stacked, torch_like
from tinyjax.surgery import free_slots, matrices, thin, width, write


def thinned(example, kept=2):
    return thin(example.params, example.sites, kept)


@pytest.mark.parametrize("name", EXAMPLES)
def test_width_counts_used_slots_and_thin_empties_the_rest(name):
    example = EXAMPLES[name]()
    for site in example.sites:
        assert int(width(example.params, site)) == site.capacity
        params = thinned(example)
        assert width(params, site).dtype == jnp.int32
        np.testing.assert_array_equal(free_slots(params, site), np.arange(site.capacity) >= 2)


@pytest.mark.parametrize("name", EXAMPLES)
def test_thin_equals_cutting_the_neurons_out(name):
    example, narrow = EXAMPLES[name](), EXAMPLES[name]()
    got = example.apply(thinned(example), example.x)
    # oracle: silence the neuron behind the consumer only
    params = dict(narrow.params)
    if name == "mlp":
        params["fc2"] = {"kernel": params["fc2"]["kernel"].at[2:].set(0), "bias": params["fc2"]["bias"]}
        params["fc3"] = {"kernel": params["fc3"]["kernel"].at[2:].set(0), "bias": params["fc3"]["bias"]}
    elif name == "torch_like":
        params |= {"u": params["u"].at[:, 2:].set(0), "v": params["v"].at[:, 2:].set(0)}
    elif name == "flat":
        out = params["params"]["out"].reshape(6, 4, 3).at[:, 2:].set(0).reshape(24, 3)
        params["params"] = params["params"] | {"out": out}
    elif name == "conv":
        params["second"] = params["second"].at[:, :, 2:].set(0)
    else:
        params["u"] = params["u"].at[:, 2:].set(0)
    np.testing.assert_allclose(got, narrow.apply(params, narrow.x), atol=1e-12)


def test_a_slot_is_used_when_any_part_or_any_layer_is():
    example = stacked()
    params = thinned(example)
    for leaf, index in [("w", (2, 0, 3)), ("b", (1, 3)), ("u", (0, 3, 1))]:
        touched = params | {leaf: params[leaf].at[index].set(1e-30)}
        assert free_slots(touched, example.sites[0]).tolist() == [False, False, True, False]


def test_thin_leaves_scale_and_variance_one_and_mean_zero():
    example = flat()
    params = thinned(example)
    assert params["params"]["scale"][2:].tolist() == [1, 1]
    assert params["stats"]["var"][2:].tolist() == [1, 1]
    assert params["stats"]["mean"][2:].tolist() == [0, 0]
    assert params["params"]["shift"][2:].tolist() == [0, 0]


def _dense_oracle(params, x, neurons, site, amplitude):
    """Output of `mlp` with neurons added to `fc1` by hand, a new hidden vector beside the old one."""
    root = np.sqrt(amplitude)
    h = np.tanh(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    new = np.tanh(np.c_[x, np.ones(len(x))] @ (root * neurons.alpha))
    used = np.r_[~np.asarray(free_slots(params, site)), True]
    delta = np.asarray(neurons.delta) * used[:, None] * amplitude
    a = h @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    a = a + new @ (root * neurons.omega) + np.c_[h, np.ones(len(x))] @ delta
    return np.tanh(a) @ params["fc3"]["kernel"] + params["fc3"]["bias"]


def test_write_adds_the_neurons_and_the_update_to_the_function():
    example = mlp()
    site = example.sites["fc1"]
    params = thin(example.params, example.sites, {"fc1": 2})
    neurons = fill(example, site, 3)
    got, written = jax.jit(lambda p, g: write(p, site, neurons, amplitude=g))(params, 0.3)
    assert written.tolist() == [False, False, True, True, True, False]
    want = _dense_oracle(params, np.asarray(example.x), neurons, site, 0.3)
    np.testing.assert_allclose(example.apply(got, example.x), want, atol=1e-12)


def test_write_multiplies_like_the_matrices_of_the_site():
    for name, make in EXAMPLES.items():
        example = make()
        site = example.sites[0]
        params = thinned(example)
        neurons = fill(example, site, 2)._replace(delta=None)
        new, _ = write(params, site, neurons, amplitude=4.0)
        before, after = matrices(params, site), matrices(new, site)
        change = np.asarray(after[0] - before[0])
        np.testing.assert_allclose(change[..., 2:4], 2 * neurons.alpha, atol=1e-12, err_msg=name)
        assert not change[..., :2].any() and not change[..., 4:].any()
        assert np.linalg.norm(after[1] - before[1]) == pytest.approx(2 * np.linalg.norm(neurons.omega))


def test_fan_out_of_a_flattened_axis_is_ordered_output_then_position():
    example = flat()
    site = example.sites[0]
    neurons = fill(example, site, 1)
    params, _ = write(thinned(example), site, neurons._replace(delta=None), amplitude=1.0)
    for m in range(3):
        for position in range(6):
            assert params["params"]["out"][position * 4 + 2, m] == neurons.omega[0, m * 6 + position]


def test_fan_out_of_a_convolution_is_ordered_output_then_offset():
    example = EXAMPLES["conv"]()
    neurons = fill(example, example.sites[0], 1)
    params, _ = write(thinned(example), example.sites[0], neurons._replace(delta=None), amplitude=1.0)
    want = neurons.omega[0].reshape(3, 3, 3).transpose(1, 2, 0)
    np.testing.assert_array_equal(params["second"][:, :, 2], want)


def test_consumers_stand_side_by_side_and_share_a_bias_row_only_if_all_have_one():
    example = torch_like()
    site = example.sites[0]
    neurons = fill(example, site, 1)
    params, _ = write(thinned(example), site, neurons, amplitude=1.0)
    assert matrices(params, site)[1].shape == (6, 5)
    np.testing.assert_array_equal(params["u"][:, 2], neurons.omega[0, :2])
    np.testing.assert_array_equal(params["v"][:, 2], neurons.omega[0, 2:])
    np.testing.assert_allclose(params["v"][:, 0], example.params["v"][:, 0] + neurons.delta[0, 2:])
    np.testing.assert_array_equal(params["c"], example.params["c"])


def test_write_never_overwrites_and_stops_at_the_last_free_slot():
    example = mlp()
    site = example.sites["fc1"]
    params = thin(example.params, site, 5)
    neurons = fill(example, site, 3)._replace(delta=None)
    new, written = write(params, site, neurons, amplitude=1.0)
    assert written.tolist() == [False] * 5 + [True]
    np.testing.assert_array_equal(new["fc1"]["kernel"][:, :5], params["fc1"]["kernel"][:, :5])
    np.testing.assert_array_equal(new["fc2"]["kernel"][:5], params["fc2"]["kernel"][:5])
    full, written = write(new, site, neurons, amplitude=1.0)
    assert not written.any()
    jax.tree.map(np.testing.assert_array_equal, full, new)


def test_neuron_k_goes_into_the_kth_free_slot():
    example = mlp()
    site = example.sites["fc1"]
    neurons = fill(example, site, 2)._replace(delta=None)
    new, written = write(thin(example.params, site, 3), site, neurons, amplitude=1.0)
    assert written.tolist() == [False] * 3 + [True] * 2 + [False]
    np.testing.assert_allclose(new["fc1"]["kernel"][:, 3:5], neurons.alpha[:-1], rtol=1e-6)
    np.testing.assert_allclose(new["fc2"]["kernel"][3:5], neurons.omega, rtol=1e-6)


@pytest.mark.parametrize("amplitude, limit, count", [(1.0, 2, 2), (1.0, 0, 0), (0.0, None, 0), (1.0, None, 3)])
def test_limit_zero_neurons_and_zero_amplitude_write_nothing(amplitude, limit, count):
    example = mlp()
    site = example.sites["fc1"]
    params = thinned(example)
    neurons = fill(example, site, 4)
    neurons = Neurons(neurons.alpha.at[:, 3].set(0), neurons.omega.at[3].set(0))
    new, written = jax.jit(lambda p, g, n: write(p, site, neurons, amplitude=g, limit=n))(
        params, amplitude, 4 if limit is None else limit
    )
    assert int(written.sum()) == count == int(width(new, site)) - 2


def test_the_second_write_takes_the_next_free_slots_inside_scan():
    example = mlp()
    site = example.sites["fc1"]
    neurons = [fill(example, site, 2, seed)._replace(delta=None) for seed in (0, 1)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *neurons)
    step = jax.jit(
        lambda p: jax.lax.scan(lambda p, n: write(p, site, Neurons(*n), amplitude=1.0), p, stack),
    )
    params, written = step(thinned(example))
    np.testing.assert_array_equal(written, [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(params["fc1"]["kernel"][:, 4:], neurons[1].alpha[:-1])


def test_a_neuron_with_only_a_fan_out_is_written():
    example = mlp()
    site = example.sites["fc1"]
    neurons = fill(example, site, 1)
    neurons = Neurons(jnp.zeros_like(neurons.alpha), neurons.omega)
    params, written = write(thinned(example), site, neurons, amplitude=1.0)
    assert written.tolist() == [False, False, True, False, False, False]
    assert int(width(params, site)) == 3


def test_birth_sets_the_vectors_of_the_written_slots_only():
    example = flat()
    site = example.sites[0]
    params = thinned(example)
    params["stats"]["var"] = params["stats"]["var"].at[2:].set(1e-8)  # a decayed running variance
    neurons = fill(example, site, 1)
    new, _ = write(params, site, neurons, amplitude=1.0)
    assert (new["params"]["scale"][2], new["stats"]["var"][2], new["stats"]["var"][3]) == (1, 1, 1e-8)
    birth = {"stats/mean": jnp.array([2.0]), "params/shift": 7.0}  # one value a neuron, or one for all
    new, _ = write(params, site, neurons, amplitude=1.0, birth=birth)
    assert new["stats"]["mean"].tolist() == [*params["stats"]["mean"][:2].tolist(), 2.0, 0.0]
    assert new["params"]["shift"].tolist() == [*params["params"]["shift"][:2].tolist(), 7.0, 0.0]


def test_dtypes_are_kept():
    example = mlp()
    site = example.sites["fc1"]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), thinned(example))
    neurons = jax.tree.map(lambda x: x.astype(jnp.float32), fill(example, site, 2))
    new, _ = write(params, site, neurons, amplitude=0.1)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}


def test_misuse_names_the_thing():
    example = mlp()
    site = example.sites["fc1"]
    with pytest.raises(ValueError, match=r"`width` 7 of site `fc1` is outside 0 .. 6"):
        thin(example.params, site, 7)
    with pytest.raises(ValueError, match="`width` -1"):
        thin(example.params, site, -1)
    with pytest.raises(ValueError, match="no site `fc9`; the sites are `fc1`, `fc2`"):
        thin(example.params, example.sites, {"fc9": 1})
    refused = site.__class__("s", 6, False, "3 producers", site.members, site.producers, site.consumers)
    with pytest.raises(ValueError, match="site `s` cannot grow: 3 producers"):
        thin(example.params, refused, 1)
    integers = jax.tree.map(lambda x: x.astype(jnp.int32), example.params)
    with pytest.raises(ValueError, match="is int32: only floats can grow"):
        thin(integers, site, 1)
    with pytest.raises(ValueError, match=r"`fc1/kernel` has shape \(5, 9\) where site `fc1` says \(5, 6\)"):
        width(mlp(h1=9).params, site)
    neurons = fill(example, site, 2)
    with pytest.raises(ValueError, match=r"`alpha` has shape \(5, 2\); site `fc1` needs \(6, 2\)"):
        write(example.params, site, neurons._replace(alpha=neurons.alpha[:5]), amplitude=1.0)
    with pytest.raises(ValueError, match="`birth` names `fc9`"):
        write(example.params, site, neurons, amplitude=1.0, birth={"fc9": 0})
