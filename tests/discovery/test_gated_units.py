"""Gated units, omega g(beta'x)(mu'x), in unmodified models: against NumPy loops, searches and the network itself."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from scipy.special import expit

import tinyjax
from tests.support.compiled import compiled
from tinyjax.methods import predicted_gain, refit_fan_out, with_ridges

ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "reglu": jax.nn.relu, "glu": jax.nn.sigmoid}
NUMPY = {
    "swiglu": lambda z: z * expit(z),
    "geglu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "reglu": lambda z: np.maximum(z, 0),
    "glu": expit,
}
SLOTS, LIVE = 6, 2
SHAPES = {
    "gate": (5, SLOTS),
    "gate_bias": (SLOTS,),
    "up": (5, SLOTS),
    "up_bias": (SLOTS,),
    "down": (SLOTS, 3),
    "c": (3,),
}


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]))


def make_batch(n=120, seed=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5))
    t = np.tanh(2 * x @ rng.normal(size=(5, 3)) / 2) + x[:, :1] * x[:, 1:2] + 0.1 * rng.normal(size=(n, 3))
    return {"x": jnp.asarray(x), "t": jnp.asarray(t)}


def network(kind):
    def apply(p, x):
        gated = ACTIVATIONS[kind](x @ p["gate"] + p["gate_bias"]) * (x @ p["up"] + p["up_bias"])
        return gated @ p["down"] + p["c"]

    def loss_fn(p, batch):
        return jnp.mean(jnp.sum((apply(p, batch["x"]) - batch["t"]) ** 2, axis=-1))

    return loss_fn


BATCH = make_batch()


@functools.cache
def build(kind):
    """A gated layer of two units in six slots, and its statistics for three new gates."""
    rng = np.random.default_rng(1)
    loss_fn = jax.jit(network(kind))
    full = {name: draw(rng, *shape) for name, shape in SHAPES.items()}
    site = tinyjax.find_sites(loss_fn, full, BATCH)["up"]
    params = tinyjax.thin(full, site, LIVE)
    estimate = jax.jit(lambda p, b: tinyjax.estimate(loss_fn, p, b, site, num_gates=3, energy_matrix=True))
    return kind, loss_fn, params, site, estimate(params, BATCH)


@pytest.fixture(scope="module", params=ACTIVATIONS)
def case(request):
    return build(request.param)


@pytest.fixture(scope="module")
def swiglu():
    return build("swiglu")


@pytest.fixture(scope="module")
def statistics(swiglu):
    return swiglu[-1]


def rows(kind, params, gates):
    """Inputs of the new units behind each gate, the hidden layer and V_goal, sample by sample."""
    p = {name: np.asarray(leaf) for name, leaf in params.items()}
    act = NUMPY[kind]
    b_prev, hidden, goal = [], [], []
    for x, t in zip(np.asarray(BATCH["x"]), np.asarray(BATCH["t"])):
        one = np.append(x, 1.0)
        h = act(x @ p["gate"] + p["gate_bias"]) * (x @ p["up"] + p["up_bias"])
        b_prev.append(np.concatenate([act(one @ beta) * one for beta in np.asarray(gates).T]))
        hidden.append(np.append(h, 1.0))
        goal.append(-2 * (h @ p["down"] + p["c"] - t))
    return np.array(b_prev), np.array(hidden), np.array(goal)


def test_the_record_is_that_of_inputs_times_gates(case):
    kind, _, params, _, statistics = case
    b_prev, hidden, goal = rows(kind, params, statistics.gates)
    mean, n = tinyjax.statistics.moments(statistics), len(goal)
    expected = {"gram_prev": b_prev.T @ b_prev, "cross_prev": b_prev.T @ goal, "gram": hidden.T @ hidden,
                "cross": hidden.T @ goal, "energy": np.sum(goal**2)}  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(mean, name), value / n, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(mean.link[0], b_prev.T @ hidden / n, rtol=1e-9, atol=1e-9)
    even = b_prev[::2].T @ goal[::2]
    np.testing.assert_allclose(statistics.cross_prev[0], even, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_neurons", [1, 3])
def test_units_lower_the_bottleneck_by_what_they_say(case, num_neurons):
    """Psi falls by lambda^2 with each, and no other unit behind the first gate does better."""
    kind, _, params, _, statistics = case
    neurons = compiled(tinyjax.methods.tiny, num_neurons=num_neurons, ridge=0.0)(statistics)
    delta = compiled(tinyjax.methods.best_update)(statistics)
    b_prev, hidden, goal = rows(kind, params, statistics.gates)
    left = goal - hidden @ np.linalg.lstsq(hidden, goal, rcond=1e-12)[0]
    units = b_prev @ np.asarray(neurons.alpha) @ np.asarray(neurons.omega)
    gain = (np.sum(left**2) - np.sum((left - units) ** 2)) / len(left)
    np.testing.assert_allclose(gain, np.sum(np.asarray(neurons.singular_values) ** 2), rtol=1e-7)
    np.testing.assert_allclose(
        gain, compiled(predicted_gain)(tinyjax.statistics.moments(statistics), neurons, delta), rtol=1e-7
    )
    first = b_prev[:, :6]
    basis = np.linalg.qr(first)[0]
    best = np.linalg.svd(basis.T @ left)[1][0] ** 2 / len(left)
    np.testing.assert_allclose(np.asarray(neurons.singular_values)[0] ** 2, best, rtol=1e-7)


def test_the_slope_of_the_loss_is_predicted(case):
    """Exact for any gate: bilinear in fan-in and fan-out, whatever the activation's slope at 0."""
    _, loss_fn, params, site, statistics = case
    neurons = compiled(tinyjax.methods.tiny, num_neurons=3, ridge=0.0)(statistics)
    delta = compiled(tinyjax.methods.best_update)(statistics)
    mean = tinyjax.statistics.moments(statistics)
    said = -np.sum(mean.cross_prev * (neurons.alpha @ neurons.omega))
    together = said - np.sum(mean.cross * delta)

    @jax.jit
    def loss(amplitude, update):
        written = tinyjax.surgery.write(params, site, neurons, amplitude=amplitude, delta=update * delta)[0]
        return loss_fn(written, BATCH)

    for update, slope in ((0.0, said), (1.0, together)):
        rate = [(loss(h, update) - loss(0.0, update)) / h for h in (1e-5, 5e-6)]
        np.testing.assert_allclose(2 * rate[1] - rate[0], slope, rtol=1e-5)
    assert together < 0


