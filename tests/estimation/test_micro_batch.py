"""Statistics of more samples than one capture holds: micro-batches for losses that couple samples, two passes where N
cannot be projected before all samples have been seen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tests.support.zoo import images
from tests.support.zoo.layers import data
from tinyjax.core.batch import take_samples
from tinyjax.estimation import convolution
from tinyjax.statistics.convolution.image_sums import conv_sums

FIELDS = ("count", "gram_prev", "cross_prev", "gram", "cross", "link", "energy")


@pytest.fixture(scope="module")
def normalised():
    """Two convolutions and a dense layer behind batch normalisations in training mode, 24 samples."""
    model = images.NORMALISED["linen_training"]()
    batch = data(24, *model.batch["x"].shape[1:])
    sites = tinyjax.find_sites(model.loss_fn, model.params, batch, has_aux=True)
    return model.loss_fn, model.params, batch, sites


def test_v_goal_is_that_of_the_mean_over_the_micro_batches(normalised):
    loss_fn, params, batch, sites = normalised
    site = sites["first"]
    found = jax.jit(lambda p, b: tinyjax.estimate(loss_fn, p, b, site, has_aux=True, micro_batch=8))(params, batch)

    def loss(p):
        return sum(loss_fn(p, take_samples(batch, i, i + 8))[0] for i in (0, 8, 16)) / 3

    (consumer,) = site.consumers
    gradient = jax.jit(jax.grad(loss))(params)
    for key in consumer.leaf.split("/"):
        gradient = gradient[key]
    cross = tinyjax.statistics.moments(found).cross  # rows (kh, kw, channel), bias row last
    rows = gradient.reshape(-1, gradient.shape[-1])
    np.testing.assert_allclose(-cross[: len(rows)], rows, rtol=0, atol=1e-12)
    whole = jax.jit(lambda p, b: tinyjax.estimate(loss_fn, p, b, site, has_aux=True))(params, batch)
    assert np.abs(found.cross - whole.cross).max() > 1e-3  # another loss: normalised by other samples


def test_sums_are_those_of_the_micro_batches(normalised):
    loss_fn, params, batch, sites = normalised

    def sums_of(p, b, **options):
        return tinyjax.estimate(loss_fn, p, b, sites["second"], has_aux=True, **options)

    found = jax.jit(partial(sums_of, micro_batch=14))(params, batch)
    parts = [jax.jit(sums_of)(params, take_samples(batch, *cut)) for cut in ((0, 14), (14, 24))]
    merged = tinyjax.statistics.merge(*parts)
    for field in FIELDS:
        np.testing.assert_allclose(getattr(found, field), getattr(merged, field), rtol=1e-9, atol=1e-12, err_msg=field)


def raw_residual(linked, delta):
    """N~ - P delta of both halves, undivided."""
    feasible = np.einsum("sodh,hm->sdmo", linked.link, delta)
    return linked.cross_prev - feasible.reshape(linked.cross_prev.shape)


def test_a_projection_takes_the_place_of_the_link(normalised):
    loss_fn, params, batch, sites = normalised
    sites = tinyjax.Sites(sites[name] for name in ("first", "second"))
    ridges = {"none": None, "number": 0.1, "held out": tinyjax.methods.held_out_update}

    @jax.jit
    def every(p, b):
        return {
            name: tinyjax.estimate(loss_fn, p, b, sites, has_aux=True, project=ridge) for name, ridge in ridges.items()
        }

    found = every(params, batch)
    for site in sites.names:
        linked = found["none"][site]
        for name in ("number", "held out"):
            projected = found[name][site]
            assert projected.link is None and projected.cross_asked is None
            ridge = 0.1 if name == "number" else tinyjax.methods.held_out_update(linked)
            np.testing.assert_allclose(projected.ridge_update, ridge, rtol=1e-12)
            expected = raw_residual(linked, tinyjax.methods.best_update(linked, ridge=ridge))
            np.testing.assert_allclose(projected.cross_prev, expected, rtol=1e-8, atol=1e-10)
            for field in set(FIELDS) - {"cross_prev", "link"}:
                np.testing.assert_allclose(getattr(projected, field), getattr(linked, field), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "linked"),
    [({}, False), ({"method": partial(tinyjax.methods.tiny0, ridge=0.0)}, True), ({"update": None}, True)],
)
def test_a_growth_sums_the_link_only_where_it_is_needed(normalised, options, linked):
    """A ridge or an update of one's own is not what the residual was taken at."""
    loss_fn, params, batch, sites = normalised
    site = sites["first"]
    estimate = partial(tinyjax.estimate, loss_fn, sites=site, has_aux=True)
    shape = jax.eval_shape(lambda p, b: estimate(p, b).link, params, batch).shape
    grow_step = tinyjax.make_grow_step(loss_fn, site, num_neurons=1, has_aux=True, **options)
    program = str(jax.make_jaxpr(grow_step)(tinyjax.thin(params, site, 1), batch))
    assert (f"[{','.join(map(str, shape))}]" in program) == linked


