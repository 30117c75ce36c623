"""Rows weighted one by one between two layers: masks, gates, and the norms and the dropout of `tinyjax.models`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import tinyjax
from tests.support.brute_force import inspect
from tests.support.zoo.layers import Model, data, draw, two_layers
from tinyjax.discovery.sites import find_sites
from tinyjax.models import (
    UnitDropout,
    WidthLayerNorm,
    WidthRMSNorm,
    unit_dropout,
    width_group_norm,
    width_layer_norm,
    width_rms_norm,
)

ROWS, STEPS = 6, 4
mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, (ROWS, STEPS)), float)
BATCH = data(ROWS, STEPS, 5) | {"m": mask, "k": jax.random.key(0)}


def hidden(p, x):
    return x @ p["w"] + p["b"]


def head(p, h):
    return jnp.tanh(h) @ p["u"] + p["c"]


def over_steps(step, start, xs):
    return jax.lax.scan(step, start, xs)[1].swapaxes(0, 1)


def in_order(x):
    return x.swapaxes(0, 1)


# What weights the rows, by name: `(pre-activations, parameters, batch) -> weighted`.
WEIGHTED = {
    "masks": {
        "product": lambda h, p, b: h * b["m"][..., None],
        "where": lambda h, p, b: jnp.where(b["m"][..., None] > 0, h, 0),
        "where_not": lambda h, p, b: jnp.where(b["m"][..., None] > 0, 0.0, h),
        "drawn": lambda h, p, b: h * jax.random.bernoulli(b["k"], 0.5, (ROWS, STEPS, 1)),
        "of_positions": lambda h, p, b: h * jnp.arange(4.0)[:, None],
        "of_samples": lambda h, p, b: h / (1 + b["m"].sum(1))[:, None, None],
    },
    "gates": {
        "of_inputs": lambda h, p, b: h * jax.nn.sigmoid(b["x"][..., :1]),
        "learned": lambda h, p, b: h * p["s"][:, None],
        "a_layer": lambda h, p, b: h * jnp.tanh(b["x"] @ p["g"]),
        "two": lambda h, p, b: h * jnp.tanh(b["x"] @ p["g"]) / jnp.linalg.norm(b["x"], axis=-1, keepdims=True),
    },
}
# What moves the rows: the tangent goes the same way.
WEIGHTED["moved"] = {
    "first": lambda h, p, b: h[:, :1] + jnp.zeros((STEPS, 1)),
    "flipped": lambda h, p, b: h[:, ::-1],
    "summed": lambda h, p, b: jnp.cumsum(h, 1),
    "mixed": lambda h, p, b: jnp.einsum("ts,nsh->nth", jnp.asarray(mask[:4]), h),
    "two_ways": lambda h, p, b: h * b["m"][..., None] + h,
    "mixed_and_masked": lambda h, p, b: jnp.einsum("nts,nsh->nth", b["x"][..., :4], h * b["m"][..., None]),
}


@pytest.mark.parametrize("kind", WEIGHTED)
def test_growable(kind):
    """The tangent of a new neuron is the producer's input times the weight: first order, to rounding."""
    cases = WEIGHTED[kind]
    params = {name: two_layers(i) | draw(i, s=(STEPS,), g=(5, 1)) for i, name in enumerate(cases)}

    def loss(params, b):
        outputs = [head(p, cases[name](hidden(p, b["x"]), p, b)) for name, p in params.items()]
        return sum(jnp.mean((y - b["t"]) ** 2) for y in outputs)

    check(Model(loss, params, BATCH, {f"{name}/w": 4 for name in cases}))


def check(model):
    sites = find_sites(model.loss_fn, model.params, model.batch)
    assert {site.name: site.capacity for site in sites.growable} == dict(model.growable), sites
    for report in inspect(model).values():
        assert max(report.silent_out, report.silent_in) < 1e-15, report
        assert report.untouched == report.dust == 0, report
        assert report.slope < 1e-6 and report.identity < 1e-12, report


def test_growable_in_a_scan():
    """Weights by step, from outside and from the carry; and a stack of layers with a weight for each."""

    def loss(p, b):
        steps = in_order(b["x"]), jnp.arange(1.0, 5.0)
        by_step = over_steps(lambda _, s: (_, head(p["step"], hidden(p["step"], s[0]) * s[1])), 0.0, steps)
        carried = over_steps(lambda c, x: (c + 1, head(p["carry"], hidden(p["carry"], x) * c)), 1.0, steps[0])

        def block(x, q):
            return x + jnp.tanh(hidden(q, x) * jnp.tanh(x @ q["g"])) @ q["u"], None

        stacked, _ = jax.lax.scan(block, b["x"], p["blocks"])
        return jnp.mean((by_step - b["t"]) ** 2 + (carried + stacked[..., :3]) ** 2)

    blocks = jax.tree.map(lambda *xs: jnp.stack(xs), *(two_layers(i, m=5) | draw(i, g=(5, 1)) for i in range(2)))
    params = {"step": two_layers(0), "carry": two_layers(1), "blocks": blocks | {"c": jnp.zeros((2, 5))}}
    check(Model(loss, params, BATCH, {"step/w": 4, "carry/w": 4, "blocks/w": 4}))


