"""Law 6, no silent miss: whatever cannot be done is said, naming the thing, through every public door.

Inside jit a bad value is a returned status and the parameters come back as they were; everything else is a ValueError.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import tinyjax
from tests.promises.test_laws import CAPACITY, apply, loss_fn, make
from tests.support.zoo.layers import draw


@pytest.fixture(scope="module")
def case():
    return make()


@pytest.fixture(scope="module")
def grow_step(case):
    return jax.jit(
        tinyjax.make_grow_step(loss_fn, case[2], num_neurons=3, method=tinyjax.methods.random0, update=None, fill=None)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "t", "scale", "w", "c"])
def test_values_that_are_not_finite(case, grow_step, where, bad):
    params, batch, _ = case
    spoil = lambda x: x.at[(0,) * x.ndim].set(bad)  # noqa: E731
    if where in batch:
        batch = batch | {where: spoil(batch[where])}
    else:
        params = params | {where: spoil(params[where])}
    same, info = grow_step(params, batch, jax.random.key(0))
    chex.assert_trees_all_equal(same, params)
    assert info.status["w"] == tinyjax.Status.NON_FINITE and not info.born["w"].any()
    with pytest.raises(ValueError, match=r"site `w`: the (loss is|statistics are|new .* would) not (be )?finite, n"):
        tinyjax.check(info)


def test_more_neurons_than_free_slots(case, grow_step):
    params, batch, sites = case
    params = draw(1, w=(5, CAPACITY), b=(CAPACITY,), u=(CAPACITY, 3), c=(3,))
    _, info = grow_step(tinyjax.thin(params, sites, CAPACITY - 1), batch, jax.random.key(0))
    assert int(info.width["w"]) == CAPACITY
    with pytest.raises(
        ValueError, match=r"site `w` has fewer free slots than neurons asked for: width 8 of 8 slots.*`resize`"
    ):
        tinyjax.check(info)


def tracing(loss_fn, params, batch, site):
    return tinyjax.find_sites(loss_fn, params, batch)


def estimating(loss_fn, params, batch, site):
    return tinyjax.estimate(loss_fn, params, batch, site)


def diagnosing(loss_fn, params, batch, site):
    return tinyjax.diagnose(loss_fn, params, batch)


def growing(loss_fn, params, batch, site):
    return tinyjax.make_grow_step(loss_fn, site, num_neurons=2)(params, batch)


def fitting(loss_fn, params, batch, site):
    optimizer = tinyjax.with_birth(optax.adam(1e-3))
    schedule = tinyjax.every(1, 2, final=CAPACITY)
    return next(tinyjax.fit(loss_fn, params, [batch], optimizer, schedule, jax.random.key(0), num_neurons=2))


DOORS = [tracing, estimating, diagnosing, growing, fitting]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b | {"x": b["x"][:0], "t": b["t"][:0]}, r"`batch` is empty: it holds 0 samples"),
        (
            lambda b: b | {"t": b["t"][:-1]},
            r"samples as its leading axis, but `batch`\['t'\] has 95, `batch`\['x'\] has 96",
        ),
        (lambda b: {"scale": b["scale"]}, r"`batch` has no array with a leading sample axis"),
        (lambda b: b | {"key": np.zeros(2, np.uint32)}, r"`batch`\['key'\] looks like a raw uint32 PRNG key"),
    ],
    ids=["empty", "ragged", "no samples", "raw key"],
)
def test_bad_batches(case, door, change, message):
    params, batch, sites = case
    with pytest.raises(ValueError, match=message):
        door(loss_fn, params, change(batch), sites["w"])


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, b: jnp.mean((apply(p, b["x"]) - b["t"]) ** 2, axis=1), r"must return a real scalar.*float64\[\d+\]"),
        (lambda p, b: (loss_fn(p, b), apply(p, b["x"])), r"must return one scalar.*pass `has_aux=True`"),
        (lambda p, b: jnp.sum(b["x"] > 0), r"must return a real scalar.*int64\[\]"),
    ],
    ids=["vector", "pair", "integer"],
)
def test_bad_losses(case, door, loss, message):
    params, batch, sites = case
    with pytest.raises(ValueError, match=message):
        door(loss, params, batch, sites["w"])


@pytest.mark.parametrize("door", DOORS)
def test_integer_parameters(case, door):
    params, batch, sites = case
    params = params | {"w": jnp.ones((5, CAPACITY), jnp.int32)}
    with pytest.raises(ValueError, match=r"`w`.*int32"):
        door(loss_fn, params, batch, sites["w"])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda p, b, sites: tinyjax.thin(p, sites, {"hidden": 2}), ValueError),
        (lambda p, b, sites: tinyjax.resize(p, sites, {"hidden": 9}), ValueError),
        (lambda p, b, sites: tinyjax.make_grow_step(loss_fn, sites, num_neurons={"w": 1, "hidden": 1}), ValueError),
        (
            lambda p, b, sites: tinyjax.make_grow_step(loss_fn, sites, num_neurons=1)(p, b, neurons={"hidden": 1}),
            ValueError,
        ),
        (lambda p, b, sites: sites["hidden"], KeyError),
    ],
    ids=["thin", "resize", "num_neurons", "neurons", "sites"],
)
def test_unknown_sites(case, call, error):
    with pytest.raises(error, match=r"`hidden`.*`w`"):
        call(*case)


@pytest.mark.parametrize("door", [estimating, growing])
def test_a_site_of_another_model(case, door):
    _, batch, sites = case
    other = {name + "_": leaf for name, leaf in case[0].items()}
    loss = lambda p, b: loss_fn({name[0]: leaf for name, leaf in p.items()}, b)  # noqa: E731
    with pytest.raises(ValueError, match=r"no site `w`; its sites are `w_`"):
        door(loss, other, batch, sites["w"])


@pytest.mark.parametrize("door", [estimating, growing])
def test_a_site_of_another_capacity(case, door):
    params, batch, sites = case
    wider, _ = tinyjax.resize(params, sites, {"w": CAPACITY + 2})
    with pytest.raises(ValueError, match=r"`w`.*8 slots.*10 slots.*`resize`"):
        door(loss_fn, wider, batch, sites["w"])


@pytest.mark.parametrize(
    "call",
    [
        lambda p, b, site: tinyjax.thin(p, site, 2),
        lambda p, b, site: tinyjax.resize(p, site, {"w": 9}),
        lambda p, b, site: tinyjax.make_grow_step(sigmoid_loss, site, num_neurons=1),
        lambda p, b, site: tinyjax.estimate(sigmoid_loss, p, b, site),
        lambda p, b, site: tinyjax.surgery.write(
            p, site, tinyjax.methods.Neurons(np.ones((6, 1)), np.ones((1, 3)), np.ones(1)), amplitude=1.0
        ),
    ],
    ids=["thin", "resize", "grow", "estimate", "write"],
)
def test_a_site_that_cannot_grow_says_why(case, call):
    params, batch, _ = case
    site = tinyjax.find_sites(sigmoid_loss, params, batch)["w"]
    with pytest.raises(
        ValueError, match=r"site `w` cannot grow: an empty neuron is not silent: `logistic` maps 0 to 0.5"
    ):
        call(params, batch, site)


def sigmoid_loss(params, batch):
    return loss_fn(params, batch, jax.nn.sigmoid)


@pytest.mark.parametrize(
    ("activation", "unsilent_op"),
    [
        (jax.nn.sigmoid, r"`logistic` maps 0 to 0.5"),
        (jax.nn.softplus, r"maps 0 to 0.693"),
        (jnp.cos, r"`cos` maps 0 to 1"),
        (lambda x: jnp.tanh(x) + 0.1, r"maps 0 to 0.1"),
    ],
    ids=["sigmoid", "softplus", "cos", "shifted"],
)
def test_activations_that_are_not_silent_at_zero(case, activation, unsilent_op):
    params, batch, sites = case
    loss = partial(loss_fn, activation=activation)
    site = tinyjax.find_sites(loss, params, batch)["w"]
    assert not site.growable and "sigma(x) - sigma(0)" in site.reason
    with pytest.raises(ValueError, match=rf"site `w` cannot grow: an empty neuron is not silent: .*{unsilent_op}"):
        tinyjax.make_grow_step(loss, sites, num_neurons=1)(params, batch)  # the site of the tanh network


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: jnp.cos(x + 1) - jnp.cos(1.0),
        lambda x: jax.nn.sigmoid(x - 2.0) - jax.nn.sigmoid(jnp.asarray(-2.0)),
        lambda x: jax.nn.softplus(x) - jax.nn.softplus(jnp.zeros(())),
        lambda x: jnp.exp(x / jnp.sqrt(2.0)) - jnp.exp(jnp.zeros_like(x)),
    ],
    ids=["cos", "sigmoid", "softplus", "exp"],
)
def test_activations_whose_value_at_zero_is_computed_and_taken_off(case, activation):
    params, batch, _ = case
    site = tinyjax.find_sites(partial(loss_fn, activation=activation), params, batch)["w"]
    assert site.growable, site.reason


@pytest.mark.parametrize("k", [0, -1, 1.5, None])
def test_numbers_of_neurons(case, k):
    params, batch, sites = case
    with pytest.raises(ValueError, match=r"`num_neurons` of site `w` must be an int of at least 1"):
        tinyjax.make_grow_step(loss_fn, sites, num_neurons=k)
    statistics = jax.eval_shape(lambda: tinyjax.estimate(loss_fn, params, batch, sites["w"]))
    for method in (tinyjax.methods.tiny, tinyjax.methods.tiny0, tinyjax.methods.random0):
        with pytest.raises(ValueError, match="`num_neurons`"):
            jax.eval_shape(lambda s: method(s, num_neurons=k, key=jax.random.key(0)), statistics)  # noqa: B023


# Leaves behind operations that cannot be seen through: listed with a reason, under the leaf's name.


def weight_norm(params, x):
    w = params["w"] / jnp.linalg.norm(params["w"], axis=0)
    return apply(params | {"w": w}, x)


def indexed_stack(params, x):
    return apply(params | {"w": params["ws"][1], "u": params["us"][1]}, x)


def conditional(params, x):
    return jax.lax.cond(x[0, 0] > 0, apply, lambda p, x: 2 * apply(p, x), params, x)


@jax.custom_vjp
def opaque(params, x):
    return apply(params, x)


opaque.defvjp(lambda p, x: (apply(p, x), (p, x)), lambda residuals, g: jax.vjp(apply, *residuals)[1](g))


def sharded(params, x):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    inside = jax.shard_map(
        apply, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec("data")
    )
    return inside(params, x)


@pytest.mark.parametrize(
    ("model", "leaf"),
    [(weight_norm, "w"), (indexed_stack, "ws"), (conditional, "w"), (opaque, "w"), (sharded, "w")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_leaves_that_cannot_be_seen_are_listed(case, model, leaf):
    params, batch, sites = case
    params = params | {"ws": jnp.stack(2 * [params["w"]]), "us": jnp.stack(2 * [params["u"]])}
    if model is indexed_stack:
        del params["w"], params["u"]
    else:
        del params["ws"], params["us"]

    def loss(params, batch):
        return jnp.mean((model(params, batch["x"]) - batch["t"]) ** 2)

    found = tinyjax.find_sites(loss, params, batch)
    about = [site for site in found if site.name == leaf or any(m.leaf == leaf for m in site.members)]
    assert about and not found.growable, f"{leaf} is missing in\n{found}"
    assert all(site.reason for site in about)
    assert about[0].reason in str(found)
    with pytest.raises(ValueError, match=r"cannot grow: "):
        tinyjax.make_grow_step(loss, about, num_neurons=1)
    diagnosis = tinyjax.diagnose(loss, params, batch)
    assert set(s.name for s in about) <= set(diagnosis.refused.names) and not diagnosis.findings
    if model is not indexed_stack:
        with pytest.raises(ValueError, match=r"site|sites"):  # the site of the model that can be seen through
            tinyjax.estimate(loss, params, batch, sites["w"])
