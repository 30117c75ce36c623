"""The record of sums: it adds, divides once, and survives an empty half."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.oracles import make_samples, record
from tinyjax.statistics.averages import half, moments
from tinyjax.statistics.merging import merge
from tinyjax.statistics.slices import keep_half


def test_moments_are_means_over_all_samples():
    samples = make_samples(n=31)
    mean = jax.jit(moments)(record(samples, energy_matrix=True))
    n = len(samples.v)
    np.testing.assert_allclose(mean.gram_prev, samples.b_prev.T @ samples.b_prev / n, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mean.cross, samples.b.T @ samples.v / n, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mean.energy, np.mean(np.sum(samples.v**2, axis=1)), rtol=1e-12)
    np.testing.assert_allclose(mean.energy_matrix, samples.v.T @ samples.v / n, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", [0, 1])
def test_halves_are_divided_by_their_own_count(index):
    samples = make_samples(n=31)
    mean = half(record(samples), index)
    rows = samples.v[index::2]
    np.testing.assert_allclose(mean.cross, samples.b[index::2].T @ rows / len(rows), rtol=1e-12, atol=1e-12)


def test_merge_is_the_record_of_all_samples():
    samples = make_samples(n=40)
    parts = [
        samples._replace(b_prev=samples.b_prev[i], b=samples.b[i], v=samples.v[i]) for i in (slice(16), slice(16, 40))
    ]
    merged = merge(record(parts[0]), record(parts[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), merged, record(samples))


def test_merge_takes_weights_and_width_from_the_second():
    a = record(make_samples())
    b = dataclasses.replace(a, weight=a.weight + 1, width=a.width - 1)
    merged = merge(a, b)
    np.testing.assert_array_equal(merged.weight, b.weight)
    assert merged.width == b.width


def test_merge_refuses_other_fields():
    samples = make_samples()
    with pytest.raises(ValueError, match="different shapes or fields"):
        merge(record(samples), record(samples, energy_matrix=True))
    with pytest.raises(ValueError, match="different shapes or fields"):
        merge(record(samples), record(make_samples(slots=6)))


def test_an_empty_half_gives_zeros():
    statistics = keep_half(record(make_samples()), 0)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(half(statistics, 1)))
    jax.tree.map(np.testing.assert_allclose, moments(statistics), half(statistics, 0))


def test_a_stack_of_layers_is_vmapped():
    a, b = record(make_samples(0)), record(make_samples(1))
    stacked = jax.vmap(moments)(jax.tree.map(lambda *x: jnp.stack(x), a, b))
    np.testing.assert_allclose(stacked.gram[1], moments(b).gram)


def test_moments_keep_float32():
    assert {x.dtype for x in jax.tree.leaves(moments(record(make_samples(), jnp.float32)))} == {jnp.dtype("float32")}