def test_records_with_a_projection_are_not_merged(normalised):
    loss_fn, params, batch, sites = normalised
    with pytest.raises(ValueError, match="without `link`"):
        tinyjax.estimate(loss_fn, params, iter([batch, batch]), sites["first"], has_aux=True, project=1.0)


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def plain_loss(p, batch):
    return jnp.mean((conv(jnp.tanh(conv(batch["x"], p["k"])), p["u"]) - batch["t"]) ** 2)


def test_wide_sites_pass_twice(monkeypatch):
    """No chunk alone knows the update that N is projected against."""
    rng = np.random.default_rng(0)
    params = {"k": jnp.asarray(rng.normal(size=(3, 3, 2, 3))), "u": jnp.asarray(rng.normal(size=(3, 3, 3, 2)))}
    batch = {"x": jnp.asarray(rng.normal(size=(20, 4, 4, 2))), "t": jnp.asarray(rng.normal(size=(20, 4, 4, 2)))}
    (site,) = tinyjax.find_sites(plain_loss, params, batch)
    monkeypatch.setattr(convolution, "conv_sums", partial(conv_sums, link_limit=1))
    monkeypatch.setattr(convolution, "LINK_LIMIT", 1)
    found, whole, apart = (
        jax.jit(lambda p, b, c=chunk: tinyjax.estimate(plain_loss, p, b, site, chunk=c))(params, part)
        for chunk, part in ((8, batch), (None, batch), (None, take_samples(batch, 0, 8)))
    )
    assert found.link is None
    for field in (*FIELDS[:5], "energy", "cross_asked"):
        np.testing.assert_allclose(getattr(found, field), getattr(whole, field), rtol=1e-9, atol=1e-11, err_msg=field)
    assert np.abs(apart.cross_prev / 8 - whole.cross_prev / 20).max() > 1e-3
    chosen, at_once = (
        jax.jit(lambda p, b, c=chunk: tinyjax.estimate(plain_loss, p, b, site, chunk=c, project=0.5))(params, batch)
        for chunk in (8, None)
    )
    for field in (*FIELDS[:5], "energy", "ridge_update"):
        np.testing.assert_allclose(getattr(chosen, field), getattr(at_once, field), rtol=1e-9, atol=1e-11)
    assert np.abs(chosen.cross_prev - whole.cross_prev).max() > 1e-3  # not the exact update's


@pytest.mark.slow
def test_growing_with_them(normalised):
    loss_fn, params, _, sites = normalised
    batch = data(32, 4, 4, 2)
    site = sites["first"]
    params = tinyjax.thin(params, site, 1)
    grow_step = tinyjax.make_grow_step(loss_fn, site, num_neurons=1, has_aux=True, estimate_micro_batch=8)
    new, info = grow_step(params, batch)
    assert int(tinyjax.width(new, site)) == 2 and info.loss_after["first"] <= info.loss_before["first"]
    parts = [take_samples(batch, i, i + 8) for i in (0, 8, 16)]
    estimate = jax.jit(
        lambda p, b: tinyjax.statistics.moments(tinyjax.estimate(loss_fn, p, b, site, has_aux=True)).energy
    )
    energy = np.mean([estimate(params, part) for part in parts])
    np.testing.assert_allclose(info.psi_before["first"], energy, rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(micro_batch=7), "even number of samples, got 7"),
        (dict(micro_batch="8"), "must be an int, got '8'"),
        (dict(micro_batch=8, chunk=8), "leave one out"),
        (dict(project=1.0, null_draws=3), "which `project` leaves out"),
    ],
)
def test_misuse(normalised, options, message):
    loss_fn, params, batch, sites = normalised
    with pytest.raises(ValueError, match=message):
        tinyjax.estimate(loss_fn, params, batch, sites["first"], has_aux=True, **options)