def test_a_birth_that_keeps_the_function_learns_and_the_empty_do_not(case):
    kind, loss_fn, params, site, statistics = case
    neurons = compiled(tinyjax.methods.tiny0, num_neurons=2)(statistics)
    born, written = tinyjax.surgery.write(params, site, neurons, amplitude=1.0)
    assert float(loss_fn(born, BATCH)) == float(loss_fn(params, BATCH))
    assert written.tolist() == [False, False, True, True, False, False]
    assert int(tinyjax.width(born, site)) == LIVE + 2
    gradient = jax.grad(loss_fn)(born, BATCH)
    assert np.all(np.any(np.asarray(gradient["down"])[2:4] != 0, axis=1))
    for name, axis in (("gate", 1), ("up", 1), ("gate_bias", 0), ("up_bias", 0), ("down", 0)):
        assert not np.any(np.take(np.asarray(gradient[name]), [4, 5], axis=axis)), (kind, name)


def test_empty_slots_stay_empty_and_padded_is_exact(swiglu):
    """Thirty steps of AdamW: the slots left empty hold zeros, and the compact network goes the same way."""
    _, loss_fn, params, site, statistics = swiglu
    params, _ = tinyjax.surgery.write(
        params, site, compiled(tinyjax.methods.tiny, num_neurons=1)(statistics), amplitude=0.5
    )
    compact, widths = tinyjax.compact(params, site)
    assert widths == {"up": LIVE + 1} and compact["gate"].shape == (5, 3) and compact["down"].shape == (3, 3)
    wide, (wide_site,) = tinyjax.resize(params, site, {"up": 9})
    assert wide["gate"].shape == (5, 9) and wide_site.gate.layout.factors == (5, 9)
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def trained(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss_fn)(params, BATCH), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=30)[0][0]

    losses = [float(loss_fn(trained(p), BATCH)) for p in (params, compact, wide)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-10)
    assert int(tinyjax.width(trained(wide), wide_site)) == LIVE + 1


