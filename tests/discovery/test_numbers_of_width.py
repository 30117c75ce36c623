"""Numbers that follow a width: how they are found, and what `resize`, `compact` and `fit` do about them."""

import itertools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import tinyjax
from tests.support.numpy_jaxpr import evaluate
from tests.support.zoo.layers import draw
from tinyjax.discovery.dimensions.homogeneity import compensation
from tinyjax.discovery.dimensions.trace_differences import Folded
from tinyjax.discovery.graph.flattening import flatten
from tinyjax.discovery.graph.tracing import trace
from tinyjax.training.checkpoint.model import site_from_json, site_to_json


def squares(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda p, b: jnp.mean((apply(p, b["x"]) - b["t"]) ** 2)


def rows(*shape: int, outputs: int = 3) -> dict[str, jax.Array]:
    return draw(7, x=shape, t=(*shape[:-1], outputs))


def one_layer(scale: Callable[[int], float]) -> tuple[Any, Any, Any]:
    loss_fn = squares(lambda p, x: jnp.tanh(x @ p["w"]) @ p["u"] * scale(p["u"].shape[0]))
    return loss_fn, draw(1, w=(5, 6), u=(6, 3)), rows(16, 5)


def test_a_site_that_is_fixed_grows_inside_its_capacity():
    loss_fn, params, batch = one_layer(lambda n: 1 / (n - 1))
    sites = tinyjax.find_sites(loss_fn, params, batch)
    thin = tinyjax.thin(params, sites, 2)
    grow_step = jax.jit(tinyjax.make_grow_step(loss_fn, sites["w"], num_neurons=2, update=None))
    grown, info = grow_step(thin, batch)
    assert int(info.width["w"]) == 4 and loss_fn(grown, batch) <= loss_fn(thin, batch)
    assert "yes, inside its capacity: the number 0.2 in `mul` follows its capacity" in str(sites)
    same, _ = tinyjax.resize(thin, sites, {"w": 6})
    jax.tree.map(np.testing.assert_array_equal, same, thin)


def test_sites_are_stored_with_what_is_known():
    """A site of an older checkpoint, which had no such fields, is read as one that nobody has checked."""
    sites = tinyjax.find_sites(*one_layer(lambda n: 1 / (n - 1)))
    assert site_from_json(site_to_json(sites["w"])) == sites["w"]
    old = {k: v for k, v in site_to_json(sites["w"]).items() if k not in ("fixed", "unchecked")}
    assert "checkpoint of a version that did not look" in site_from_json(old).unchecked


def heads(num_heads: int) -> tuple[Any, Any, Any]:
    """Equinox keeps the number of heads as it was made."""
    attend = eqx.nn.MultiheadAttention(num_heads, 6, qk_size=4, vo_size=3, key=jax.random.key(0), dtype=jnp.float64)
    arrays, static = eqx.partition((attend, draw(2, out=(6, 3))), eqx.is_array)

    def apply(p, x):
        attend, more = eqx.combine(p, static)
        return jax.vmap(lambda s: attend(s, s, s))(x) @ more["out"]

    return squares(apply), arrays, rows(4, 5, 6)


@pytest.mark.parametrize("num_heads", [2, 3])
def test_a_static_number_of_heads_is_told_from_their_dimensions(num_heads):
    loss_fn, params, batch = heads(num_heads)
    sites = tinyjax.find_sites(loss_fn, params, batch)
    (whole,) = (s for s in sites.growable if s.pattern)
    assert "the model keeps a size of its own" in whole.fixed
    with pytest.raises(ValueError, match="cannot go from .* the model keeps a size of its own"):
        tinyjax.resize(params, sites, {whole.name: 2 * num_heads})
    others = {s.name: s.capacity + 3 for s in sites.growable if s is not whole}
    assert len(others) == 3 and not any(sites[name].fixed + sites[name].unchecked for name in others)
    wide = evaluate(lambda p: tinyjax.resize(p, sites, others)[0], params)
    np.testing.assert_allclose(evaluate(loss_fn, wide, batch), evaluate(loss_fn, params, batch), rtol=1e-12)


class Net(nn.Module):
    """Linen, divided by the root of the width of its input."""

    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(nn.Dense(self.width, name="in", param_dtype=jnp.float64)(x))
        return nn.Dense(3, name="out", use_bias=False, param_dtype=jnp.float64)(x) / x.shape[-1] ** 0.5


def make_loss(widths: Mapping[str, int]) -> Callable[[Any, Any], Any]:
    net = Net(widths["in"])
    return lambda p, b: jnp.mean((net.apply(p, b["x"]) - b["t"]) ** 2)


@pytest.fixture(scope="module")
def linen():
    batch = rows(16, 5)
    return make_loss({"in": 6}), jax.jit(Net(6).init)(jax.random.key(0), batch["x"]), batch


def test_a_model_that_checks_shapes_is_rebuilt_by_make_loss(linen):
    loss_fn, params, batch = linen
    (site,) = tinyjax.find_sites(loss_fn, params, batch, make_loss=make_loss)
    assert site.powers == (("params/out/kernel", 0.5),) and not site.fixed + site.unchecked
    wide, _ = tinyjax.resize(params, site, {"in": 11}, check=(loss_fn, batch, make_loss))
    np.testing.assert_allclose(evaluate(make_loss({"in": 11}), wide, batch), loss_fn(params, batch), rtol=1e-12)


def test_what_could_not_be_traced_is_checked_by_the_loss(linen):
    loss_fn, params, batch = linen
    (site,) = tinyjax.find_sites(loss_fn, params, batch)
    assert "cannot be traced at another capacity (ScopeParamShapeError" in site.unchecked and site.powers == ()
    check = (loss_fn, batch, make_loss)
    with pytest.raises(ValueError, match="resizing `in` from 6 to 11 slots changes the loss of a batch from"):
        tinyjax.resize(params, site, {"in": 11}, check=check)
    with pytest.raises(ValueError, match="resizing `in` from 6 to 3 slots changes the loss"):
        tinyjax.compact(tinyjax.thin(params, site, 3), site, check=check)
    tinyjax.resize(params, site, {"in": 6}, check=check)
    with pytest.raises(ValueError, match=r"`check` must be `\(loss_fn, batch\)`"):
        tinyjax.resize(params, site, {"in": 11}, check=loss_fn)


def test_fit_compares_the_loss_of_the_next_batch(linen):
    """A site that was found without `make_loss` is resized by `fit`."""
    loss_fn, params, batch = linen
    (site,) = tinyjax.find_sites(loss_fn, params, batch)
    run = tinyjax.fit(
        loss_fn, params, [batch] * 2, optax.sgd(1e-2), lambda *_: {"in": 2}, jax.random.key(0),
        make_loss=make_loss, sites=site, num_neurons=2, policy=tinyjax.surgery.exact,
    )  # fmt: skip
    with pytest.raises(ValueError, match="resizing `in` from 6 to 8 slots changes the loss of a batch"):
        next(run)


def test_fit_refuses_a_resize_that_would_change_the_loss():
    loss_fn, params, batch = one_layer(lambda n: 1 / (n - 1))
    run = tinyjax.fit(
        loss_fn, params, [batch], optax.sgd(1e-2), lambda *_: {"w": 2}, jax.random.key(0),
        num_neurons=2, policy=tinyjax.surgery.exact,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"`w` cannot go from 6 to 8 slots, the loss would change: the number 0\.2"):
        next(run)


def test_several_sites_multiply_a_kernel_between_them():
    params = draw(1, a=(5, 6), b=(6, 4), c=(4, 3))

    def apply(p, x):
        x = jnp.tanh(x @ p["a"]) @ p["b"] / p["b"].shape[0] ** 0.5 / p["b"].shape[1]
        return x @ p["c"]

    sites = tinyjax.find_sites(squares(apply), params, rows(16, 5))
    wide = tinyjax.resize(params, sites, {"a": 9, "b": 16})[0]
    whole = evaluate(lambda p: apply(p, jnp.eye(5)), wide)
    np.testing.assert_allclose(whole, evaluate(lambda p: apply(p, jnp.eye(5)), params), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_roots_that_are_rounded_are_powers(dtype):
    """A root of the width in the precision of the model; a logarithm is none in any."""
    loss_fn, params, batch = one_layer(lambda n: 1 / jnp.sqrt(jnp.asarray(n, dtype)))
    params, batch = jax.tree.map(lambda x: x.astype(dtype), (params, batch))
    (site,) = tinyjax.find_sites(loss_fn, params, batch)
    assert site.powers == (("u", 0.5),) and not site.fixed
    loss_fn, _, _ = one_layer(lambda n: 1 / jnp.log(jnp.asarray(n, dtype)))
    (site,) = tinyjax.find_sites(loss_fn, params, batch)
    assert "follows its capacity" in site.fixed


# How often the loss is traced


def stack(layers: int) -> tuple[Any, Any, Any]:
    params = {f"{i}": draw(i, w=(5, 6), u=(6, 5)) for i in range(layers)}

    def apply(p, x):
        for q in p.values():
            x = x + jnp.tanh(x @ q["w"]) @ q["u"] / q["u"].shape[0] ** 0.5
        return x[:, :3]

    return squares(apply), params, rows(8, 5)


def traces(loss_fn: Any, params: Any, batch: Any) -> int:
    count = itertools.count()
    tinyjax.find_sites(lambda p, b: next(count) * 0 + loss_fn(p, b), params, batch)
    return next(count)


def test_the_loss_is_traced_a_constant_number_of_times():
    """Also where a value follows by no power: patterns tell which sites move it."""
    assert traces(*stack(2)) == traces(*stack(9)) == 3
    loss_fn, params, batch = stack(9)

    def odd(p: Any, b: Any) -> Any:
        return loss_fn(p, b) / (p["4"]["w"].shape[1] - 1)

    assert traces(odd, params, batch) <= 3 + 2 * 4
    assert [s.name for s in tinyjax.find_sites(odd, params, batch).growable if s.fixed] == ["4/w"]


# The powers by themselves


@pytest.mark.parametrize("seed", range(3))
def test_powers_make_up_for_numbers(seed):
    """A chain of homogeneous steps: with every number times c^p and leaves times c^e the loss is the same."""
    rng = np.random.default_rng(seed)
    numbers = {1.7: Fraction(1, 2), 2.3: Fraction(-1), 3.1: Fraction(3, 2)}

    def loss_fn(p, b, c=1.0):
        a, d, e = (x * c ** float(p) for x, p in numbers.items())
        y = jax.nn.relu((b["x"] @ p["w"] + p["c"]) * a) @ p["u"] / d
        return jnp.mean(jnp.tanh(jnp.sqrt(jnp.sum(y**2, -1) / e)))

    params, batch = draw(seed, w=(5, 4), c=(4,), u=(4, 3)), draw(seed + 9, x=(6, 5))
    folded = Folded(flatten(trace(loss_fn, params, batch), merge=False), {}, [])
    powers = {}
    for i, op in enumerate(folded.ops):
        for j, v in enumerate(op.ins):
            value = folded.value(v) if folded.is_constant(v) else None
            if value is not None and float(value) in numbers:
                powers[i, j] = numbers[float(value)]
    assert len(powers) == 3
    found = compensation(folded, [int(i) for i in rng.permutation(3)], powers)
    assert found
    leaves = sorted(params)
    scaled = params | {leaves[i]: params[leaves[i]] * 1.9 ** float(e) for i, e in found.items()}
    moved = evaluate(lambda p, b: loss_fn(p, b, 1.9), scaled, batch)
    np.testing.assert_allclose(moved, evaluate(loss_fn, params, batch), rtol=1e-12)
    assert compensation(folded, [leaves.index("c")], powers) is None
