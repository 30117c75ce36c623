"""Discovery: what is found, what is refused and why, and by brute force that whatever is called growable really is."""

import jax
import jax.numpy as jnp
import pytest

from tests.support import refusals
from tests.support.brute_force import inspect
from tests.support.zoo import layers
from tinyjax.discovery.sites import find_sites


@pytest.mark.parametrize("name", layers.MODELS)
def test_zoo(name):
    """Names, capacities and refusals; then a neuron is written and the gradient compared (law 1)."""
    model = layers.MODELS[name]()
    sites = find_sites(model.loss_fn, model.params, model.batch, has_aux=model.has_aux)
    assert {site.name: site.capacity for site in sites.growable} == dict(model.growable)
    for site, word in model.refused.items():
        assert not sites[site].growable and word in sites[site].reason
    for report in inspect(model).values():
        rounding = 0 if model.penalty(model.params) == 0 else 1e-14  # a penalty is subtracted from the loss again
        assert max(report.silent_out, report.silent_in) <= rounding, report
        assert report.untouched == report.dust == 0, report
        assert report.slope < 1e-6, report
        assert report.identity < 1e-12, report


@pytest.mark.parametrize("name", refusals.REFUSALS)
def test_refusals(name):
    """Every one is listed with a reason that says what is in the way, and nothing else is offered."""
    refusal = refusals.REFUSALS[name]
    sites = find_sites(refusal.loss_fn, refusal.params, refusal.batch)
    assert set(sites.growable.names) <= set(refusal.growable), sites
    for site, word in refusal.reasons.items():
        assert word in sites[site].reason
        assert len(sites[site].reason) > 10


def test_members_of_a_site():
    model = layers.MODELS["scale_and_shift"]()
    (site,) = find_sites(model.loss_fn, model.params, model.batch)
    roles = {member.leaf: member.role for member in site.members}
    assert roles == {"w": "fan_in", "g": "scale", "b": "shift", "a": "shift", "u": "fan_out"}
    assert [k.leaf for k in site.producers] == ["w"] and [k.leaf for k in site.consumers] == ["u"]


def test_members_under_a_scan():
    model = layers.MODELS["scan_over_layers"]()
    site = find_sites(model.loss_fn, model.params, model.batch)["blocks/w"]
    assert site.stack == (3,)
    assert {m.leaf: m.role for m in site.members} == {
        "blocks/w": "fan_in", "blocks/b": "shift", "blocks/u": "fan_out",
    }  # fmt: skip
    assert all(m.layout.stack == (0,) for m in site.members)


def test_biases_of_both_sides():
    for name, has_bias in (("plain", True), ("no_biases", False), ("scalar_head", True), ("kernel_in_heads", True)):
        model = layers.MODELS[name]()
        site = find_sites(model.loss_fn, model.params, model.batch)["w"]
        assert (site.producers[0].bias is not None) == has_bias
        assert (site.consumers[0].bias is not None) == has_bias


def test_traces_abstract_values():
    model = layers.MODELS["plain"]()
    abstract = jax.eval_shape(lambda x: x, (model.params, model.batch))
    assert find_sites(model.loss_fn, *abstract) == find_sites(model.loss_fn, model.params, model.batch)


def test_a_leaf_that_the_loss_does_not_use_is_listed():
    params = {**layers.two_layers(), "lost": jnp.ones((5, 4))}
    sites = find_sites(layers.mse(layers.dense2), params, layers.data(6, 5))
    assert "never reaches a matrix product" in sites["lost"].reason


def test_statistics_of_parameters_in_the_auxiliary_output_refuse_nothing():
    def loss_fn(p, batch):
        return layers.mse(layers.dense2)(p, batch), {"mean": p["w"].mean(), "l1": jnp.abs(p["u"]).sum()}

    assert find_sites(loss_fn, layers.two_layers(), layers.data(6, 5), has_aux=True)["w"].growable


def test_one_sample_and_integer_kernels():
    with pytest.raises(ValueError, match="single sample"):
        find_sites(layers.mse(layers.dense2), layers.two_layers(), layers.data(1, 5))
    with pytest.raises(ValueError, match="`w` has integer dtype"):
        find_sites(layers.mse(layers.dense2), {**layers.two_layers(), "w": jnp.ones((5, 4), int)}, layers.data(6, 5))


def test_table_and_unknown_name():
    sites = find_sites(layers.mse(layers.dense2), layers.two_layers(), layers.data(6, 5))
    assert "growable" in repr(sites) and "yes" in repr(sites)
    with pytest.raises(KeyError, match="no site `nowhere`; the sites are `w`"):
        sites["nowhere"]