def test_methods_of_all_kinds_read_through_one_gate_each(statistics):
    for method in (
        tinyjax.methods.random0,
        tinyjax.methods.random,
        tinyjax.methods.north,
        tinyjax.methods.fisher_tiny,
        tinyjax.methods.gradmax_dual,
    ):
        neurons = jax.jit(lambda s, k, method=method: method(s, num_neurons=2, key=k))(statistics, jax.random.key(0))
        alpha = np.asarray(neurons.alpha).reshape(3, 6, 2)
        assert neurons.gate.shape == (6, 2) and np.any(alpha[0, :, 0]) and np.any(alpha[1, :, 1])
        assert not np.any(alpha[1:, :, 0]) and not np.any(alpha[[0, 2], :, 1])


@pytest.mark.parametrize("method", [tinyjax.methods.tiny, pytest.param(tinyjax.methods.tiny0, marks=pytest.mark.slow)])
def test_a_growth_lowers_the_loss_and_leaves_old_gates_alone(swiglu, method):
    _, loss_fn, params, site, _ = swiglu
    grow_step = tinyjax.make_grow_step(loss_fn, site, num_neurons=2, method=method)
    grown, info = grow_step(params, BATCH)
    assert int(info.width["up"]) == LIVE + 2 and float(loss_fn(grown, BATCH)) < float(loss_fn(params, BATCH))
    np.testing.assert_array_equal(np.asarray(grown["gate"])[:, :LIVE], np.asarray(params["gate"])[:, :LIVE])


