"""One name, one leaf; one name, one site: nothing that is looked up by name is ambiguous."""

import jax
import jax.numpy as jnp
import optax
import pytest

import tinyjax
from tests.support.zoo.layers import draw

BATCH = {"x": draw(1, x=(8, 4))["x"], "i": jnp.arange(8) % 5, "j": jnp.arange(8) % 3}
AMBIGUOUS = {
    "a key that holds a slash": {"a": {"b": jnp.ones((4, 4))}, "a/b": jnp.ones((4, 4))},
    "a list beside a key of digits": {"a": [jnp.ones((4, 4))], "a/0": jnp.ones((4, 4))},
    "three levels": {"a": {"b/c": jnp.ones((4, 4))}, "a/b": {"c": jnp.ones((4, 4))}},
}


def chain(params, batch):
    x = batch["x"]
    for kernel in jax.tree.leaves(params):
        x = jnp.tanh(x @ kernel)
    return jnp.mean(x**2)


@pytest.mark.parametrize("params", AMBIGUOUS.values(), ids=AMBIGUOUS)
@pytest.mark.parametrize(
    "door",
    [
        lambda p: tinyjax.find_sites(chain, p, BATCH),
        lambda p: tinyjax.estimate(chain, p, BATCH, SITES),
        lambda p: tinyjax.thin(p, SITES, 2),
        lambda p: tinyjax.resize(p, SITES, {"a": 6}),
        lambda p: tinyjax.compact(p, SITES),
        lambda p: tinyjax.make_grow_step(chain, SITES, num_neurons=1)(p, BATCH),
    ],
    ids=["find_sites", "estimate", "thin", "resize", "compact", "grow_step"],
)
def test_two_leaves_of_one_path_are_refused_naming_both(params, door):
    with pytest.raises(ValueError, match=r"two leaves have the path `a.*`: \['a'\].* and \['a/.*rename one"):
        door(params)


SITES = tinyjax.find_sites(chain, {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}, BATCH)


def test_a_slash_in_a_key_is_no_fault_by_itself():
    params = draw(2, **{"a/b": (4, 6), "a/c": (6, 4)})
    sites = tinyjax.find_sites(chain, params, BATCH)
    assert sites.growable.names == ("a/b",)
    assert tinyjax.resize(params, sites.growable, {"a/b": 9})[0]["a/b"].shape == (4, 9)


def tables(p, b):
    return jnp.mean(jnp.sum(p["t"]["left"][b["i"]] * p["t"]["right"][b["j"]], -1) ** 2)


def numbered(p, b):
    """A leaf has the name that the second site behind `w` would be given."""
    heads = jnp.einsum("nd,dhc->nhc", b["x"], p["w"])
    return jnp.mean((jnp.sin(heads).reshape(8, -1) @ p["u"] + jnp.tanh(b["x"] @ p["w[1]"]) @ p["v"]) ** 2)


def experts(p, b):
    h = jnp.tanh(jnp.einsum("nd,edc->nec", b["x"], p["block"]["experts"]))
    return jnp.mean((jnp.einsum("nec,eco->no", h, p["block"]["out"]) + jnp.sum(p["block"]["scale"], 0)) ** 2)


@pytest.mark.parametrize(
    ("loss", "params", "least"),
    [
        (tables, {"t": draw(2, left=(5, 6), right=(3, 6))}, 1),
        (numbered, draw(3, w=(4, 3, 5), u=(15, 2), v=(6, 2)) | draw(4, **{"w[1]": (4, 6)}), 2),
        (experts, {"block": draw(5, experts=(2, 4, 5), out=(2, 5, 3), scale=(2, 3))}, 2),
    ],
    ids=["tables", "numbered", "experts"],
)
def test_sites_have_names_of_their_own(loss, params, least):
    sites = tinyjax.find_sites(loss, params, BATCH)
    assert len(set(sites.names)) == len(sites) >= least
    assert all(sites[name] is site for name, site in zip(sites.names, sites))


BAD = AMBIGUOUS["a key that holds a slash"]


def test_a_run_with_one_path_for_two_leaves_cannot_be_saved(tmp_path):
    record = tinyjax.training.checkpoint.Checkpoint(step=0, params=BAD, opt_state=None, sites=SITES)
    with pytest.raises(ValueError, match="two leaves have the path `a/b`"):
        tinyjax.save(tmp_path / "run", record)
    assert not (tmp_path / "run").exists()


def test_the_moments_of_two_leaves_of_one_path_cannot_be_confused():
    optimizer = tinyjax.with_birth(optax.adam(1e-3))
    with pytest.raises(ValueError, match="two leaves have the path `.*a/b`"):
        optimizer.update(BAD, optimizer.init(BAD), BAD)
