"""`diagnose` against least squares on the raw activities of networks written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tests.support.zoo.attention import linen
from tests.support.zoo.layers import draw

N = 200


def forward(params, x):
    x = jnp.tanh(x @ params["w1"] + params["b1"])
    x = jnp.tanh(x @ params["w2"])
    return jax.nn.sigmoid(x @ params["w3"]) @ params["w4"] + params["b4"]


def loss_fn(params, batch):
    return jnp.mean((forward(params, batch["x"]) - batch["t"]) ** 2)


@pytest.fixture(scope="module")
def case():
    """Two sites that can grow and, behind a sigmoid, one that cannot."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 6))
    batch = {"x": jnp.asarray(x), "t": jnp.asarray(np.sin(2 * x[:, :3]) + x[:, 3:] * x[:, 1:4])}
    params = draw(1, w1=(6, 5), b1=(5,), w2=(5, 4), w3=(4, 7), w4=(7, 3), b4=(3,))
    params = tinyjax.thin(params, tinyjax.find_sites(loss_fn, params, batch)["w1"], 3)
    return params, batch, tinyjax.diagnose(loss_fn, params, batch, num_neurons=4)


def activities(params, batch):
    """By hand: for each site the consumer's input (constant last where it has a bias) and V_goal at its output."""
    p, x, t = jax.tree.map(np.asarray, (params, batch["x"], batch["t"]))
    h1 = np.tanh(x @ p["w1"] + p["b1"])
    h2 = np.tanh(h1 @ p["w2"])
    h3 = 1 / (1 + np.exp(-h2 @ p["w3"]))
    y = h3 @ p["w4"] + p["b4"]
    v4 = -2 * (y - t) / 3  # -n times the gradient of a mean over n samples and 3 outputs
    v3 = v4 @ p["w4"].T * h3 * (1 - h3)
    v2 = v3 @ p["w3"].T * (1 - h2**2)
    return {"w1": (h1, v2), "w2": (h2, v3)}


def test_numbers_are_those_of_least_squares(case):
    params, batch, diagnosis = case
    assert list(diagnosis.findings) == ["w1", "w2"]
    for name, (b, v) in activities(params, batch).items():
        finding = diagnosis.findings[name]
        left = v - b @ np.linalg.lstsq(b, v, rcond=1e-12)[0]
        np.testing.assert_allclose(finding.asked, np.sum(v**2) / N, rtol=1e-10)
        np.testing.assert_allclose(finding.psi, np.sum(left**2) / N, rtol=1e-8)
        np.testing.assert_allclose(finding.share, np.sum(left**2) / np.sum(v**2), rtol=1e-8)
    assert diagnosis.findings["w1"].width == 3 and diagnosis.findings["w2"].width == 4
    np.testing.assert_allclose(diagnosis.loss, loss_fn(params, batch), rtol=1e-12)


def test_the_held_out_gain_is_what_neurons_of_one_half_take_away_on_the_other(case):
    """Raw samples; only the ridges are the product's own."""
    params, batch, diagnosis = case
    statistics = tinyjax.estimate(loss_fn, params, batch, diagnosis.findings["w1"].site)
    ridge, update_ridge = (
        2 * tinyjax.methods.held_out_ridge(statistics),
        2 * tinyjax.methods.held_out_update(statistics),
    )
    b, v = activities(params, batch)["w1"]
    b_prev = np.concatenate([np.asarray(batch["x"]), np.ones((N, 1))], axis=1)
    total = 0.0
    for fit, score in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        delta = ridge_regression(b[fit], v[fit], update_ridge)
        gram = b_prev[fit].T @ b_prev[fit] * 2 / N
        root = np.linalg.cholesky(gram + ridge * np.diag(np.diag(gram)))
        cross = b_prev[fit].T @ (v[fit] - b[fit] @ delta) * 2 / N
        u, s, wt = np.linalg.svd(np.linalg.solve(root, cross), full_matrices=False)
        move = b_prev[score] @ np.linalg.solve(root.T, u[:, :4] * s[:4]) @ wt[:4]
        left = v[score] - b[score] @ delta
        total += (np.sum(left**2) - np.sum((left - move) ** 2)) / N  # 2/N a half, and the mean of two halves
    finding = diagnosis.findings["w1"]
    np.testing.assert_allclose(finding.gain * finding.asked, total, rtol=1e-6)
    assert finding.gain > 0


