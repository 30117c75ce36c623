"""What must hold of a growable site of plain kernels, by gradients and finite rewriting of the leaves alone."""

import jax
import numpy as np

import tinyjax
from tinyjax.statistics.averages import moments


def assert_laws(loss_fn, params, batch, name="w", *, readers=("u",), width=3, has_aux=False):
    """Law 1, the predicted second derivative along a new neuron, and the loss after `resize` and `compact`.

    The producer is the matrix `name`, its activation has slope 1 at 0; `readers` are matrices with the slots as rows.
    """
    value_of = jax.jit(lambda p: loss_fn(p, batch)[0] if has_aux else loss_fn(p, batch))
    sites = tinyjax.find_sites(loss_fn, params, batch, has_aux=has_aux)
    assert sites[name].growable, sites[name].reason
    assert [kernel.leaf for kernel in sites[name].consumers] == list(readers)
    params = tinyjax.thin(params, sites[name], width)
    found = jax.jit(lambda p: moments(tinyjax.estimate(loss_fn, p, batch, sites[name], has_aux=has_aux)))(params)
    gradient = jax.jit(jax.grad(value_of))(params)
    want = -np.concatenate([np.asarray(gradient[leaf]) for leaf in readers], axis=1)
    scale = np.abs(want).max()
    assert scale > 0
    np.testing.assert_allclose(found.cross[: len(want)], want, atol=1e-12 * scale)

    rng = np.random.default_rng(0)
    alpha, omegas = rng.normal(size=len(params[name])), [rng.normal(size=params[leaf].shape[1]) for leaf in readers]

    @jax.jit
    def along(size):
        new = params | {name: params[name].at[:, width].set(size * alpha)}
        for leaf, omega in zip(readers, omegas):
            new |= {leaf: new[leaf].at[width].set(size * omega)}
        return value_of(new)

    # By differences of the values: what the loss does, whatever it detaches from its gradient.
    values = [float(along(step * 1e-2)) for step in (-2, -1, 0, 1, 2)]
    curvature = np.dot(values, [-1, 16, -30, 16, -1]) / 12e-4
    predicted = -2 * alpha @ np.asarray(found.cross_prev)[: len(alpha)] @ np.concatenate(omegas)
    np.testing.assert_allclose(curvature, predicted, rtol=1e-5)

    before = value_of(params)
    larger, _ = tinyjax.resize(params, sites, {name: sites[name].capacity + 3})
    np.testing.assert_allclose(value_of(larger), before, rtol=1e-12)
    smaller, widths = tinyjax.compact(params, sites[name])
    assert widths == {name: width}
    np.testing.assert_allclose(value_of(smaller), before, rtol=1e-12)
