"""NumPy oracles for the methods: raw samples, least squares, QR and loops. They never form S, N, G or P.

`record` alone builds sums, to hand the product what it expects.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tinyjax.statistics.record import Statistics


class Samples(NamedTuple):
    """One dense site, sample by sample."""

    b_prev: np.ndarray  # (n, D), constant last
    b: np.ndarray  # (n, H), constant last
    v: np.ndarray  # (n, M)
    weight_prev: np.ndarray  # (D, C)
    weight: np.ndarray  # (H, M)


def make_samples(seed=0, *, n=120, inputs=7, slots=5, live=5, outputs=4, signal=1.0):
    """A tanh layer of `live` neurons in `slots` slots, and a goal that is partly a rank 2 function of the input."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, inputs)) @ rng.normal(size=(inputs, inputs))
    b_prev = np.concatenate([x, np.ones((n, 1))], axis=1)
    weight_prev = rng.normal(size=(inputs + 1, slots)) * (np.arange(slots) < live) / 2
    hidden = np.tanh(b_prev @ weight_prev)
    b = np.concatenate([hidden, np.ones((n, 1))], axis=1)
    weight = rng.normal(size=(slots + 1, outputs)) * np.append(np.arange(slots) < live, True)[:, None]
    v = rng.normal(size=(n, outputs)) + hidden @ rng.normal(size=(slots, outputs))
    v += signal * b_prev @ rng.normal(size=(inputs + 1, 2)) @ rng.normal(size=(2, outputs)) / inputs
    return Samples(b_prev, b, v, weight_prev, weight)


def record(samples, dtype=jnp.float64, *, energy_matrix=False, link=True, third_outputs=None, curvature=1.0):
    """The sums of a dense site, taken in `dtype`, even and odd samples apart.

    With `third_outputs` (R, M) also third moments of v as it is, without an update.
    """
    np_dtype = np.dtype(dtype)
    thirds = {}
    if third_outputs is not None:
        outputs = np.asarray(third_outputs, np_dtype)
        thirds = dict(third_outputs=jnp.asarray(outputs), curvature=curvature)

    def sums(function):
        halves = []
        for start in (0, 1):
            b_prev, b, v = (np.asarray(x[start::2], np_dtype) for x in samples[:3])
            halves.append(function(b_prev, b, v))
        return jnp.asarray(np.stack(halves), dtype)

    if thirds:
        thirds["third_moments"] = sums(lambda b_prev, b, v: np.einsum("nr,ni,nj->rij", v @ outputs.T, b_prev, b_prev))
    return Statistics(
        count=sums(lambda b_prev, b, v: np_dtype.type(len(v))),
        gram_prev=sums(lambda b_prev, b, v: b_prev.T @ b_prev),
        cross_prev=sums(lambda b_prev, b, v: b_prev.T @ v),
        gram=sums(lambda b_prev, b, v: b.T @ b),
        cross=sums(lambda b_prev, b, v: b.T @ v),
        link=sums(lambda b_prev, b, v: (b_prev.T @ b)[None]) if link else None,
        energy=sums(lambda b_prev, b, v: np.sum(v * v)),
        energy_matrix=sums(lambda b_prev, b, v: v.T @ v) if energy_matrix else None,
        weight_prev=jnp.asarray(samples.weight_prev, dtype),
        weight=jnp.asarray(samples.weight, dtype),
        width=jnp.asarray(np.sum(np.any(samples.weight_prev != 0, axis=0)), jnp.int32),
        bias_prev=True,
        bias=True,
        **thirds,
    )


def least_squares(b, v):
    """The smallest dW that minimises |v - b dW|."""
    return np.linalg.lstsq(b, v, rcond=1e-12)[0]


def psi(v, *moves):
    """Mean squared distance between what is asked for and the sum of the moves."""
    return np.sum((v - sum(moves)) ** 2) / len(v)


def residual(samples):
    """What the best update of the consumer leaves: v minus its projection on the consumer's input."""
    return samples.v - samples.b @ least_squares(samples.b, samples.v)


def eckart_young(b_prev, target, rank):
    """The matrix of rank <= `rank` with columns in the span of `b_prev` that is nearest to `target`, by QR and SVD.

    Returns:
        The move (n, M) and all lambda_k, the singular values of the projected target / sqrt(n).
    """
    basis, triangle = np.linalg.qr(b_prev)
    left, values, _ = np.linalg.svd(triangle)
    basis = basis @ left[:, values > 1e-10 * values[0]]
    u, singular, vt = np.linalg.svd(basis.T @ target, full_matrices=False)
    return basis @ (u[:, :rank] * singular[:rank]) @ vt[:rank], singular / np.sqrt(len(target))