def ridge_regression(b, v, ridge):
    gram = b.T @ b
    used = np.diag(gram) > 0
    out = np.zeros((b.shape[1], v.shape[1]))
    gram = (gram + ridge * np.diag(np.diag(gram)))[np.ix_(used, used)]
    out[used] = np.linalg.solve(gram, (b.T @ v)[used])
    return out


def test_it_prints_a_table_with_refusals(case):
    _, _, diagnosis = case
    lines = str(diagnosis).splitlines()
    assert lines[0] == f"loss {diagnosis.loss:.4g}"
    assert lines[1].split() == ["site", "width", "asked", "bottleneck", "share", "held-out", "gain"]
    finding = diagnosis.findings["w1"]
    row = f"w1 3 of 5 {finding.asked:.3g} {finding.psi:.3g} {finding.share:.1%} {finding.gain:+.1%}"
    assert lines[2].split() == row.split()
    assert diagnosis.refused.names == ("w3",)
    assert lines[4] == f"w3: cannot grow, {diagnosis.refused['w3'].reason}"
    assert "`logistic` maps 0 to 0.5" in lines[4]


def test_a_network_without_any_room_is_listed_with_its_reasons(case):
    params, batch, _ = case
    head = {name: params[name] for name in ("w3", "w4", "b4")}

    def head_loss(params, batch):
        hidden = jax.nn.sigmoid(batch["x"][:, :4] @ params["w3"])
        return jnp.mean((hidden @ params["w4"] + params["b4"] - batch["t"]) ** 2), hidden

    diagnosis = tinyjax.diagnose(head_loss, head, batch, has_aux=True)
    assert diagnosis.findings == {} and diagnosis.refused.names == ("w3",)
    np.testing.assert_allclose(diagnosis.loss, head_loss(head, batch)[0], rtol=1e-12)
    assert "w3: cannot grow" in str(diagnosis)


def test_the_layers_of_a_stack_are_summed():
    """Three residual layers under scan, written out in NumPy."""
    params = {"w": draw(2, w=(3, 4, 5))["w"], "u": draw(3, u=(3, 5, 4))["u"]}
    rng = np.random.default_rng(1)
    batch = {"x": jnp.asarray(rng.normal(size=(N, 4))), "t": jnp.asarray(rng.normal(size=(N, 4)))}

    def stacked_loss(params, batch):
        out, _ = jax.lax.scan(lambda x, p: (x + jnp.tanh(x @ p["w"]) @ p["u"], None), batch["x"], params)
        return jnp.mean((out - batch["t"]) ** 2)

    diagnosis = tinyjax.diagnose(stacked_loss, params, batch)
    w, u = np.asarray(params["w"]), np.asarray(params["u"])
    xs = [np.asarray(batch["x"])]
    for layer in range(3):
        xs.append(xs[-1] + np.tanh(xs[-1] @ w[layer]) @ u[layer])
    v = -2 * (xs[-1] - np.asarray(batch["t"])) / 4
    asked = psi = 0.0
    for layer in (2, 1, 0):
        h = np.tanh(xs[layer] @ w[layer])
        left = v - h @ np.linalg.lstsq(h, v, rcond=1e-12)[0]
        asked, psi = asked + np.sum(v**2) / N, psi + np.sum(left**2) / N
        v = v + (v @ u[layer].T * (1 - h**2)) @ w[layer].T
    finding = diagnosis.findings["w"]
    np.testing.assert_allclose([finding.asked, finding.psi], [asked, psi], rtol=1e-8)
    np.testing.assert_allclose(finding.share, psi / asked, rtol=1e-8)
    assert finding.width == 5 and np.isfinite(finding.gain)
    assert str(diagnosis).splitlines()[2].split()[:4] == ["w", "5", "of", "5"]


def test_no_more_heads_are_asked_for_than_there_are_slots():
    case = linen(heads=2)
    found = tinyjax.diagnose(case.loss_fn, case.params, case.batch, num_neurons=3)
    (name,) = [name for name in found.findings if name.endswith("heads")]
    assert found.findings[name].width == 2 and 0 < found.findings[name].share <= 1