class Normed(nn.Module):
    """A norm before and after the activation."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(WidthLayerNorm()(nn.Dense(4, name="first")(x)))
        x = WidthRMSNorm()(jnp.tanh(nn.Dense(5, use_bias=False, name="second")(x)))
        x = jnp.tanh(WidthRMSNorm()(nn.Dense(4, name="third")(x)))
        return nn.Dense(3, name="head")(x)


def normed_params():
    params = jax.eval_shape(Normed().init, jax.random.key(0), BATCH["x"])
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)), params)
    ones = lambda path, leaf: jnp.ones_like(leaf) if "counted" in jax.tree_util.keystr(path) else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(ones, params)


def normed_loss(params, batch):
    return jnp.mean((Normed().apply(params, batch["x"]) - batch["t"]) ** 2)


def by_sample_loss(params, batch):
    apply = jax.vmap(partial(Normed().apply, params), in_axes=1, out_axes=1)  # over the steps, on top of the samples
    return jnp.mean((apply(batch["x"]) - batch["t"]) ** 2)


@pytest.mark.parametrize("loss_fn", [normed_loss, by_sample_loss])
def test_norms_over_a_part_of_an_axis_grow(loss_fn):
    check(Model(loss_fn, normed_params(), BATCH, {"first": 4, "second": 5, "third": 4}))


def test_a_newborn_is_not_counted_and_thin_takes_it_out():
    params = normed_params()
    sites = find_sites(normed_loss, params, BATCH)
    assert {m.leaf.rpartition("/")[2]: m.role for m in sites["first"].members if "Norm" in m.leaf} == {
        "scale": "scale", "bias": "shift", "counted": "counted",
    }  # fmt: skip
    thin = tinyjax.thin(params, sites, 2)
    grow_step = tinyjax.make_grow_step(normed_loss, sites["first"], num_neurons=2)
    wide = jax.tree.map(lambda x: jnp.concatenate([x, 1.1 * x]) if x.ndim else x, {k: BATCH[k] for k in "xt"})
    grown, info = grow_step(thin, wide, jax.random.key(0))
    assert int(info.width["first"]) == 4 and info.loss_after["first"] < info.loss_before["first"]
    for norm, capacity in (("WidthLayerNorm_0", 4), ("WidthRMSNorm_0", 5), ("WidthRMSNorm_1", 4)):
        np.testing.assert_array_equal(grown["params"][norm]["counted"], np.arange(capacity) < 2)


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_a_birth_with_fan_out_zero_keeps_the_function_at_any_fan_in(name):
    """Where a newborn is counted it does not, however small its fan-in: the reason why it is not."""
    norm = {"layer": lambda h, p: width_layer_norm(h, p["g"], p["a"], p["n"]),
            "rms": lambda h, p: width_rms_norm(h, p["g"], p["n"])}[name]  # fmt: skip

    def apply(p, b=BATCH):
        return head(p, norm(hidden(p, b["x"]), p))

    params = two_layers() | draw(1, g=(4,), a=(4,)) | {"n": jnp.ones(4)}
    sites = find_sites(lambda p, b: jnp.mean(apply(p, b) ** 2), params, BATCH)
    thin = tinyjax.thin(params, sites, 3)
    before = apply(thin)
    for fan_in in (1e-6, 1.0, 100.0):
        neurons = tinyjax.methods.Neurons(jnp.full((6, 1), fan_in), jnp.zeros((1, 3)), None)
        new, written = tinyjax.surgery.write(thin, sites["w"], neurons, amplitude=1.0)
        assert int(written.sum()) == 1
        np.testing.assert_array_equal(apply(new), before)
        counted = apply(new | {"n": jnp.ones(4)})
        assert jnp.abs(counted - before).max() > 1e-3


def test_the_vector_of_a_norm_stays_as_it_is_under_training():
    params, optimizer = normed_params(), optax.adamw(1e-2)
    sites = find_sites(normed_loss, params, BATCH)
    params = tinyjax.thin(params, sites, 3)
    step = jax.jit(tinyjax.train_step(normed_loss, optimizer))
    trained, state = params, optimizer.init(params)
    for _ in range(20):
        trained, state, _, _ = step(trained, state, BATCH)
    for norm in ("WidthLayerNorm_0", "WidthRMSNorm_0"):
        old, new = params["params"][norm]["counted"], trained["params"][norm]["counted"]
        np.testing.assert_array_equal(new != 0, old != 0)
    small, widths = tinyjax.compact(trained, sites)
    assert widths == {"first": 3, "second": 3, "third": 3}
    assert small["params"]["WidthLayerNorm_0"]["counted"].shape == (3,)


# Dropout


class Dropped(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(self.width, name="hidden")(x))
        return nn.Dense(3, name="head")(UnitDropout(0.4)(x, deterministic=False))


def dropped_loss(params, batch):
    width = params["params"]["hidden"]["bias"].size
    return jnp.mean((Dropped(width).apply(params, batch["x"], rngs={"dropout": batch["k"]}) - batch["t"]) ** 2)


def test_dropout_by_unit_grows():
    """Silent, no dust, and the slope right on average over the draws of the newborn: one for each slot it may take."""
    rng, width, live = np.random.default_rng(0), 150, 4
    shapes = jax.eval_shape(partial(Dropped(width).init, {"params": BATCH["k"], "dropout": BATCH["k"]}), BATCH["x"])
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), shapes)
    (site,) = find_sites(dropped_loss, params, BATCH)
    assert (site.name, site.growable) == ("hidden", True)
    params = tinyjax.thin(params, site, live)
    alpha, omega = jnp.asarray(rng.normal(size=(6, 1))), jnp.asarray(rng.normal(size=(1, 3)))
    cross = tinyjax.statistics.moments(tinyjax.estimate(dropped_loss, params, BATCH, site)).cross_prev
    assert cross.shape == (6, 3)

    def at(step, slot):
        """The loss with the neuron in a slot of its own choice."""
        p = params["params"]
        kernel = p["hidden"]["kernel"].at[:, slot].set(step * alpha[:-1, 0])
        bias = p["hidden"]["bias"].at[slot].set(step * alpha[-1, 0])
        out = p["head"]["kernel"].at[slot].set(omega[0])
        hidden, last = {"kernel": kernel, "bias": bias}, p["head"] | {"kernel": out}
        return dropped_loss({"params": {"hidden": hidden, "head": last}}, BATCH)

    slopes = jax.jit(lambda: jax.lax.map(lambda s: jax.grad(at)(0.0, s), jnp.arange(live, width)))()
    expected = -jnp.sum((alpha.T @ cross) * omega)
    error = slopes.std() / len(slopes) ** 0.5
    assert error < 0.2 * abs(expected) and abs(slopes.mean() - expected) < 4 * error
    with pytest.raises(ValueError, match="`tinyjax_unit_dropout` draws random numbers for the whole batch"):
        tinyjax.estimate(dropped_loss, params, BATCH, site, chunk=2)
    gradient = jax.grad(dropped_loss)(params, BATCH)["params"]
    assert not np.any(gradient["hidden"]["kernel"][:, live:]) and not np.any(gradient["head"]["kernel"][live:])


# What stays refused

REFUSED = {
    "clipped": (lambda h, p, b: jnp.maximum(h, b["m"][..., None]), "weighted one by one"),
    "divided_into": (lambda h, p, b: b["m"][..., None] / h, ""),
    "pooled": (lambda h, p, b: (h * b["m"][..., None]).mean(1, keepdims=True), "between convolutions or poolings"),
    "transposed": (lambda h, p, b: h[:, :, None] * b["m"].T[None, :, :, None], "cannot be told apart"),
    "inside_a_rule": (lambda h, p, b: jax.nn.silu(h) * jnp.max(h, -1, keepdims=True), "reduce_max"),
    "batch_norm": (
        lambda h, p, b: (lambda g: (g - g.mean((0, 1))) / jnp.sqrt(g.var((0, 1)) + 1e-5) * p["g"] + p["a"])(
            h * b["m"][..., None]
        ),
        "weighted one by one",
    ),
    "counts_all": (lambda h, p, b: width_rms_norm(h, p["g"], jnp.ones(4)), "is no parameter"),
    "counts_by_scale": (lambda h, p, b: width_rms_norm(h, p["g"], p["g"]), "more than once"),
    "counts_a_function": (lambda h, p, b: width_rms_norm(h, p["g"], 1 + p["n"]), "is no parameter"),
    "group_norm": (lambda h, p, b: width_group_norm(h, p["g"], p["a"], group_size=2), "`WidthGroupNorm` normalises it"),
    "dropout_before_a_pool": (
        lambda h, p, b: unit_dropout(b["k"], h, 0.5) * h[:, ::-1],
        "mixed by `tinyjax_unit_dropout`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    between, word = REFUSED[name]
    params = two_layers() | draw(1, g=(4,), a=(4,)) | {"n": jnp.ones(4)}
    loss_fn = lambda p, b: jnp.mean(head(p, between(hidden(p, b["x"]), p, b)) ** 2)  # noqa: E731
    site = find_sites(loss_fn, params, BATCH)["w"]
    assert not site.growable and word in site.reason and len(site.reason) > 10, site.reason
