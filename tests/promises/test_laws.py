"""The laws of the design, by number, at the level of networks and of the public interface.

Each is tested in more depth elsewhere: law 1 over a zoo of models in `test_capture`, law 2 in `test_paper`, law 5 in
`test_growth` and `test_resize`, law 6 in `test_no_silent_miss`. Activities and V_goal come from NumPy, by hand.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import tinyjax
from tests.support.oracles import eckart_young, least_squares
from tests.support.zoo.layers import draw
from tinyjax.statistics.averages import moments

N, CAPACITY, START = 96, 8, 3


def apply(params, x, activation=jnp.tanh):
    return activation(x @ params["w"] + params["b"]) @ params["u"] + params["c"]


def loss_fn(params, batch, activation=jnp.tanh):
    """Mean squared error times `scale`, a number in the batch, so that one program serves every scale."""
    return batch["scale"] * jnp.mean((apply(params, batch["x"], activation) - batch["t"]) ** 2)


def make(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 5))
    t = np.sin(2 * x[:, :3]) + x[:, 2:] * x[:, 1:4]
    params = draw(1, w=(5, CAPACITY), b=(CAPACITY,), u=(CAPACITY, 3), c=(3,))
    cast = partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, dtype))
    params, batch = cast(params), cast({"x": x, "t": t, "scale": 1.0})
    sites = tinyjax.find_sites(loss_fn, params, batch)
    return tinyjax.thin(params, sites, START), batch, sites


@pytest.fixture(scope="module")
def case():
    return make()


@pytest.fixture(scope="module")
def grow_step(case):
    """Jitted: what happens inside is a returned value. One program for everything in this file."""
    return jax.jit(tinyjax.make_grow_step(loss_fn, case[2], num_neurons=4))


@pytest.fixture(scope="module")
def statistics(case):
    return estimate(loss_fn, *case)


def estimate(loss, params, batch, sites):
    """The statistics of the first site, in one program."""
    return jax.jit(lambda p, b: tinyjax.estimate(loss, p, b, sites[0]))(params, batch)


def with_constant(x):
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def raw(params, batch, activation=np.tanh):
    """By hand: b_prev, b, V_goal at the output layer."""
    p, x, t = jax.tree.map(np.asarray, (params, batch["x"], batch["t"]))
    hidden = activation(x @ p["w"] + p["b"])
    v = -2 * float(batch["scale"]) * (hidden @ p["u"] + p["c"] - t) / 3
    return with_constant(x), with_constant(hidden), v


# Law 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-12), (jnp.float32, 5e-6)])
def test_law_1_sums_are_the_gradient(dtype, tolerance):
    """-(1/n) B' V_goal is the gradient of the consumer, and of a layer under scan."""
    params, batch, sites = make(dtype)
    cross = moments(estimate(loss_fn, params, batch, sites)).cross
    gradient = jax.grad(loss_fn)(params, batch)
    want = -np.concatenate([gradient["u"], gradient["c"][None]])
    assert cross.dtype == dtype
    np.testing.assert_allclose(cross, want, atol=tolerance * np.abs(want).max())

    stack = {"w": draw(2, w=(2, 5, 4))["w"], "u": draw(3, u=(2, 4, 5))["u"]}
    stack = jax.tree.map(lambda leaf: leaf.astype(dtype), stack)

    def stacked_loss(params, batch):
        out, _ = jax.lax.scan(lambda x, p: (x + jnp.tanh(x @ p["w"]) @ p["u"], None), batch["x"], params)
        return jnp.mean((out[:, :3] - batch["t"]) ** 2)

    sums = estimate(stacked_loss, stack, batch, tinyjax.find_sites(stacked_loss, stack, batch))
    want = -jax.grad(stacked_loss)(stack, batch)["u"]
    np.testing.assert_allclose(jax.vmap(moments)(sums).cross, want, atol=tolerance * np.abs(want).max())


# Law 2


def test_law_2_the_bottleneck_of_a_network(case, statistics):
    """Definition 3.1 and equation 9 from the network's raw activities, by QR: S is never formed."""
    params, batch, _ = case
    b_prev, b, v = raw(params, batch)
    left = v - b @ least_squares(b, v)
    _, singular = eckart_young(b_prev, left, 3)
    found = jax.jit(tinyjax.methods.bottleneck)(statistics)
    np.testing.assert_allclose([found.before, found.after], [np.sum(v**2) / N, np.sum(left**2) / N], rtol=1e-10)
    np.testing.assert_allclose(found.gains[:3], singular[:3] ** 2, rtol=1e-8)


