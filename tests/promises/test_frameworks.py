"""One network in five frameworks: found, thinned, grown, compacted, rebuilt from its widths, resized.

5 -> hidden -> 3 with tanh, float64. What a framework needs is one function from a width to a way to apply parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import tinyjax

CAPACITY, START, GROWN = 7, 2, 5
OPTIMIZER = optax.adam(1e-2)


def draw(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


BATCH = {"x": draw(64, 5, seed=0), "t": jnp.sin(2 * draw(64, 5, seed=0)[:, :3]) + 0.1 * draw(64, 3, seed=1)}


class Built(NamedTuple):
    """A network of some width."""

    params: Any
    apply: Callable[[Any, Any], Any]


def linen(width: int) -> Built:
    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="out")(nn.tanh(nn.Dense(self.width, name="hidden")(x)))

    net = Net(width)
    return Built(net.init(jax.random.key(0), BATCH["x"]), net.apply)


def nnx_(width: int) -> Built:
    class Net(nnx.Module):
        def __init__(self, width: int, rngs: nnx.Rngs):
            self.hidden = nnx.Linear(5, width, rngs=rngs)
            self.out = nnx.Linear(width, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    graph, params = nnx.split(Net(width, nnx.Rngs(0)))
    return Built(params, lambda params, x: nnx.merge(graph, params)(x))


def equinox(width: int) -> Built:
    class Net(eqx.Module):
        hidden: eqx.nn.Linear
        out: eqx.nn.Linear

        def __init__(self, width: int, key: jax.Array):
            keys = jax.random.split(key)
            self.hidden = eqx.nn.Linear(5, width, key=keys[0])
            self.out = eqx.nn.Linear(width, 3, key=keys[1])

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    params, static = eqx.partition(Net(width, jax.random.key(0)), eqx.is_inexact_array)
    return Built(params, lambda params, x: jax.vmap(eqx.combine(params, static))(x))


def haiku(width: int) -> Built:
    def net(x):
        return hk.Linear(3, name="out")(jnp.tanh(hk.Linear(width, name="hidden")(x)))

    transformed = hk.without_apply_rng(hk.transform(net))
    return Built(transformed.init(jax.random.key(0), BATCH["x"]), transformed.apply)


def plain(width: int) -> Built:
    def apply(params, x):
        hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
        return hidden @ params["out"]["w"] + params["out"]["b"]

    shapes = {"hidden": {"w": (5, width), "b": (width,)}, "out": {"w": (width, 3), "b": (3,)}}
    return Built(jax.tree.map(lambda s: draw(*s, seed=2), shapes, is_leaf=lambda s: isinstance(s, tuple)), apply)


BUILDERS = {"linen": linen, "nnx": nnx_, "equinox": equinox, "haiku": haiku, "plain": plain}
# These check the shapes of their parameters: another capacity needs another model, made from the widths.
CHECK_SHAPES = {"linen": flax.errors.ScopeParamShapeError, "haiku": ValueError}


class Case(NamedTuple):
    """A network before and after a growth."""

    name: str
    build: Callable[[int], Built]
    model: Built
    loss_fn: Callable[[Any, Any], Any]
    sites: tinyjax.Sites
    full: Any
    thin: Any
    grown: Any
    info: tinyjax.GrowthInfo


def rebuilt(case: Case, width: int) -> Built:
    """What runs parameters of another width: a new model where shapes are checked, else the same code."""
    return case.build(width) if case.name in CHECK_SHAPES else case.model


def make_loss(model: Built) -> Callable[[Any, Any], Any]:
    return lambda params, batch: jnp.mean((model.apply(params, batch["x"]) - batch["t"]) ** 2)


@pytest.fixture(scope="module", params=BUILDERS)
def case(request) -> Case:
    build = BUILDERS[request.param]
    model = build(CAPACITY)
    full = jax.tree.map(lambda x: (x + 0.1).astype(jnp.float64), model.params)  # no bias is zero by accident
    loss_fn = make_loss(model)
    sites = tinyjax.find_sites(loss_fn, full, BATCH)
    thin = tinyjax.thin(full, sites, START)
    grow_step = tinyjax.make_grow_step(
        loss_fn,
        sites,
        num_neurons=GROWN - START,
        method=tinyjax.methods.tiny_unprojected,  # a descent direction without the update
        update=None,
        fill=None,
        amplitude=tinyjax.growth.twin_search,
    )
    grown, info = grow_step(thin, BATCH)
    return Case(request.param, build, model, loss_fn, sites, full, thin, grown, info)


def test_the_site_is_found(case):
    (site,) = case.sites
    assert (site.name, site.capacity, site.growable) == ("hidden", CAPACITY, True)
    assert sorted(m.role for m in site.members) == ["fan_in", "fan_out", "shift"]


def test_thin_is_the_network_of_the_first_neurons(case):
    """Against the two matrix products in NumPy, from the leaves that a person would name."""
    leaves = {name.removesuffix("/value"): np.asarray(leaf) for name, leaf in named(case.full).items()}
    weights = [leaf for leaf in leaves.values() if leaf.ndim == 2]
    biases = [leaf for leaf in leaves.values() if leaf.ndim == 1]
    first, last = (next(w for w in weights if set(w.shape) == {CAPACITY, n}) for n in (5, 3))
    first, last = (first.T if first.shape[1] == 5 else first), (last.T if last.shape[0] == 3 else last)
    shift, out_shift = (next(b for b in biases if len(b) == n) for n in (CAPACITY, 3))
    hidden = np.tanh(np.asarray(BATCH["x"]) @ first[:, :START] + shift[:START])
    np.testing.assert_allclose(case.model.apply(case.thin, BATCH["x"]), hidden @ last[:START] + out_shift, atol=1e-12)
    assert int(tinyjax.width(case.thin, case.sites["hidden"])) == START


def test_a_growth_lowers_the_loss(case):
    assert case.info.status["hidden"] == tinyjax.Status.GROWN
    assert int(tinyjax.width(case.grown, case.sites["hidden"])) == GROWN
    assert case.loss_fn(case.grown, BATCH) < 0.9 * case.loss_fn(case.thin, BATCH)
    assert jax.tree.structure(case.grown) == jax.tree.structure(case.full)


def test_compact_and_rebuilt_is_the_grown_network(case):
    small, widths = tinyjax.compact(case.grown, case.sites)
    assert widths == {"hidden": GROWN}
    want = case.model.apply(case.grown, BATCH["x"])
    np.testing.assert_allclose(rebuilt(case, widths["hidden"]).apply(small, BATCH["x"]), want, atol=1e-12)
    shapes = jax.tree.map(jnp.shape, case.build(GROWN).params)
    assert jax.tree.leaves(jax.tree.map(jnp.shape, small)) == jax.tree.leaves(shapes)


def test_a_framework_that_checks_shapes_refuses_another_width(case):
    small, _ = tinyjax.compact(case.grown, case.sites)
    if case.name in CHECK_SHAPES:
        with pytest.raises(CHECK_SHAPES[case.name], match="shape"):
            case.model.apply(small, BATCH["x"])
    else:
        assert case.model.apply(small, BATCH["x"]).shape == (64, 3)


def test_training_goes_on_through_a_resize(case):
    """Room for more neurons changes neither the function nor, with the state taken along, the steps that follow."""

    def steps(model, params, state, n):
        step = jax.jit(tinyjax.train_step(make_loss(model), OPTIMIZER))
        for _ in range(n):
            params, state, _, _ = step(params, state, BATCH)
        return params, state

    params, state = steps(case.model, case.grown, OPTIMIZER.init(case.grown), 3)
    bigger, bigger_state, sites = tinyjax.resize(
        params, case.sites, tinyjax.multiple_of(8), optimizer=OPTIMIZER, opt_state=state
    )
    assert sites["hidden"].capacity == 8 and int(tinyjax.width(bigger, sites["hidden"])) == GROWN
    wider = rebuilt(case, 8)
    want = case.model.apply(params, BATCH["x"])
    np.testing.assert_allclose(wider.apply(bigger, BATCH["x"]), want, atol=1e-12)
    assert jax.tree.map(jnp.shape, bigger_state) == jax.tree.map(jnp.shape, OPTIMIZER.init(bigger))
    fresh, _ = steps(case.model, params, OPTIMIZER.init(params), 3)
    params, _ = steps(case.model, params, state, 3)
    bigger, _ = steps(wider, bigger, bigger_state, 3)
    want = case.model.apply(params, BATCH["x"])
    np.testing.assert_allclose(wider.apply(bigger, BATCH["x"]), want, atol=1e-12)
    assert np.abs(case.model.apply(fresh, BATCH["x"]) - want).max() > 1e-6  # the state matters here


def named(params: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(params)}
