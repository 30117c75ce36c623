"""What the analyses say of the values behind a product, against these values computed with numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.products import find_products
from tinyjax.discovery.dimensions.unification import root
from tinyjax.discovery.graph.def_use import DefUse
from tinyjax.discovery.graph.flattening import flatten
from tinyjax.discovery.graph.tracing import trace
from tinyjax.discovery.paths.flow import follow_product
from tinyjax.discovery.paths.kept_rows import ROW_BY_ROW

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(3, 4)), "v": RNG.normal(size=4), "u": RNG.normal(size=(4, 2))}
BATCH = RNG.normal(size=(6, 3)), RNG.uniform(1, 2, size=(6, 1))


def centred(h):
    return h - jnp.mean(h, 0)


def normalised(h):
    return centred(h) * jax.lax.rsqrt(jnp.mean(centred(h) ** 2, 0) + 1e-3)


FUNCTIONS = {
    "the product itself": lambda h, v, m: h,
    "tanh": lambda h, v, m: jnp.tanh(h),
    "a cosine": lambda h, v, m: jnp.cos(h),
    "a sigmoid less a half": lambda h, v, m: jax.nn.sigmoid(h) - 0.5,
    "a square": lambda h, v, m: h**2,
    "a cube over a square": lambda h, v, m: h**3 / (h**2 + 0.5),
    "a root of squares and more": lambda h, v, m: jnp.sqrt(h * h + 0.25),
    "a bias": lambda h, v, m: h + v,
    "a scale": lambda h, v, m: 3 * h * v,
    "a mask": lambda h, v, m: jnp.tanh(h) * m,
    "a division by a factor of the rows": lambda h, v, m: h / m,
    "two masks and a scale": lambda h, v, m: (h * m) * v * m,
    "a choice": lambda h, v, m: jnp.where(m > 1.5, jnp.maximum(h, 0), 0),
    "a centring": lambda h, v, m: centred(h),
    "a normalisation": lambda h, v, m: normalised(h) * v,
    "the next row": lambda h, v, m: jnp.roll(h, 1, axis=0),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def followed(name):
    """The flow from the product, and the value that the next one reads."""

    def loss(p, batch):
        return jnp.mean((FUNCTIONS[name](batch[0] @ p["w"], p["v"], batch[1]) @ p["u"]) ** 2)

    traced = trace(loss, PARAMS, BATCH)
    graph = flatten(traced)
    axes, def_use = Axes(graph, traced.batched, traced.num_samples), DefUse(graph)
    products, _ = find_products(graph, axes, def_use, traced.leaf_names)
    producer, consumer = (next(p for p in products if p.leaf == leaf) for leaf in "wu")
    (slots,) = {root(a) for f, a in enumerate(producer.output_atoms) if f in producer.outputs.cols and a is not None}
    return follow_product(axes, def_use, producer, slots), consumer.input_value


def computed(name, h):
    return np.asarray(FUNCTIONS[name](jnp.asarray(h), PARAMS["v"], BATCH[1]))


H = BATCH[0] @ PARAMS["w"]


@every_function
def test_an_empty_slot_holds_what_the_analysis_says(name):
    """An empty slot has no bias, and whatever scale."""
    flow, read = followed(name)
    without_bias = np.zeros(4) if name == "a bias" else PARAMS["v"]
    real = np.asarray(FUNCTIONS[name](jnp.zeros_like(H), without_bias, BATCH[1]))
    assert np.ptp(real) == 0
    assert (read in flow.empty.at) == (name != "the next row"), "a concatenation is not followed"
    np.testing.assert_allclose(flow.empty.at.get(read, 0), real.flat[0], atol=1e-15)
    assert (read in flow.empty.unsilent_op) == (real.flat[0] != 0 or read not in flow.empty.at)


@every_function
def test_a_degree_is_the_power_by_which_a_value_scales(name):
    flow, read = followed(name)
    degree = flow.degrees.of.get(read)
    if degree is not None and name != "a bias":  # which does not scale with the product, and is 0 in an empty slot
        once, twice = computed(name, 1e6 * H), computed(name, 2e6 * H)  # epsilon weighs nothing
        np.testing.assert_allclose(twice, 2.0**degree * once, rtol=1e-6)
    known = {"the product itself": 1, "a square": 2, "a scale": 1, "a centring": 1, "a normalisation": 0, "tanh": None}
    assert degree == known.get(name, degree)


@every_function
def test_rows_are_kept_where_each_depends_on_itself_alone(name):
    flow, read = followed(name)
    moved = H.copy()
    moved[2] += 1.0
    others = np.delete(computed(name, moved) != computed(name, H), 2, axis=0).any()
    summarised = bool(flow.rows.modulated)
    assert others == (flow.rows.mixing[read] != ROW_BY_ROW or summarised)
    assert summarised == (name in ("a centring", "a normalisation"))
    assert bool(flow.rows.normalised) == (name == "a normalisation") == bool(flow.degrees.epsilon)


@pytest.mark.parametrize("name", ["a mask", "a division by a factor of the rows", "two masks and a scale", "a choice"])
def test_the_factors_of_a_row_make_up_its_weight(name):
    """What lies before them and behind is the same in all rows."""
    flow, read = followed(name)
    _, mask = BATCH
    tensor = (mask > 1.5) if name == "a choice" else mask
    product = np.prod([np.asarray(f.factor(jnp.asarray(tensor)), float) for f in flow.factors.of[read]], axis=0)
    inner = {"a mask": np.tanh(H), "a choice": np.maximum(H, 0), "two masks and a scale": H * PARAMS["v"]}.get(name, H)
    np.testing.assert_allclose(inner * product, computed(name, H), rtol=1e-12)


def test_vectors_are_listed_where_they_act():
    for name, op in {
        "a bias": "add",
        "a scale": "mul",
        "a normalisation": "mul",
        "two masks and a scale": "mul",
    }.items():
        flow, _ = followed(name)
        ((entry,),) = flow.vectors.entries.values()
        assert entry.op.name == op
    assert not followed("tanh")[0].vectors.entries