# Law 3


def exact_growth(params, batch, sites, activation):
    """The exact neurons and update, and loss(gamma) with both at the same amplitude."""
    loss = partial(loss_fn, activation=activation)
    statistics = estimate(loss, params, batch, sites)
    exact = jax.jit(lambda s: (tinyjax.methods.tiny(s, num_neurons=3, ridge=0.0), tinyjax.methods.best_update(s)))
    neurons, delta = exact(statistics)

    @jax.jit
    def loss_at(gamma, sign):
        twin = neurons._replace(alpha=sign * neurons.alpha, omega=sign * neurons.omega)
        return loss(tinyjax.surgery.write(params, sites["w"], twin, amplitude=gamma, delta=delta)[0], batch)

    return np.asarray(neurons.alpha), np.asarray(neurons.omega), np.asarray(delta), loss_at


@pytest.mark.parametrize(("activation", "slope"), [(jnp.tanh, 1.0), (partial(jax.nn.gelu, approximate=False), 0.5)])
def test_law_3_first_order(case, activation, slope):
    """(loss(gamma) - loss(0)) / gamma -> -(s <V_goal, V(theta)> + <V_goal, V(dW*)>) / n with s = sigma'(0)."""
    params, batch, sites = case
    alpha, omega, delta, loss_at = exact_growth(params, batch, sites, activation)
    b_prev, b, v = raw(params, batch, lambda x: np.asarray(activation(x)))
    neurons_move, update_move = b_prev @ alpha @ omega, b @ delta
    want = -(slope * np.sum(v * neurons_move) + np.sum(v * update_move)) / N
    zero = loss_fn(params, batch, activation)
    quotient = {gamma: float((loss_at(gamma, 1.0) - zero) / gamma) for gamma in (1e-6, 2.5e-7)}
    # The next term is of order sqrt(gamma) where the activation has curvature at 0: it cancels here.
    np.testing.assert_allclose(2 * quotient[2.5e-7] - quotient[1e-6], want, rtol=1e-4)
    # What the paper's equations 10 and 11 leave out is well above the tolerance.
    without_cross_term = -(slope * np.sum((v - update_move) * neurons_move) + np.sum(v * update_move)) / N
    assert abs(without_cross_term - want) > 1e-3 * abs(want)


def test_law_3_relu_twins(case):
    """ReLU has no slope at 0 but is homogeneous: every twin has its own exact slope."""
    params, batch, sites = case
    alpha, omega, delta, loss_at = exact_growth(params, batch, sites, jax.nn.relu)
    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    b_prev, b, v = raw(params, batch, relu)
    zero = loss_fn(params, batch, jax.nn.relu)
    slopes = []
    for sign in (1.0, -1.0):
        move = relu(sign * b_prev @ alpha) @ (sign * omega)
        want = -(np.sum(v * move) + np.sum(v * (b @ delta))) / N
        np.testing.assert_allclose((loss_at(1e-7, sign) - zero) / 1e-7, want, rtol=1e-5)
        slopes.append(want)
    assert abs(slopes[0] - slopes[1]) > 5e-3 * abs(slopes[0])
    half_linear = -(0.5 * np.sum(v * (b_prev @ alpha @ omega)) + np.sum(v * (b @ delta))) / N
    np.testing.assert_allclose(np.mean(slopes), half_linear, rtol=1e-10)


# Law 4