def alternating_least_squares(samples, rank, *, sweeps=3000, seed=0):
    """min over dW, alpha, omega of |v - b dW - b_prev alpha omega|^2 / n, one block at a time."""
    rng = np.random.default_rng(seed)
    b_prev, b, v = samples[:3]
    alpha = rng.normal(size=(b_prev.shape[1], rank))
    omega = np.zeros((rank, v.shape[1]))
    for _ in range(sweeps):
        both = least_squares(np.concatenate([b, b_prev @ alpha], axis=1), v)
        delta, omega = both[: b.shape[1]], both[b.shape[1] :]
        rest = (v - b @ delta) @ np.linalg.pinv(omega)
        alpha = least_squares(b_prev, rest)
        alpha /= np.linalg.norm(b_prev @ alpha, axis=0)
    both = least_squares(np.concatenate([b, b_prev @ alpha], axis=1), v)
    return psi(v, np.concatenate([b, b_prev @ alpha], axis=1) @ both)


def ridge_solution(b, v, ridge):
    """min over X of |v - b X|^2 / n + ridge sum_i E[b_i^2] |X_i|^2, by least squares on an augmented problem."""
    scale = np.sqrt(np.mean(b**2, axis=0))
    rows = np.sqrt(len(b) * ridge) * np.diag(scale)
    return np.linalg.lstsq(
        np.concatenate([b, rows]), np.concatenate([v, np.zeros((len(scale), v.shape[1]))]), rcond=1e-13
    )[0]


def held_out_score(b, v, b_test, v_test, ridge):
    """How much the ridge solution on one set of samples lowers the mean square on another."""
    return psi(v_test) - psi(v_test, b_test @ ridge_solution(b, v, ridge))


class ConvSite(NamedTuple):
    """A stride-1 one-dimensional convolution of width 3 after another, zero padded; no activation is needed here."""

    patches: np.ndarray  # (n, L, D): what the producer sees at each position, constant last
    hidden: np.ndarray  # (n, L, C): what it computes
    v: np.ndarray  # (n, L, M): the goal at each output position of the consumer


def make_conv_site(seed=0, *, n=15, length=6, channels=2, slots=2, outputs=3):
    rng = np.random.default_rng(seed)
    x = np.pad(rng.normal(size=(n, length, channels)), ((0, 0), (1, 1), (0, 0)))
    patches = np.stack([x[:, p : p + 3].reshape(n, -1) for p in range(length)], axis=1)
    patches = np.concatenate([patches, np.ones((n, length, 1))], axis=2)
    hidden = np.tanh(patches @ rng.normal(size=(patches.shape[2], slots)))
    return ConvSite(patches, hidden, rng.normal(size=(n, length, outputs)))


def conv_move(hidden, kernel):
    """Zero padded convolution: out[i, j] = sum over offsets o of hidden[i, j + o - 1] @ kernel[o]."""
    n, length, _ = hidden.shape
    out = np.zeros((n, length, kernel.shape[2]))
    for j in range(length):
        for offset in range(3):
            if 0 <= j + offset - 1 < length:
                out[:, j] += hidden[:, j + offset - 1] @ kernel[offset]
    return out


def conv_record(site):
    """The sums of a convolutional site, appendix C.2.2, by loops over samples, positions and offsets."""
    patches, hidden, v = site
    n, length, d = patches.shape
    slots, outputs = hidden.shape[2], v.shape[2]
    h = 3 * slots + 1
    shapes = {"gram_prev": (d, d), "cross_prev": (d, outputs, 3), "gram": (h, h), "cross": (h, outputs),
              "link": (3, d, h), "energy": ()}  # fmt: skip
    sums = {name: np.zeros((2, *shape)) for name, shape in shapes.items()}
    largest_rank = min(3, d)
    for i in range(n):
        total = {name: x[i % 2] for name, x in sums.items() if name != "energy"}
        for j in range(length):
            window = np.zeros((3, slots))
            for offset in range(3):
                if 0 <= j + offset - 1 < length:
                    window[offset] = hidden[i, j + offset - 1]
            b = np.append(window.ravel(), 1.0)
            total["gram"] += np.outer(b, b)
            total["cross"] += np.outer(b, v[i, j])
            sums["energy"][i % 2] += v[i, j] @ v[i, j]
            for offset in range(3):
                if 0 <= j + offset - 1 < length:
                    patch = patches[i, j + offset - 1]
                    total["gram_prev"] += largest_rank * np.outer(patch, patch)
                    total["cross_prev"][:, :, offset] += np.outer(patch, v[i, j])
                    total["link"][offset] += np.outer(patch, b)
    return Statistics(
        count=jnp.asarray([(n + 1) // 2, n // 2], jnp.float64),
        gram_prev=jnp.asarray(sums["gram_prev"]),
        cross_prev=jnp.asarray(sums["cross_prev"].reshape(2, d, -1)),
        gram=jnp.asarray(sums["gram"]),
        cross=jnp.asarray(sums["cross"]),
        link=jnp.asarray(sums["link"]),
        energy=jnp.asarray(sums["energy"]),
        energy_matrix=None,
        weight_prev=jnp.ones((d, slots)),
        weight=jnp.arange(float(h * outputs)).reshape(h, outputs),
        width=jnp.asarray(slots, jnp.int32),
        bias_prev=True,
        bias=True,
    )
