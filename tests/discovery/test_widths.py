"""Law 7: no number follows a width in silence. Losses are evaluated by NumPy (`numpy_jaxpr`), in float64."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tests.support.numpy_jaxpr import evaluate
from tests.support.zoo.layers import draw

REFUSED = r"cannot go from .* slots, the loss would change: .*It can grow inside its capacity"


class Case(NamedTuple):
    """A model, and for every site the powers of its leaves, or a word of what cannot be made up for."""

    loss_fn: Callable[[Any, Any], Any]
    params: Any
    batch: Any
    sites: Mapping[str, dict[str, float] | str]


CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    CASES[build.__name__] = build
    return build


def squares(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda p, b: jnp.mean((apply(p, b["x"]) - b["t"]) ** 2)


def rows(*shape: int, outputs: int = 3) -> dict[str, jax.Array]:
    return draw(7, x=shape, t=(*shape[:-1], outputs))


def dense(sites: Any, apply: Callable[[Any, Any], Any], penalty: Any = None, **more: tuple[int, ...]) -> Case:
    """Two kernels of six units behind five inputs."""
    params = draw(1, w=(5, 6), u=(6, 3), c=(3,), **more)
    loss = squares(apply)
    whole = loss if penalty is None else lambda p, b: loss(p, b) + penalty(p)
    return Case(whole, params, rows(16, 5), sites)


def hidden(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"])


# muP, NTK and other readouts


@case
def mup_readout() -> Case:
    return dense({"w": {"u": 1.0}}, lambda p, x: hidden(p, x) @ p["u"] / p["u"].shape[0] + p["c"])


@case
def ntk() -> Case:
    """Every layer is divided by the root of its fan-in."""
    params = draw(1, a=(5, 6), b=(6, 4), c=(4, 3))

    def apply(p, x):
        for name in "abc":
            x = x @ p[name] / jnp.sqrt(x.shape[-1])
            x = x if name == "c" else jnp.tanh(x)
        return x

    return Case(squares(apply), params, rows(16, 5), {"a": {"b": 0.5}, "b": {"c": 0.5}})


@case
def readout_with_its_bias_inside() -> Case:
    sites = {"w": {"u": 0.5, "c": 0.5}}
    return dense(sites, lambda p, x: (hidden(p, x) @ p["u"] + p["c"]) / p["w"].shape[1] ** 0.5)


@case
def units_scaled_before_the_readout() -> Case:
    return dense({"w": {"u": 1.5}}, lambda p, x: hidden(p, x) * p["u"].shape[0] ** -1.5 @ p["u"])


@case
def pre_activations_scaled() -> Case:
    return dense({"w": {"w": 0.5}}, lambda p, x: jnp.tanh(x @ p["w"] / p["w"].shape[1] ** 0.5) @ p["u"])


@case
def ratio_of_two_widths() -> Case:
    params = draw(1, a=(5, 6), b=(6, 4), c=(4, 3))

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"] * (p["b"].shape[0] / p["b"].shape[1]) ** 0.5

    return Case(squares(apply), params, rows(16, 5), {"a": "power 1/2", "b": {"c": 0.5}})


@case
def number_kept_with_the_model() -> Case:
    return dense({"w": {}}, lambda p, x: hidden(p, x) @ p["u"] * 6**-0.5)


@case
def number_kept_in_the_parameters() -> Case:
    case = dense({"w": {}}, lambda p, x: hidden(p, x) @ p["u"] * p["s"])
    return case._replace(params=case.params | {"s": jnp.asarray(6**-0.5)})


@case
def samples_as_many_as_units() -> Case:
    case = dense({"w": {}}, lambda p, x: hidden(p, x) @ p["u"] / x.shape[0] ** 0.5)
    return case._replace(batch=rows(6, 5))


# What no leaf can make up for


@case
def variance_with_one_degree_less() -> Case:
    return dense({"w": "the number 5"}, lambda p, x: hidden(p, x) @ p["u"] / (p["u"].shape[0] - 1))


@case
def temperature() -> Case:
    return dense(
        {"w": "number"}, lambda p, x: jax.nn.softmax(p["c"] * p["w"].shape[1] ** 0.5) * (hidden(p, x) @ p["u"])
    )


@case
def table_whose_frequencies_follow() -> Case:
    def apply(p, x):
        turned = jnp.sin(jnp.arange(3) / 10 ** (2 / p["w"].shape[1]))
        return hidden(p, x) @ p["u"] + turned

    return dense({"w": "`add`"}, apply)


@case
def mean_over_a_linspace() -> Case:
    return dense({"w": "number"}, lambda p, x: hidden(p, x) @ p["u"] + jnp.sum(jnp.arange(p["u"].shape[0]) / 7.0))


@case
def turns_of_a_loop() -> Case:
    def apply(p, x):
        return hidden(p, x) @ p["u"] + jax.lax.fori_loop(0, p["u"].shape[0], lambda _, c: 0.9 * c, p["c"])

    return dense({"w": "turns of a loop"}, apply)


@case
def draws_whose_shape_follows() -> Case:
    def apply(p, x):
        noise = jax.random.normal(jax.random.key(0), (p["u"].shape[0],))
        return hidden(p, x) @ p["u"] + jnp.max(noise)

    return dense({"w": "another shape draws others"}, apply)


@case
def penalty_by_number_of_parameters() -> Case:
    return dense(
        {"w": "follows its capacity"},
        lambda p, x: hidden(p, x) @ p["u"],
        lambda p: sum(jnp.sum(v**2) for v in p.values()) / sum(v.size for v in p.values()),
    )


@case
def branch_of_the_program() -> Case:
    def apply(p, x):
        y = hidden(p, x) @ p["u"]
        return y if p["u"].shape[0] < 7 else jnp.exp(y)

    return dense({"w": "another program"}, apply)


@case
def branch_further_up() -> Case:
    """The next capacity is the same program."""

    def apply(p, x):
        h = hidden(p, x)
        return (h if p["w"].shape[1] <= 8 else 2 * h) @ p["u"]

    return dense({"w": "another program"}, apply)


# Sizes that are no values


@case
def masks_and_states() -> Case:
    """Zeros and ones of the width, a mask of tokens, labels smoothed over outputs, one-hot rows, a sum of squares."""
    params = draw(1, w=(5, 6), u=(6, 3))

    def apply(p, b):
        h = jnp.zeros((*b["x"].shape[:2], p["w"].shape[1])) + jnp.tanh(b["x"] @ p["w"]) * jnp.ones(p["w"].shape[1])
        return (jnp.where((jnp.arange(h.shape[1]) < 3)[:, None], h, 0) @ p["u"]).mean(1)

    def loss(p, b):
        target = jax.nn.one_hot(b["i"] % 3, 3) * 0.9 + 0.1 / 3
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(apply(p, b)) * target, -1)) + 1e-3 * jnp.sum(p["w"] ** 2)

    batch = draw(3, x=(16, 4, 5)) | {"i": jnp.arange(16) % 7}
    return Case(loss, params, batch, {"w": {}})


# Adapters


def adapter(scale: Callable[[int], float], sites: Any) -> Case:
    params = draw(1, base=(5, 4), a=(5, 6), b=(6, 4), out=(4, 3))

    def apply(p, x):
        y = x @ jax.lax.stop_gradient(p["base"]) + x @ p["a"] @ p["b"] * scale(p["a"].shape[1])
        return jnp.tanh(y) @ p["out"]

    return Case(squares(apply), params, rows(16, 5), sites)


CASES["lora"] = lambda: adapter(lambda rank: 16 / rank, {"a": {"b": 1.0}})
CASES["rslora"] = lambda: adapter(lambda rank: 16 / rank**0.5, {"a": {"b": 0.5}})
CASES["lora_with_a_number"] = lambda: adapter(lambda rank: 16 / 6, {"a": {}})


# Transformers in the manner of public ones


def rms(x: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3)


def attention(p: Any, x: Any, scale: Callable[[int], float]) -> Any:
    q, k, v = (jnp.einsum("ntd,dhk->nhtk", x, p[name]) for name in "qkv")
    scores = jnp.where(jnp.tril(jnp.ones((x.shape[1],) * 2, bool)), q @ k.swapaxes(-1, -2) * scale(q.shape[-1]), -1e9)
    return jnp.einsum("nhtk,hkd->ntd", jax.nn.softmax(scores) @ v, p["o"])


def transformer(d: int = 6, seed: int = 1) -> dict[str, Any]:
    shapes = dict(q=(d, 2, 4), k=(d, 2, 4), v=(d, 2, 5), o=(2, 5, d), up=(d, 7), down=(7, d), g=(d,), g2=(d,))
    return draw(seed, e=(5, d), head=(d, 3), last=(d,), **shapes)


def forward(p: Any, x: Any, scale: Callable[[int], float], enter: Any, leave: Any) -> Any:
    s = enter(x @ p["e"])
    s = s + attention(p, rms(s) * p["g"], scale)
    s = s + jax.nn.gelu(rms(s) * p["g2"] @ p["up"]) @ p["down"]
    return leave(rms(s) * p["last"]) @ p["head"]


NORMED = {"e": 0.5, "o": 0.5, "down": 0.5, "g": -0.5, "g2": -0.5, "last": -0.5}


@case
def gemma() -> Case:
    """Embeddings times the root of the width, RMS norms, scores over the root of the head's dimension."""

    def apply(p, x):
        return forward(p, x, lambda k: k**-0.5, lambda s: s * s.shape[-1] ** 0.5, lambda s: s)

    sites = {"e": NORMED | {"e": 0.0}, "q": {"q": 0.5}, "v": {}, "heads": {}, "up": {}}
    return Case(squares(apply), transformer(), rows(4, 5, 5), sites)