@pytest.mark.parametrize("c", [1e-3, 1e3])
def test_law_4_the_unit_of_the_loss_changes_no_choice(case, grow_step, c):
    """How many neurons, where, their fan-in, the direction of the update. Its amplitude is a step in loss units."""
    params, batch, _ = case
    want, info = grow_step(params, batch, jax.random.key(0))
    got, scaled = grow_step(params, batch | {"scale": jnp.asarray(c)}, jax.random.key(0))
    assert info.status["w"] == tinyjax.Status.GROWN and info.written["w"] == 3 and info.filled["w"] == 1
    for field in ("written", "filled", "born", "width", "status"):
        np.testing.assert_array_equal(getattr(scaled, field)["w"], getattr(info, field)["w"])
    for leaf in ("w", "b"):  # the birth keeps the function: fan-in is all there is to a new neuron
        np.testing.assert_allclose(got[leaf], want[leaf], atol=1e-9)
    moves = [np.concatenate([p["u"] - params["u"], (p["c"] - params["c"])[None]]) for p in (want, got)]
    lengths = [np.linalg.norm(move) for move in moves]
    assert min(lengths) > 1e-4
    np.testing.assert_allclose(moves[0] / lengths[0], moves[1] / lengths[1], atol=1e-9)
    for field in ("psi_before", "psi_after", "gain_predicted", "gain_held_out"):  # V_goal squared
        np.testing.assert_allclose(getattr(scaled, field)["w"] / c**2, getattr(info, field)["w"], rtol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-9), (jnp.float32, 2e-3)])
@pytest.mark.parametrize("method", [tinyjax.methods.tiny, tinyjax.methods.tiny0])
def test_law_4_the_unit_of_the_loss_scales_the_move_and_no_direction(method, dtype, tolerance):
    """V_goal times c: neurons and update move the network by c as much, at the same rank and the same ridge."""
    params, batch, sites = make(dtype)

    @jax.jit
    def found(batch):
        statistics = tinyjax.estimate(loss_fn, params, batch, sites["w"])
        neurons = method(statistics, num_neurons=5)
        update = tinyjax.methods.best_update(statistics, ridge=tinyjax.methods.held_out_update)
        move = neurons.alpha @ neurons.omega if method is tinyjax.methods.tiny else neurons.alpha
        return move, update, neurons.singular_values, tinyjax.methods.held_out_ridge(statistics)

    move, update, singular, ridge = found(batch)
    for c in (1e-3, 1e3):
        got = found(batch | {"scale": jnp.asarray(c, dtype)})
        scales = (c if method is tinyjax.methods.tiny else 1.0, c, c, 1.0)
        for a, b, scale in zip(got, (move, update, singular, ridge), scales):
            assert a.dtype == dtype
            np.testing.assert_allclose(a / scale, b, atol=tolerance * np.abs(b).max())
        np.testing.assert_array_equal(got[2] > 0, singular > 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-9), (jnp.float32, 2e-3)])
def test_law_4_the_unit_of_the_inputs_leaves_the_function(dtype, tolerance):
    params, batch, sites = make(dtype)

    @jax.jit
    def features(params, batch):
        neurons = tinyjax.methods.tiny(tinyjax.estimate(loss_fn, params, batch, sites["w"]), num_neurons=3)
        return batch["x"] @ neurons.alpha[:-1] + neurons.alpha[-1]

    want = features(params, batch)
    for c in (1e-3, 1e2):  # the first layer undoes the change of unit: the network stays the same
        got = features(params | {"w": params["w"] / c}, batch | {"x": batch["x"] * c})
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


def test_law_4_any_split_of_the_batch_gives_the_same_statistics(case):
    params, batch, sites = case
    batch = {"x": batch["x"], "t": batch["t"]}
    loss = lambda p, b: loss_fn(p, b | {"scale": 1.0})  # noqa: E731
    estimates = partial(jax.jit(tinyjax.estimate, static_argnums=(0, 3), static_argnames="chunk"), loss, params)
    want = estimates(batch, sites["w"])
    chex.assert_trees_all_close(estimates(batch, sites["w"], chunk=10), want, rtol=1e-10, atol=1e-12)

    def merged(*cuts):
        def over_parts(batch):
            parts = (jax.tree.map(lambda x: x[a:b], batch) for a, b in zip((0, *cuts), (*cuts, N)))  # noqa: B023
            return tinyjax.estimate(loss, params, parts, sites["w"])

        return jax.jit(over_parts)(batch)

    chex.assert_trees_all_close(merged(2, 50), want, rtol=1e-10, atol=1e-12)
    # Which half a sample falls in may change, the whole does not.
    chex.assert_trees_all_close(moments(merged(7)), moments(want), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("devices", [2, 4])
def test_law_4_any_number_of_devices_gives_the_same_statistics(case, statistics, devices):
    params, batch, sites = case
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = {
        name: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data") if x.ndim else PartitionSpec()))
        for name, x in batch.items()
    }
    got = estimate(loss_fn, params, spread, sites)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(statistics), rtol=1e-10, atol=1e-12)
