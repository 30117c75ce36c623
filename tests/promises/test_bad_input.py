# ruff: noqa: E501
"""Bad input: every public door answers with one clear message, and what was passed in stays as it was.

The table of `docs/errors.md` is written from these cases: `python -m tests.promises.test_bad_input` does it.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
CAPACITY, WIDTH = 6, 4
LONGEST = 200  # of a message on the page


class Good(NamedTuple):
    """What every case starts from."""

    params: Any
    batch: Any
    sites: Any
    site: Any
    statistics: Any
    neurons: Any
    info: Any
    optimizer: Any


class Case(NamedTuple):
    """What is passed, the call, a part of the message, and the error's type."""

    passed: str
    call: Callable[[Good], Any]
    message: str
    error: type[Exception] = ValueError


def apply(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["u"]


def loss_fn(params, batch):
    return jnp.mean((apply(params, batch["x"]) - batch["t"]) ** 2)


def sigmoid_loss(params, batch):
    return jnp.mean((jax.nn.sigmoid(batch["x"] @ params["w"] + params["b"]) @ params["u"] - batch["t"]) ** 2)


def counting_loss(params, batch):
    return loss_fn(params, batch) / (params["u"].shape[0] - 1)


def good() -> Good:
    rng = np.random.default_rng(0)
    shapes = {"w": (5, CAPACITY), "b": (CAPACITY,), "u": (CAPACITY, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    batch = {"x": jnp.asarray(rng.normal(size=(16, 5))), "t": jnp.asarray(rng.normal(size=(16, 3)))}
    sites = tinyjax.find_sites(loss_fn, params, batch)
    params = tinyjax.thin(params, sites, WIDTH)
    statistics = tinyjax.estimate(loss_fn, params, batch, sites["w"])
    neurons = tinyjax.methods.Neurons(jnp.ones((6, 2)), jnp.ones((2, 3)), jnp.ones(2))
    info = tinyjax.GrowthInfo(*({"w": jnp.zeros(())} for _ in tinyjax.GrowthInfo._fields))
    info = info._replace(born={"w": jnp.zeros(CAPACITY, bool)})
    return Good(params, batch, sites, sites["w"], statistics, neurons, info, optax.adam(1e-3))


def summed(params: Any, batch: Any) -> Any:
    return loss_fn(params, batch) * len(batch["x"])


def freezing(leaf: str) -> Any:
    """An optimizer that never moves this leaf."""
    return optax.multi_transform(
        {"train": optax.sgd(0.1), "freeze": optax.set_to_zero()},
        {name: "freeze" if name == leaf else "train" for name in "wbu"},
    )


def projected(x: Any) -> Any:
    u, s, v = jnp.linalg.svd(jnp.atleast_2d(x), full_matrices=False)
    return ((u[:, :1] * s[:1]) @ v[:1]).reshape(x.shape)


PROJECTED = optax.stateless(lambda g, p: jax.tree.map(projected, g))


def step(g: Good, **options: Any) -> Any:
    """A grow step of the good model."""
    return tinyjax.make_grow_step(loss_fn, **({"sites": g.sites, "num_neurons": 2} | options))


def find(g: Good, loss: Any = loss_fn, params: Any = None, batch: Any = None, **options: Any) -> Any:
    return tinyjax.find_sites(
        loss, g.params if params is None else params, g.batch if batch is None else batch, **options
    )


def fit(g: Good, **options: Any) -> Any:
    """The first record of a run."""
    given = dict(
        loss_fn=loss_fn, params=g.params, batches=[g.batch], optimizer=tinyjax.with_birth(g.optimizer),
        schedule=tinyjax.every(1, 1, final=CAPACITY), key=jax.random.key(0), num_neurons=1,
    )  # fmt: skip
    return next(tinyjax.fit(**(given | options)))


def status(g: Good, value: tinyjax.Status, **fields: int) -> tinyjax.GrowthInfo:
    return g.info._replace(**{name: {"w": jnp.asarray(v)} for name, v in (fields | {"status": int(value)}).items()})


def centred(s: Any) -> Any:
    return (s - s.mean(-1, keepdims=True)) / jnp.sqrt(s.var(-1, keepdims=True) + 1e-5)


def halved(s: Any) -> Any:
    """With dropout."""
    return s * jax.random.bernoulli(jax.random.key(0), 0.5, s.shape)


def plain(s: Any) -> Any:
    return s


def streamed(g: Good, norm: Callable[[Any], Any] = plain, last: Callable[[Any], Any] = plain) -> tuple[Any, Any, Any]:
    """A residual network: its loss, its parameters and the site of its stream."""
    params = g.params | {"r": jnp.ones((CAPACITY, 3)), "q": jnp.ones((3, CAPACITY))}

    def loss(p: Any, batch: Any) -> Any:
        s = batch["x"] @ p["w"] + p["b"]
        return jnp.mean((last(s + jnp.tanh(norm(s) @ p["r"]) @ p["q"]) @ p["u"] - batch["t"]) ** 2)

    return loss, params, tinyjax.find_sites(loss, params, g.batch)["w"]


def estimated(g: Good, **options: Callable[[Any], Any]) -> Any:
    """Statistics of the stream."""
    loss, params, site = streamed(g, **options)
    return tinyjax.estimate(loss, params, g.batch, site)


def attention(g: Good, turn: Callable[[Any], Any]) -> Any:
    """A step at the query-key dimension of attention whose queries and keys are turned."""
    shapes = {"q": (5, 2, 4), "k": (5, 2, 4), "v": (5, 2, 3), "o": (2, 3, 3)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}

    def loss(p, b):
        q, k, v = (jnp.einsum("ntd,dhk->nthk", b["x"], p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", turn(q), turn(k)))
        return jnp.mean(jnp.einsum("nhts,nshk,hkd->ntd", weights, v, p["o"]) ** 2)

    sites = tinyjax.find_sites(loss, params, {"x": jnp.ones((16, 3, 5))})
    return tinyjax.make_grow_step(loss, sites["q"], num_neurons=1)


def rotary(x: Any) -> Any:
    left, right = jnp.split(x, 2, -1)
    angle = jnp.arange(3.0)[:, None, None] * jnp.array([1.0, 0.1])
    return jnp.concatenate(
        [left * jnp.cos(angle) - right * jnp.sin(angle), left * jnp.sin(angle) + right * jnp.cos(angle)], -1
    )


refused = lambda g: tinyjax.find_sites(sigmoid_loss, g.params, g.batch)["w"]  # noqa: E731
traced = lambda function: lambda g: jax.jit(partial(function, g))(g.params)  # noqa: E731

CASES = {
    "`find_sites`, `estimate`, `diagnose`, `make_grow_step`": [
        Case("an empty batch", lambda g: find(g, batch={"x": g.batch["x"][:0], "t": g.batch["t"][:0]}), "`batch` is empty"),
        Case("a batch of one sample", lambda g: find(g, batch=jax.tree.map(lambda x: x[:1], g.batch)), "has a single sample"),
        Case("a batch whose leaves have different lengths", lambda g: find(g, batch=g.batch | {"t": g.batch["t"][:9]}),
             r"`batch`\['t'\] has 9"),
        Case("a batch without any array", lambda g: find(g, batch={}), "no array with a leading sample axis"),
        Case("a batch of numbers", lambda g: find(g, batch={"x": 1.0}), "no array with a leading sample axis"),
        Case("a raw PRNG key in the batch", lambda g: find(g, batch=g.batch | {"key": jax.random.PRNGKey(0)}), "raw uint32 PRNG key"),
        Case("keys that are passed whole, as many as a chunk has samples",
             lambda g: tinyjax.estimate(loss_fn, g.params, g.batch | {"keys": jax.random.split(jax.random.key(0), 4)}, g.sites, chunk=4),
             r"`batch`\['keys'\] holds 4 PRNG keys for 16 samples"),
        Case("text in the batch", lambda g: find(g, batch=g.batch | {"name": ["a"] * 16}), r"`batch`\['name'\]"),
        Case("a loss for each sample", lambda g: find(g, lambda p, b: jnp.mean((apply(p, b["x"]) - b["t"]) ** 2, 1)), "must return a real scalar"),
        Case("an integer loss", lambda g: find(g, lambda p, b: jnp.sum(b["x"] > 0)), "must return a real scalar"),
        Case("a complex loss", lambda g: find(g, lambda p, b: loss_fn(p, b) * 1j), "must return a real scalar"),
        Case("`(loss, aux)` without `has_aux=True`", lambda g: find(g, lambda p, b: (loss_fn(p, b), 0)), "pass `has_aux=True`"),
        Case("`has_aux=True` for a loss without aux", lambda g: find(g, has_aux=True), r"must return a pair `\(loss, aux\)`"),
        Case("a loss that returns None", lambda g: find(g, lambda p, b: None), "must return one scalar"),
        Case("a number for the loss function", lambda g: find(g, 3.0), "`loss_fn` must be a function"),
        Case("a kernel of integers", lambda g: find(g, params=g.params | {"w": jnp.ones((5, CAPACITY), int)}), "`w` has integer dtype"),
        Case("text among the parameters", lambda g: find(g, params=g.params | {"name": "net"}), r"`params`\['name'\] is a str"),
        Case("two leaves of one path", lambda g: find(g, params=g.params | {"a/b": jnp.ones(3), "a": {"b": jnp.ones(3)}}), r"two leaves have the path `a/b`: \['a'\]\['b'\] and \['a/b'\]"),
        Case("parameters without leaves", lambda g: find(g, lambda p, b: b["x"].mean(), params={}), "`params` has no leaves"),
        Case("the site of another model", lambda g: tinyjax.estimate(
            lambda p, b: loss_fn({n[0]: x for n, x in p.items()}, b), {n + "_": x for n, x in g.params.items()}, g.batch, g.site),
            "no site `w`; its sites are `w_`"),
        Case("the site at another capacity", lambda g: tinyjax.estimate(
            loss_fn, tinyjax.resize(g.params, g.sites, {"w": 9})[0], g.batch, g.site), "Use the sites that `resize` returned"),
        Case("a residual stream read through a layer norm", lambda g: estimated(g, norm=centred), r"a layer norm"),
        Case("a residual stream with dropout on it", lambda g: estimated(g, norm=halved), "random numbers are drawn along it"),
        Case("a residual stream with an activation on it", lambda g: estimated(g, last=jax.nn.relu), "lies on it: a stream is linear"),
        Case("a site that cannot grow", lambda g: tinyjax.estimate(sigmoid_loss, g.params, g.batch, refused(g)),
             "cannot grow: an empty neuron is not silent: `logistic` maps 0 to 0.5"),
        Case("the name of a site instead of the site", lambda g: tinyjax.estimate(loss_fn, g.params, g.batch, "w"),
             r"`sites` must hold `Site`s.*sites\[\"w\"\]"),
        Case("an unknown name", lambda g: g.sites["hidden"], "no site `hidden`; the sites are `w`", KeyError),
        Case("an odd `chunk`", lambda g: tinyjax.estimate(loss_fn, g.params, g.batch, g.site, chunk=3), "`chunk` must be an even number"),
        Case("a `chunk` of 0", lambda g: tinyjax.estimate(loss_fn, g.params, g.batch, g.site, chunk=0), "`chunk` must be an even number"),
        Case("an iterator without batches", lambda g: tinyjax.estimate(loss_fn, g.params, iter(()), g.site), "iterator of batches is empty"),
        Case("micro-batches of a loss that sums over its samples", lambda g: tinyjax.estimate(summed, g.params, g.batch, g.site, micro_batch=8), "the loss sums over the samples"),
        Case("an iterator of batches for such a loss", lambda g: tinyjax.estimate(summed, g.params, iter([g.batch]), g.site), "the loss sums over the samples"),
        Case("a loss that sums over its samples to `diagnose`", lambda g: tinyjax.diagnose(summed, g.params, g.batch), "the loss sums over the samples"),
        Case("no sites", lambda g: tinyjax.estimate(loss_fn, g.params, g.batch, ()), "`sites` is empty"),
        Case("`num_neurons=0` to `diagnose`", lambda g: tinyjax.diagnose(loss_fn, g.params, g.batch, num_neurons=0), "`num_neurons` must be an int >= 1"),
        Case("no sites to grow", lambda g: step(g, sites=()), "`sites` is empty: there is nothing to grow"),
        Case("a site that cannot grow", lambda g: step(g, sites=refused(g)), "cannot grow"),
        Case("queries and keys under a rotary embedding", lambda g: attention(g, rotary), "a rotary embedding"),
        Case("queries and keys that are normalised", lambda g: attention(
            g, lambda x: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1)), "a norm of them"),
        Case("`num_neurons` of 0", lambda g: step(g, num_neurons=0), "must be an int of at least 1, got 0"),
        Case("True for `num_neurons`", lambda g: step(g, num_neurons=True), "must be an int of at least 1, got True"),
        Case("a text for `num_neurons`", lambda g: step(g, num_neurons="2"), "must be an int of at least 1, got '2'"),
        Case("a seed for the key of a growth", lambda g: step(g)(g.params, g.batch, 0), "`key` must be a PRNG key"),
        Case("half a neuron for `neurons`", lambda g: step(g)(g.params, g.batch, neurons=0.5), "`neurons` of site `w` must be an int, got 0.5"),
        Case("the state of SGD to a growth with Adam", lambda g: step(g, optimizer=tinyjax.with_birth(g.optimizer))(
            g.params, g.batch, optax.sgd(0.1).init(g.params)), "is no state of `optimizer`"),
        Case("a state of an optimizer without `with_birth`", lambda g: step(g, optimizer=tinyjax.with_birth(g.optimizer))(
            g.params, g.batch, g.optimizer.init(g.params)), "not wrapped in `with_birth`"),
        Case("a number for the sites", lambda g: step(g, sites=1), "`sites` must be sites from `find_sites`, got 1"),
        Case("a fractional `num_neurons`", lambda g: step(g, num_neurons=1.5), "must be an int of at least 1, got 1.5"),
        Case("more neurons than the layer has slots", lambda g: step(g, num_neurons=7), "is 7, more than its 6 slots; `resize` it first"),
        Case("`num_neurons` for an unknown site", lambda g: step(g, num_neurons={"w": 1, "v": 1}), "unknown site `v`"),
        Case("`num_neurons` without an entry for a site", lambda g: step(g, num_neurons={}), "no entry for site `w`"),
        Case("a line search for a method that keeps the function", lambda g: step(g, amplitude=tinyjax.growth.line_search), "a line search would find"),
        Case("a `fill` that changes the function", lambda g: step(g, fill=tinyjax.methods.tiny), "`fill` must keep the function"),
        Case("two updates of the same weights", lambda g: step(g, method=tinyjax.methods.tiny_joint)(g.params, g.batch), "pass `update=None`"),
        Case("a method's name instead of the method", lambda g: step(g, method="tiny"), "`method` must be a function"),
        Case("fewer than 8 samples to a growth", lambda g: step(g)(g.params, jax.tree.map(lambda x: x[:7], g.batch)), "at least 8 samples"),
        Case("a random method without key", lambda g: step(g, method=tinyjax.methods.random0)(g.params, g.batch), "pass `key=`"),
        Case("more `neurons` than the step was made for", lambda g: step(g)(g.params, g.batch, neurons=3), r"was made for 0 \.\. 2"),
        Case("negative `neurons`", lambda g: step(g)(g.params, g.batch, neurons=-1), r"was made for 0 \.\. 2"),
        Case("`neurons` for an unknown site", lambda g: step(g)(g.params, g.batch, neurons={"v": 1}), "unknown site `v`"),
        Case("parameters of another capacity", lambda g: step(g)(tinyjax.resize(g.params, g.sites, {"w": 9})[0], g.batch),
             "Use the sites that `resize` returned"),
    ],
    "`check`": [
        Case("all results of a growth", lambda g: tinyjax.check((g.params, None, g.info)), "got all 3 results of a growth: pass the last"),
        Case("something else than an info", lambda g: tinyjax.check(None), "must be the `GrowthInfo`"),
        Case("a growth that met NaN or infinity", lambda g: tinyjax.check(status(g, tinyjax.Status.NON_FINITE)), "the loss is not finite"),
        Case("sums of squares beyond the dtype", lambda g: tinyjax.check(status(g, tinyjax.Status.NON_FINITE, finite_loss=1)),
             "the statistics are not finite"),
        Case("weights beyond the dtype", lambda g: tinyjax.check(status(g, tinyjax.Status.NON_FINITE, finite_loss=1, finite_statistics=1)),
             "the new parameters would not be finite"),
        Case("a growth without free slots", lambda g: tinyjax.check(status(g, tinyjax.Status.NO_FREE_SLOT)), "Make room with `resize`"),
        Case("a growth beyond the rank, without `fill`", lambda g: tinyjax.check(status(g, tinyjax.Status.BEYOND_RANK)), "Give a `fill`"),
    ],
    "`thin`, `write`, `add_update`, `resize`, `compact`, `prune`": [
        Case("a name for the site", lambda g: tinyjax.width(g.params, "w"), r"`site` must be a `Site`, got 'w'.*sites\[\"w\"\]"),
        Case("all sites for the site", lambda g: tinyjax.width(g.params, g.sites), "must be one `Site`, got 1 `Sites`"),
        Case("a name for the site to `write`", lambda g: tinyjax.surgery.write(g.params, "w", g.neurons, amplitude=1.0), "`site` must be a `Site`"),
        Case("a text for a width", lambda g: tinyjax.thin(g.params, g.sites, "2"), "`width` of site `w` must be an int, got '2'"),
        Case("half a neuron for a width", lambda g: tinyjax.thin(g.params, g.sites, 2.5), "`width` of site `w` must be an int, got 2.5"),
        Case("True for a width", lambda g: tinyjax.thin(g.params, g.sites, {"w": True}), "must be an int, got True"),
        Case("None for the sites", lambda g: tinyjax.thin(g.params, None, 2), "`sites` must be sites from `find_sites`, got None"),
        Case("half a neuron to prune", lambda g: tinyjax.prune(g.params, g.site, g.statistics, num_neurons=1.5), "`num_neurons` must be an int, got 1.5"),
        Case("a width above the capacity", lambda g: tinyjax.thin(g.params, g.sites, 7), r"outside 0 \.\. 6"),
        Case("a negative width", lambda g: tinyjax.thin(g.params, g.sites, -1), r"outside 0 \.\. 6"),
        Case("the width of an unknown site", lambda g: tinyjax.thin(g.params, g.sites, {"v": 1}), "no site `v`"),
        Case("a leaf that is missing", lambda g: tinyjax.width({"w": g.params["w"]}, g.site), "`b`"),
        Case("a leaf of integers", lambda g: tinyjax.width(jax.tree.map(lambda x: x.astype(int), g.params), g.site), "only floats can grow"),
        Case("fan-in of another layer", lambda g: tinyjax.surgery.write(g.params, g.site, g.neurons._replace(alpha=jnp.ones((4, 2))), amplitude=1.0),
             r"`alpha` has shape \(4, 2\)"),
        Case("fan-out of another layer", lambda g: tinyjax.surgery.write(g.params, g.site, g.neurons._replace(omega=jnp.ones((2, 9))), amplitude=1.0),
             r"`omega` has shape \(2, 9\)"),
        Case("no neurons", lambda g: tinyjax.surgery.write(g.params, g.site, g.neurons._replace(alpha=jnp.ones((6, 0)), omega=jnp.ones((0, 3))), amplitude=1.0),
             "no neurons to write"),
        Case("birth values for a leaf that is no vector of the site", lambda g: tinyjax.surgery.write(
            g.params, g.site, g.neurons, amplitude=1.0, birth={"u": 1.0}), "`birth` names `u`"),
        Case("a negative amplitude", lambda g: tinyjax.surgery.write(g.params, g.site, g.neurons, amplitude=-1.0), "`amplitude` must be >= 0"),
        Case("an update of another shape", lambda g: tinyjax.surgery.add_update(g.params, g.site, jnp.ones((2, 2)), amplitude=1.0), r"`delta` has shape \(2, 2\)"),
        Case("a capacity below the width", lambda g: tinyjax.resize(g.params, g.sites, {"w": 3}), "would cut used slots: its width is 4"),
        Case("a capacity of 0", lambda g: tinyjax.resize(g.params, g.sites, {"w": 0}), "would cut used slots"),
        Case("a fractional capacity", lambda g: tinyjax.resize(g.params, g.sites, {"w": 8.5}), "must be an int"),
        Case("the capacity of an unknown site", lambda g: tinyjax.resize(g.params, g.sites, {"v": 9}), "no site `v`"),
        Case("one number for the capacities", lambda g: tinyjax.resize(g.params, g.sites, 8), "`capacities` must be"),
        Case("an optimizer without its state", lambda g: tinyjax.resize(g.params, g.sites, {"w": 9}, optimizer=g.optimizer), "belong together"),
        Case("the state of another optimizer", lambda g: tinyjax.resize(
            g.params, g.sites, {"w": 9}, optimizer=g.optimizer, opt_state=optax.sgd(0.1, momentum=0.9).init(g.params)), "another structure"),
        Case("a capacity that a number in the model follows", lambda g: tinyjax.resize(
            g.params, tinyjax.find_sites(counting_loss, g.params, g.batch), {"w": 9}), "the loss would change: the number 5 in `div`"),
        Case("a `check` without a batch", lambda g: tinyjax.resize(g.params, g.sites, {"w": 9}, check=loss_fn), "`check` must be"),
        Case("`check` with another model", lambda g: tinyjax.resize(
            g.params, g.sites, {"w": 9}, check=(loss_fn, g.batch, lambda capacities: sigmoid_loss)), "changes the loss of a batch"),
        Case("`compact` under `jit`", lambda g: jax.jit(lambda p: tinyjax.compact(p, g.sites)[0])(g.params), "call it on concrete arrays, outside `jit`"),
        Case("a residual stream to prune", lambda g: tinyjax.prune(*streamed(g)[1:], g.statistics, num_neurons=1), "is a residual stream"),
        Case("more neurons to prune than there are slots", lambda g: tinyjax.prune(g.params, g.site, g.statistics, num_neurons=7), r"outside 0 \.\. 6"),
        Case("`full` without final widths", lambda g: tinyjax.resize(g.params, g.sites, tinyjax.surgery.full), "pass `final`"),
        Case("`multiple_of(0)`", lambda g: tinyjax.multiple_of(0), "`multiple` must be at least 1"),
        Case("`geometric(1)`", lambda g: tinyjax.surgery.geometric(1.0), "`ratio` must be above 1"),
    ],
    "Methods and amplitudes": [
        Case("`num_neurons=0`", lambda g: tinyjax.methods.tiny(g.statistics, num_neurons=0), "`num_neurons` must be an int >= 1"),
        Case("a seed for the key of a method", lambda g: tinyjax.methods.random(g.statistics, num_neurons=1, key=0), "`key` must be a PRNG key"),
        Case("`random` without key", lambda g: tinyjax.methods.random(g.statistics, num_neurons=1), "draws random numbers: pass `key=`"),
        Case("`fisher_tiny` without `energy_matrix`", lambda g: tinyjax.methods.fisher_tiny(g.statistics, num_neurons=1), "`energy_matrix`"),
        Case("`second_order` without third moments", lambda g: tinyjax.methods.second_order(g.statistics, num_neurons=1), "ask `estimate` for `third_moments=4`"),
        Case("third moments behind an odd activation", lambda g: tinyjax.estimate(loss_fn, g.params, g.batch, g.site, third_moments=4),
             "site `w` say nothing: the even part of its activation vanishes at 0"),
        Case("negative `third_moments`", lambda g: tinyjax.estimate(loss_fn, g.params, g.batch, g.site, third_moments=-1), "`third_moments` must be >= 0"),
        Case("a negative ridge", lambda g: tinyjax.methods.tiny(g.statistics, num_neurons=1, ridge=-1.0), "`ridge` must be"),
        Case("statistics of two capacities to `merge`", lambda g: tinyjax.statistics.merge(g.statistics, tinyjax.estimate(
            loss_fn, *(lambda r: (r[0], g.batch, r[1]["w"]))(tinyjax.resize(g.params, g.sites, {"w": 9})))), "`merge` got statistics of different shapes"),
        Case("a negative fixed amplitude", lambda g: tinyjax.growth.fixed(-1.0), "`gamma` must be >= 0"),
        Case("`significant` without null draws", lambda g: tinyjax.methods.significant(g.statistics), "ask .* for `null_draws=19`"),
        Case("`energy` of a share above 1", lambda g: tinyjax.methods.energy(g.statistics, share=1.5), r"`share` must be in \[0, 1\]"),
        Case("a negative `fraction`", lambda g: tinyjax.methods.fraction(g.statistics, share=-1.0), "`share` must be >= 0"),
        Case("negative `null_draws`", lambda g: tinyjax.estimate(loss_fn, g.params, g.batch, g.site, null_draws=-1), "`null_draws` must be >= 0"),
        Case("an empty bracket", lambda g: tinyjax.growth.line_search(lambda x: x, dtype=jnp.float64, bracket=(1.0, 1.0)), "0 < low < high"),
    ],
    "Schedules, optimizers, `fit`": [
        Case("a period of 0", lambda g: tinyjax.every(0, 1, final=4), "`period` must be at least 1"),
        Case("no neurons a growth", lambda g: tinyjax.every(1, 0, final=4), "`neurons` must be at least 1"),
        Case("a fraction above 1", lambda g: tinyjax.early(10, 1, final=4, fraction=2.0), r"`fraction` must be in \(0, 1\]"),
        Case("more growths than steps", lambda g: tinyjax.early(10, 9, final=4), r"`events` must be in 1 \.\. 2"),
        Case("a text for the period", lambda g: tinyjax.every("2", 1, final=4), "`period` must be at least 1 step, got '2'"),
        Case("half a neuron a growth", lambda g: tinyjax.schedules.round_robin(1, 0.5, final=4), "`neurons` must be an int of at least 1, got 0.5"),
        Case("True for the final width", lambda g: tinyjax.every(1, 1, final=True), "`final` must be an int of at least 1, got True"),
        Case("a plateau over no losses", lambda g: tinyjax.schedules.plateau(tinyjax.every(1, 1, final=4), [], window=0), "`window` must be at least 1 loss"),
        Case("a schedule for an unknown site", lambda g: tinyjax.every(1, {"v": 1}, final=4)(0, {"w": 1}), "no site `v`"),
        Case("`reset_grown` without `with_birth`", lambda g: tinyjax.growth.optimizer.reset_grown(
            g.optimizer, g.optimizer.init(g.params), g.params, g.sites, g.info.born), "wrap the optimizer as `with_birth"),
        Case("a site that is read by a frozen kernel", lambda g: step(g, optimizer=(o := freezing("u")))(g.params, g.batch, o.init(g.params)), "is frozen .the optimizer never moves it"),
        Case("such a kernel, left out by `trainable`", lambda g: step(g, trainable=lambda p: {"w": p["w"], "b": p["b"]})(g.params, g.batch), "is frozen .`trainable` leaves it out"),
        Case("a schedule that asks for such a site", lambda g: fit(g, optimizer=freezing("u"), schedule=lambda *_: {"w": 1}), "at site `w`, which cannot grow: its neurons are read by"),
        Case("an optimizer that centralises gradients", lambda g: tinyjax.with_birth(optax.chain(optax.centralize(), g.optimizer)).init(g.params), "free slots would not stay free"),
        Case("an optimizer that projects gradients by a decomposition", lambda g: tinyjax.with_birth(optax.chain(PROJECTED, g.optimizer)).init(g.params), "up to rounding"),
        Case("micro-batches of a loss that sums over its samples", lambda g: fit(g, loss_fn=summed, micro_batch=8), "the loss sums over the samples"),
        Case("`born` of another capacity", lambda g: tinyjax.growth.optimizer.reset_grown(
            (o := tinyjax.with_birth(g.optimizer)), o.init(g.params), g.params, g.sites, {"w": jnp.ones(3, bool)}), r"`born` of site `w` has shape \(3,\)"),
        Case("one batch for the batches", lambda g: fit(g, batches=g.batch), "`batches` must be an iterable of batches"),
        Case("a number of batches for the batches", lambda g: fit(g, batches=5), "must be an iterable of batches, .* got a int"),
        Case("an optimizer that was not made", lambda g: fit(g, optimizer=optax.adam), "`optimizer` must be an Optax optimizer"),
        Case("a dict for the schedule", lambda g: fit(g, schedule={"w": 1}), "`schedule` must be a function"),
        Case("a seed for the key", lambda g: fit(g, key=0), "`key` must be a PRNG key"),
        Case("a schedule that returns nothing", lambda g: fit(g, schedule=lambda *_: None), "{} for none; it returned None"),
        Case("a schedule that asks for half a neuron", lambda g: fit(g, schedule=lambda *_: {"w": 0.5}), "ask for a whole number"),
        Case("fewer than 8 `growth_samples`", lambda g: fit(g, growth_samples=7), "at least 8 samples, got 7"),
        Case("True for `num_neurons`", lambda g: fit(g, num_neurons=True), "must be an int of at least 1, got True"),
        Case("one number for the final widths", lambda g: fit(g, policy=tinyjax.surgery.full, final=12), "`final` must be a dict of widths"),
        Case("the state of another optimizer", lambda g: fit(g, opt_state=optax.sgd(0.1).init(g.params)), "is no state of `optimizer`"),
        Case("the name of a policy", lambda g: fit(g, policy="full"), "`policy` must be a function"),
        Case("a name for the sites", lambda g: fit(g, sites="w"), "`sites` must hold `Site`s"),
        Case("a policy without the final widths", lambda g: fit(g, policy=tinyjax.surgery.full), "pass `final`"),
        Case("no batches to `fit`", lambda g: fit(g, batches=[]), "`batches` is empty"),
        Case("`micro_batch=0`", lambda g: fit(g, micro_batch=0), "`micro_batch` must be at least 1"),
        Case("a batch that is no multiple of `micro_batch`", lambda g: fit(g, micro_batch=5, schedule=lambda *_: {}), "not a multiple of `micro_batch`"),
        Case("a schedule that asks for more than `num_neurons`", lambda g: fit(g, schedule=lambda *_: {"w": 2}), "2"),
    ],
}  # fmt: skip
ALL = [(door, case) for door, cases in CASES.items() for case in cases]


MESSAGES: dict[int, str] = {}


def message(case: Case, given: Good) -> str:
    """What the case is answered with; asked once."""
    if id(case) not in MESSAGES:
        with pytest.raises(case.error) as caught:
            case.call(given)
        MESSAGES[id(case)] = str(caught.value.args[0])
    return MESSAGES[id(case)]


@pytest.fixture(scope="module")
def given():
    return good()


@pytest.mark.parametrize(("door", "case"), ALL, ids=[case.passed for _, case in ALL])
def test_bad_input(given, door, case):
    before = jax.tree.map(np.array, (given.params, given.batch["x"]))
    assert re.search(case.message, message(case, given), re.DOTALL)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, (given.params, given.batch["x"]))))


def page(given: Good) -> str:
    lines = ["# What bad input is answered with", "", "Written by `python -m tests.promises.test_bad_input`; a test compares it.",
             "Nothing is changed by a call that raises: parameters, optimizer states and batches are as they were."]  # fmt: skip
    for door, cases in CASES.items():
        lines += ["", f"## {door}", "", "| what was passed | error | message |", "|---|---|---|"]
        for case in cases:
            text = " ".join(message(case, given).split()).replace("|", "\\|")
            text = text if len(text) <= LONGEST else text[:LONGEST].rpartition(" ")[0] + " ..."
            lines.append(f"| {case.passed} | `{case.error.__name__}` | {text} |")
    return "\n".join(lines) + "\n"


def test_the_page_is_up_to_date(given):
    assert len(ALL) >= 40
    assert PAGE.read_text() == page(given), "run `python -m tests.promises.test_bad_input`"


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(good()))