@case
def t5() -> Case:
    """Scores without a scale, outputs of the stream over the root of its width."""

    def apply(p, x):
        return forward(p, x, lambda k: 1.0, lambda s: s, lambda s: s * s.shape[-1] ** -0.5)

    sites = {"e": NORMED | {"last": 0.0}, "q": {}, "v": {}, "heads": {}, "up": {}}
    return Case(squares(apply), transformer(), rows(4, 5, 5), sites)


@case
def mup_attention() -> Case:
    """Scores over the dimension of a head, not its root; a head dimension equal to other sizes."""

    def apply(p, x):
        return forward(p, x, lambda k: 8 / k, lambda s: s, lambda s: s)

    sites = {"e": NORMED, "q": {"q": 1.0}, "v": {}, "heads": {}, "up": {}}
    return Case(squares(apply), transformer(), rows(4, 5, 5), sites)


@case
def scores_scaled_by_a_stored_number() -> Case:
    def apply(p, x):
        return forward(p, x, lambda k: 0.5, lambda s: s, lambda s: s)

    return Case(squares(apply), transformer(), rows(4, 5, 5), {"e": NORMED, "q": {}, "v": {}, "heads": {}, "up": {}})


@case
def norm_with_a_number_of_its_own() -> Case:
    """The mean square is over the number 6 that the model was made with."""

    def unit(s):
        return s * jax.lax.rsqrt(jnp.sum(s**2, -1, keepdims=True) / 6 + 1e-3)

    params = draw(1, e=(5, 6), up=(6, 7), down=(7, 6), head=(6, 3))

    def apply(p, x):
        s = x @ p["e"]
        s = s + jnp.tanh(unit(s) @ p["up"]) @ p["down"]
        return unit(s) @ p["head"]

    return Case(squares(apply), params, rows(8, 5), {"e": {}, "up": {}})