def test_gated_and_other_sites_grow_together():
    """Both sites in one growth; each gets its own number of neurons."""
    rng = np.random.default_rng(2)
    params = {"w": draw(rng, 5, 4), "gate": draw(rng, 4, 4), "up": draw(rng, 4, 4), "down": draw(rng, 4, 3)}

    def loss_fn(p, batch):
        x = jnp.tanh(batch["x"] @ p["w"])
        return jnp.mean(((jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"] - batch["t"]) ** 2)

    sites = tinyjax.find_sites(loss_fn, params, BATCH)
    assert sites.growable.names == ("w", "up")
    counts = {"w": 1, "up": 2}
    found = jax.jit(lambda p, b: tinyjax.estimate(loss_fn, p, b, sites, num_gates=counts))(params, BATCH)
    assert found["w"].gates is None and found["up"].gates.shape == (4, 2)
    with pytest.raises(ValueError, match="no site `v`"):
        tinyjax.estimate(loss_fn, params, BATCH, sites, num_gates={"v": 1})


def test_single_precision(swiglu):
    _, loss_fn, params, site, _ = swiglu
    single = jax.tree.map(lambda a: a.astype(jnp.float32), (params, BATCH))
    found = jax.jit(lambda p, b: tinyjax.estimate(loss_fn, p, b, site, num_gates=3))(*single)
    assert found.gates.dtype == jnp.float32
    neurons = compiled(tinyjax.methods.tiny, num_neurons=2)(found)
    slope = -np.sum(tinyjax.statistics.moments(found).cross_prev * (neurons.alpha @ neurons.omega))

    def loss(amplitude):
        written, _ = tinyjax.surgery.write(single[0], site, neurons, amplitude=amplitude)
        return float(loss_fn(jax.tree.map(lambda a: a.astype(jnp.float64), written), BATCH))

    np.testing.assert_allclose((loss(1e-3) - loss(0.0)) / 1e-3, slope, rtol=2e-2)


class LinenGated(nn.Module):
    @nn.compact
    def __call__(self, x):
        gated = nn.silu(nn.Dense(SLOTS, name="gate")(x)) * nn.Dense(SLOTS, name="up")(x)
        return nn.Dense(3, name="down")(gated)


class NNXGated(nnx.Module):
    def __init__(self, rngs):
        self.gate = nnx.Linear(5, SLOTS, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(5, SLOTS, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(SLOTS, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class EquinoxGated(eqx.Module):
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.gate = eqx.nn.Linear(5, SLOTS, key=keys[0])
        self.up = eqx.nn.Linear(5, SLOTS, key=keys[1])
        self.down = eqx.nn.Linear(SLOTS, 3, key=keys[2])

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.gate(x)) * self.up(x))


def linen():
    return jax.jit(LinenGated().init)(jax.random.key(0), BATCH["x"]), LinenGated().apply


def nnx_():
    graph, params = nnx.split(NNXGated(nnx.Rngs(0)))
    return params, lambda params, x: nnx.merge(graph, params)(x)


def equinox():
    params, static = eqx.partition(EquinoxGated(jax.random.key(0)), eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


@pytest.mark.parametrize("framework", [linen, nnx_, equinox])
def test_unmodified_models_of_the_frameworks(framework):
    params, apply = framework()
    params = jax.tree.map(lambda a: (a + 0.1).astype(jnp.float64), params)
    loss_fn = jax.jit(lambda p, b: jnp.mean((apply(p, b["x"]) - b["t"]) ** 2))
    (site,) = tinyjax.find_sites(loss_fn, params, BATCH)
    assert site.growable and site.gate is not None and "gate" in site.gate.leaf and "up" in site.producers[0].leaf
    params = tinyjax.thin(params, site, LIVE)

    @jax.jit
    def grow(params, batch):
        statistics = tinyjax.estimate(loss_fn, params, batch, site, num_gates=2)
        return tinyjax.surgery.write(
            params, site, tinyjax.methods.tiny0(statistics, num_neurons=2, ridge=1.0), amplitude=1.0
        )[0]

    grown = grow(params, BATCH)
    np.testing.assert_allclose(loss_fn(grown, BATCH), loss_fn(params, BATCH), rtol=1e-12)
    assert int(tinyjax.width(grown, site)) == LIVE + 2
    step = jax.tree.map(lambda p, g: p - 1e-2 * g, grown, jax.grad(loss_fn)(grown, BATCH))
    assert loss_fn(step, BATCH) < loss_fn(grown, BATCH)


def test_the_score_of_a_gated_site_is_the_decrease_of_a_quadratic_loss(swiglu):
    """The consumer is the read-out of a squared error: the model of the loss is exact."""
    _, loss_fn, params, site, _ = swiglu

    def model(p, batch):
        gated = jax.nn.silu(batch["x"] @ p["gate"] + p["gate_bias"]) * (batch["x"] @ p["up"] + p["up_bias"])
        return gated @ p["down"] + p["c"]

    def objective(z, batch):
        return jnp.mean(jnp.sum((z - batch["t"]) ** 2, axis=-1))

    first, second = ({k: v[s] for k, v in BATCH.items()} for s in (slice(60), slice(60, None)))

    @jax.jit
    def both(params, batch, first):
        score = tinyjax.score_sites(model, objective, params, batch, site, num_neurons=2, update=None)["up"]
        statistics = with_ridges(tinyjax.estimate(loss_fn, params, first, site, num_gates=2))
        return score, refit_fan_out(statistics, tinyjax.methods.tiny0(statistics, num_neurons=2))

    score, neurons = both(params, BATCH, first)
    at = [
        loss_fn(
            tinyjax.surgery.write(params, site, neurons._replace(omega=g * neurons.omega), amplitude=1.0)[0], second
        )
        for g in (0.0, 1.0, 2.0)
    ]
    fit = np.polyfit([0.0, 1.0, 2.0], np.array(at), 2)
    np.testing.assert_allclose(score.gain, max(-fit[1], 0) ** 2 / (4 * fit[0]), rtol=1e-6)


def test_misuse(swiglu):
    _, loss_fn, params, site, statistics = swiglu
    with pytest.raises(ValueError, match="num_gates=4"):
        tinyjax.methods.tiny(statistics, num_neurons=4)
    with pytest.raises(ValueError, match="must not bring an update"):
        tinyjax.methods.tiny_joint(statistics, num_neurons=1)
    neurons = compiled(tinyjax.methods.tiny, num_neurons=1)(statistics)
    with pytest.raises(ValueError, match="gated units"):
        tinyjax.surgery.write(params, site, neurons._replace(gate=None), amplitude=1.0)
    with pytest.raises(ValueError, match="`gate` has shape"):
        tinyjax.surgery.write(params, site, neurons._replace(gate=neurons.gate[:-1]), amplitude=1.0)
    with pytest.raises(ValueError, match="pass one, not an iterator"):
        tinyjax.estimate(loss_fn, params, iter([BATCH, BATCH]), site)
    with pytest.raises(ValueError, match="chosen on the same samples"):
        tinyjax.methods.significant(statistics)
    with pytest.raises(ValueError, match="gates anew"):
        tinyjax.statistics.merge_over(statistics, "data")