def found(made: Case) -> tinyjax.Sites:
    return tinyjax.find_sites(made.loss_fn, made.params, made.batch)


@pytest.mark.parametrize("name", CASES)
def test_law_7(name):
    """`resize` to odd capacities, one site and all at once, and `compact` keep the loss, or name the number."""
    made = CASES[name]()
    sites = found(made)
    assert {s.name for s in sites.growable} == set(made.sites), sites
    for site, want in made.sites.items():
        assert sites[site].unchecked == ""
        if isinstance(want, str):
            assert want in sites[site].fixed
        else:
            powers = {k: sum(p for leaf, p in sites[site].powers if leaf == k) for k in dict(sites[site].powers)}
            assert sites[site].fixed == "" and powers == {leaf: power for leaf, power in want.items() if power}
    half = {s.name: s.capacity // 2 for s in sites.growable}
    thin = evaluate(lambda p: tinyjax.thin(p, sites.growable, half), made.params)
    before = evaluate(made.loss_fn, thin, made.batch)
    wider = {s.name: s.capacity + 3 + 2 * i for i, s in enumerate(sites.growable)}
    free = [name for name in wider if not sites[name].fixed]
    for chosen in [*([name] for name in wider), free]:
        fixed = [name for name in chosen if sites[name].fixed]
        capacities = {name: wider[name] for name in chosen}
        if fixed:
            with pytest.raises(ValueError, match=REFUSED):
                tinyjax.resize(thin, sites, capacities)
            with pytest.raises(ValueError, match=f"site `{fixed[0]}` cannot go from"):
                tinyjax.compact(thin, sites[fixed[0]])
            continue
        wide = evaluate(lambda p, c=capacities: tinyjax.resize(p, sites, c)[0], thin)
        np.testing.assert_allclose(evaluate(made.loss_fn, wide, made.batch), before, rtol=1e-12)
    small = tinyjax.compact(thin, [sites[name] for name in free])[0]
    np.testing.assert_allclose(evaluate(made.loss_fn, small, made.batch), before, rtol=1e-12)
