"""Section 4: greedy growth does not get stuck. Exponential decrease, n neurons for n points, random directions.

    python -m experiments.paper.convergence --preset cpu      # float64, 3 to 6 minutes on 2 shared CPU cores

- `greedy` (prop. 4.1, D.4, D.5): ReLU neurons one by one, without touching earlier ones, each the best of the n neurons
  of the construction at its best amplitude. The paper: the loss falls at least by gamma = 1 - (dm / dM)^2 / (n^3 d') a
  neuron. Also the best of `candidates` random ReLU neurons.
- `points` (D.6): one neuron a sample, fan-outs solved again each time. The paper: every addition fits one more sample
  and lowers the loss; n additions reach 0.
- `completed` (prop. 4.2, D.7): TINY, completed by random neurons where its singular value is zero, best update of all
  fan-outs at each addition, a random polynomial of degree n^2 as activation. The paper: 0 after at most n additions,
  almost surely. Two solvers of the same step: `best_update`, which sees the data through second moments, and least
  squares on the activities.
- `random` (D.3, section 5.2): a random direction with a line search gains about 1 / d of |V_goal|^2. Directions without
  any structure, and random neurons in a network on digits.
- `stuck`: target x1 x2 on a symmetric set has no correlation with x. TINY finds nothing; completed TINY goes on, by
  random or by second-order neurons, and stalls again if it is completed only where the singular value is zero.

Measured (cpu): all confirmed but the constant of proposition 4.1. It holds for random targets, far from tight; but its
proof takes |A^-1| dm to be at most 1 for a triangular A (equation 188), which is false: for two points A / dm =
[[1, 0], [2, 1]], whose inverse has a squared norm of 5.83. `bound` counts data sets with a residual for which the best
neuron of the construction gives less than the factor. Completion by the singular value alone stalls, see `stuck`.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tinyjax
from experiments.harness import Experiment, Finding, Row, column, distinct, run, select, spread
from tinyjax import data, methods
from tinyjax.models import MLP

ZERO = 1e-12  # of the initial loss: what counts as no error in float64


class Config(NamedTuple):
    """What is run.

    Attributes:
        points: data set sizes n of `greedy` and `points`.
        polynomial_points: data set sizes n of `completed`.
        additions: neurons added by `greedy`.
        candidates: random neurons tried at each addition.
        dimensions: d of `random`.
        draws: random directions.
        seeds: of data, activation and directions.
        stuck_additions: neurons added by `stuck`.
    """

    points: tuple[int, ...]
    polynomial_points: tuple[int, ...]
    additions: int
    candidates: int
    dimensions: tuple[int, ...]
    draws: int
    seeds: tuple[int, ...]
    stuck_additions: int = 16


PRESETS = {
    "smoke": Config((3,), (2,), 6, 16, (8, 16), 50, (0,), stuck_additions=8),
    "cpu": Config((2, 4, 8), (2, 3, 4, 5, 6), 40, 256, (8, 16, 32, 64, 128, 256), 1000, (0, 1, 2, 3, 4)),
}


def measure(config: Config) -> Iterator[Row]:
    for n, seed in itertools.product(config.points, config.seeds):
        yield greedy(config, n, seed)
        yield one_by_one(n, seed)
    for n in config.points:
        yield bound_of(n, config.draws // 10)
    with jax.enable_x64(True):
        for n in config.polynomial_points:
            for seed in config.seeds:
                yield from completed_tiny(n, seed)
        yield from stuck(config)
    for dimension in config.dimensions:
        for seed in config.seeds:
            yield from random_directions(config, dimension, seed)


# --- Propositions 4.1 and D.6: NumPy, float64 ---


class Construction(NamedTuple):
    """The neurons of Zhang et al. (2017), appendix D.5: `activities[j, k]` = ReLU(a x_j - b_k), lower triangular.

    Attributes:
        activities: (n, n), samples in the order of a x.
        order: of the samples.
        gap: dm, the smallest gap between projections.
        reach: dM, the diameter of the data plus dm.
    """

    activities: np.ndarray
    order: np.ndarray
    gap: float
    reach: float


def construction(x: np.ndarray, angles: int = 3600) -> Construction:
    """Samples (n, 2); the direction `a` with the largest smallest gap, among equally spaced angles."""
    theta = np.arange(angles) * np.pi / angles
    projections = x @ np.stack([np.cos(theta), np.sin(theta)])  # (n, angles)
    gaps = np.diff(np.sort(projections, axis=0), axis=0).min(axis=0)
    best = np.argmax(gaps)
    order = np.argsort(projections[:, best])
    projected = projections[order, best]
    gap = gaps[best] * (1 - 1e-9)  # dm = d'_m - epsilon
    diameter = max(np.linalg.norm(p - q) for p in x for q in x)
    activities = np.maximum(projected[:, None] - (projected - gap)[None], 0)
    return Construction(activities, order, gap, diameter + gap)


def problem(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (n, 2)), rng.normal(size=n)


def greedy(config: Config, n: int, seed: int) -> Row:
    """Loss after each addition, relative to the start, and the factor that proposition 4.1 promises."""
    x, target = problem(n, seed)
    built = construction(x)
    rng = np.random.default_rng(seed + 1000)
    weights, biases = rng.normal(size=(2, config.additions, config.candidates)), rng.uniform(-1, 1, config.candidates)

    def constructed(t: int) -> np.ndarray:
        return built.activities

    def drawn(t: int) -> np.ndarray:
        return np.maximum(x[built.order] @ weights[:, t] + biases, 0)

    losses = {
        name: pursue(target[built.order], features, config.additions)
        for name, features in (("construction", constructed), ("random", drawn))
    }
    bound = 1 - (built.gap / built.reach) ** 2 / n**3
    steps = {
        name: float(np.max([b / a for a, b in itertools.pairwise(curve) if a > ZERO])) for name, curve in losses.items()
    }
    return dict(part="greedy", n=n, seed=seed, bound=bound, slowest=steps, losses=losses)


def bound_of(n: int, problems: int) -> Row:
    """Two steps of the proof of proposition 4.1, over random data sets.

    `inverse`: (|A^-1| dm)^2, which equation 188 takes to be at most 1. `worst`: the decrease that the best neuron of
    the construction gives to a residual made for it (the last left singular vector of the normalised activities), as a
    multiple of the decrease that the proposition promises.
    """
    inverse, worst = [], []
    for seed in range(problems):
        built = construction(problem(n, seed)[0])
        inverse.append((np.linalg.norm(np.linalg.inv(built.activities), 2) * built.gap) ** 2)
        normalised = built.activities / np.linalg.norm(built.activities, axis=0)
        residual = np.linalg.svd(normalised)[0][:, -1]
        promised = (built.gap / built.reach) ** 2 / n**3
        worst.append(np.max((normalised.T @ residual) ** 2) / promised)
    return dict(
        part="bound",
        n=n,
        problems=problems,
        inverse_least=min(inverse),
        inverse_median=float(np.median(inverse)),
        worst=min(worst),
        violated=int(np.sum(np.array(worst) < 1)),
    )


def pursue(residual: np.ndarray, features: Callable[[int], np.ndarray], additions: int) -> list[float]:
    """One neuron at a time, the one with the largest decrease at its own best amplitude; nothing else moves."""
    start, curve = np.sum(residual**2), [1.0]
    for t in range(additions):
        h = features(t)
        squares = np.sum(h**2, axis=0)
        slopes = h.T @ residual
        decrease = np.where(squares > 0, slopes**2 / np.where(squares > 0, squares, 1), 0)
        best = np.argmax(decrease)
        if decrease[best] > 0:
            residual = residual - h[:, best] * slopes[best] / squares[best]
        curve.append(float(np.sum(residual**2) / start))
    return curve


def one_by_one(n: int, seed: int) -> Row:
    """Appendix D.6: the neuron of the last sample first, the fan-outs so far solved exactly each time."""
    x, target = problem(n, seed)
    built = construction(x)
    target = target[built.order]
    curve = [1.0]
    for k in range(1, n + 1):
        fan_out = np.linalg.solve(built.activities[n - k :, n - k :], target[n - k :])
        left = target - built.activities[:, n - k :] @ fan_out
        curve.append(float(np.sum(left**2) / np.sum(target**2)))
    return dict(part="points", n=n, seed=seed, losses=curve, monotone=bool(np.all(np.diff(curve) < 0)))


# --- Proposition 4.2 and the stuck case: the library, one hidden layer that starts empty ---


class Regression(NamedTuple):
    """Least squares by a hidden layer without output bias, all slots free."""

    loss_fn: Callable[..., Any]
    activities: Callable[..., Any]
    params: Any
    batch: Any
    site: tinyjax.Site


def regression(x: np.ndarray, y: np.ndarray, activation: Callable[..., Any], capacity: int) -> Regression:
    def activities(params: Any, x: Any) -> Any:
        return activation(x @ params["in"]["w"] + params["in"]["b"])

    def loss_fn(params: Any, batch: Any) -> Any:
        return jnp.mean(jnp.sum((activities(params, batch[0]) @ params["out"]["w"] - batch[1]) ** 2, axis=-1))

    params = {
        "in": {"w": jnp.zeros((x.shape[1], capacity)), "b": jnp.zeros(capacity)},
        "out": {"w": jnp.zeros((capacity, y.shape[1]))},
    }
    batch = (jnp.asarray(x), jnp.asarray(y))
    (site,) = tinyjax.find_sites(loss_fn, params, batch)
    return Regression(loss_fn, activities, params, batch, site)


def add_neuron(task: Regression, params: Any, method: Callable[..., Any], key: jax.Array) -> tuple[Any, Any]:
    """A neuron of the method, its pre-activations scaled to [-1, 1] and its fan-out zero, then the best update.

    The loss is quadratic in the fan-outs, with V_goal = 2 (y - f): half of the best update is its minimum.
    """
    statistics = tinyjax.estimate(task.loss_fn, params, task.batch, task.site, **methods.needs(method))
    neurons = method(statistics, num_neurons=1, key=key)
    inputs = jnp.concatenate([task.batch[0], jnp.ones((len(task.batch[0]), 1))], axis=1)
    largest = jnp.max(jnp.abs(inputs @ neurons.alpha))
    scaled = neurons._replace(
        alpha=neurons.alpha / jnp.where(largest > 0, largest, 1), omega=jnp.zeros_like(neurons.omega)
    )
    params, _ = tinyjax.surgery.write(params, task.site, scaled, amplitude=1.0)
    after = tinyjax.estimate(task.loss_fn, params, task.batch, task.site)
    return tinyjax.surgery.add_update(params, task.site, tinyjax.methods.best_update(after), amplitude=0.5), neurons


exact_tiny = tinyjax.methods.traits(function_preserving=False, stochastic=False)(
    lambda statistics, **options: tinyjax.methods.tiny(statistics, ridge=0.0, **options)
)


def polynomial(coefficients: np.ndarray) -> Callable[..., Any]:
    """sum_k c_k a^k from k = 1 on: sigma(0) = 0."""

    def activation(a: Any) -> Any:
        total = jnp.zeros_like(a)
        for c in coefficients[::-1]:
            total = (total + c) * a
        return total

    return activation


def completed_tiny(n: int, seed: int) -> Iterator[Row]:
    x, target = problem(n, seed)
    rng = np.random.default_rng(seed + 2000)
    task = regression(x, target[:, None], polynomial(rng.normal(size=n * n)), capacity=max(n, 2))
    add = jax.jit(
        lambda params, key: add_neuron(task, params, tinyjax.methods.completed(exact_tiny, tinyjax.methods.random), key)
    )
    params, moments, squares, fallbacks = task.params, [1.0], [1.0], 0
    start = float(task.loss_fn(params, task.batch))
    for k in range(n):
        params, neurons = add(params, jax.random.key(1000 * seed + k))
        fallbacks += int(neurons.singular_values[0] == 0)
        moments.append(float(task.loss_fn(params, task.batch)) / start)
        h = np.asarray(task.activities(params, task.batch[0]))
        left = target - h @ np.linalg.lstsq(h, target, rcond=1e-15)[0]
        squares.append(float(np.mean(left**2)) / start)
    condition = float(np.linalg.cond(h[:, :n])) if n > 1 else 1.0
    yield dict(
        part="completed",
        n=n,
        seed=seed,
        degree=n * n,
        fallbacks=fallbacks,
        condition=condition,
        last=moments[-1],
        last_least_squares=squares[-1],
        losses={"best_update": moments, "least squares": squares},
    )


def first_that_lowers(task: Regression, steps: list[Callable[..., Any]]) -> Callable[..., Any]:
    """The first addition that lowers the loss by 0.1 %: a neuron that is there already has a slope, and no effect."""

    def step(params: Any, key: jax.Array) -> Any:
        before, grown = task.loss_fn(params, task.batch), params
        for one in steps:
            grown = one(params, key)
            if task.loss_fn(grown, task.batch) <= 0.999 * before:
                break
        return grown

    return step


def stuck(config: Config) -> Iterator[Row]:
    """The corners of a square with the product as target, and points inside: even in every direction."""
    grid = np.array([(a * s, b * s) for s in (1.0, 0.6) for a in (-1, 1) for b in (-1, 1)])
    target = np.prod(grid, axis=1, keepdims=True)
    task = regression(grid, target, jax.nn.relu, capacity=config.stuck_additions)
    start = float(task.loss_fn(task.params, task.batch))
    first = tinyjax.methods.bottleneck(tinyjax.estimate(task.loss_fn, task.params, task.batch, task.site))
    first_row = dict(part="stuck", psi=float(first.after), gain=float(first.gains[0]))

    def add(method: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(lambda params, key: add_neuron(task, params, method, key)[0])

    second_order = partial(tinyjax.methods.second_order, ridge=0.0)
    drawn, curved = add(tinyjax.methods.random), add(second_order)
    by_random = add(tinyjax.methods.completed(exact_tiny, tinyjax.methods.random))
    by_order = add(tinyjax.methods.completed(exact_tiny, second_order))
    cures = {
        "TINY": [add(exact_tiny)],
        "completed": [by_random],
        "completed on stall": [by_random, drawn],
        "second order": [by_order],
        "second order on stall": [by_order, curved],
    }
    for seed, (name, tried) in itertools.product(config.seeds, cures.items()):
        step, params, curve = first_that_lowers(task, tried), task.params, [1.0]
        for k in range(config.stuck_additions):
            params = step(params, jax.random.key(1000 * seed + k))
            curve.append(float(task.loss_fn(params, task.batch)) / start)
        yield first_row | dict(seed=seed, method=name, last=curve[-1], losses=curve)


# --- Appendix D.3 ---


def random_directions(config: Config, dimension: int, seed: int) -> Iterator[Row]:
    """Share of |V_goal|^2 that the best amplitude of a random direction takes: <v, m>^2 / (|v|^2 |m|^2)."""
    key = jax.random.key(seed)
    goal, moves = (
        jax.random.normal(key, (dimension,)),
        jax.random.normal(jax.random.fold_in(key, 1), (config.draws, dimension)),
    )
    cosine = moves @ goal / (jnp.linalg.norm(goal) * jnp.linalg.norm(moves, axis=1))
    yield dict(part="random", kind="direction", d=dimension, seed=seed, share=float(jnp.mean(cosine**2)))

    digits = data.load("digits")
    mean, std = data.channel_moments(digits.train)
    batch = data.as_batch(digits.train, mean=mean, std=std)
    model = MLP(widths=(dimension, dimension), num_classes=digits.num_classes)

    def loss_fn(params: Any, batch: data.Batch) -> Any:
        logits: Any = model.apply(params, batch.image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()

    params = model.init(jax.random.key(seed), jnp.asarray(batch.image[:1]))
    site = tinyjax.find_sites(loss_fn, params, batch)["hidden_1"]  # its consumer has `dimension` outputs

    @jax.jit
    def shares(params: Any, batch: data.Batch) -> tuple[Any, Any]:
        statistics = tinyjax.estimate(loss_fn, params, batch, site)
        mean = tinyjax.statistics.moments(statistics)
        drawn = tinyjax.methods.random(statistics, num_neurons=config.draws, key=jax.random.key(seed))
        slope = jnp.einsum("dk,dq,kq->k", drawn.alpha, mean.cross_prev, drawn.omega)
        square = jnp.sum(drawn.omega**2, 1) * jnp.einsum("dk,de,ek->k", drawn.alpha, mean.gram_prev, drawn.alpha)
        best = tinyjax.methods.tiny_unprojected(statistics, num_neurons=1, ridge=0.0)
        return jnp.mean(slope**2 / square) / mean.energy, best.singular_values[0] ** 2 / mean.energy

    random_share, tiny_share = shares(params, batch)
    yield dict(part="random", kind="neuron", d=dimension, seed=seed, share=float(random_share), tiny=float(tiny_share))


def draw(rows: list[Row]) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    from tinyjax.plot import style

    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(8.4, 6.4), layout="constrained")
        panels = figure.subplot_mosaic([["greedy", "completed"], ["random", "stuck"]])

        axes = panels["greedy"]
        n = max(distinct(select(rows, part="greedy"), "n"))
        axes.set_title(f"Prop. 4.1: greedy ReLU additions, n = {n}")
        for index, row in enumerate(select(rows, part="greedy", n=n)):
            label = {} if index else {"construction": "construction", "random": "best of random", "bound": "bound γᵗ"}
            for name, colour in (("construction", style.ACCENT), ("random", style.SECOND)):
                axes.plot(row["losses"][name], color=colour, alpha=0.7, linewidth=1, label=label.get(name))
            steps = np.arange(len(row["losses"]["construction"]))
            axes.plot(
                steps, row["bound"] ** steps, color=style.INK, linestyle="--", linewidth=1, label=label.get("bound")
            )
        _loss_axes(axes)

        axes = panels["completed"]
        sizes = distinct(select(rows, part="completed"), "n")
        axes.set_title("Prop. 4.2: completed TINY, degree n²")
        for size, colour in zip(sizes, style.depth_colours(len(sizes))):
            for index, row in enumerate(select(rows, part="completed", n=size)):
                curve = np.maximum(row["losses"]["least squares"], 1e-32)
                axes.plot(
                    curve, "-o", color=colour, markersize=2.5, linewidth=1, label=None if index else f"n = {size}"
                )
        _loss_axes(axes)

        axes = panels["random"]
        axes.set_title("D.3: gain of a random direction")
        dimensions = np.array(distinct(select(rows, part="random"), "d"))
        axes.plot(dimensions, 1 / dimensions, color=style.INK, linestyle="--", linewidth=1, label="1 / d")
        for kind, colour in (("direction", "#9a9ab0"), ("neuron", style.SECOND)):
            shares = [np.mean(column(select(rows, part="random", kind=kind, d=d), "share")) for d in dimensions]
            axes.plot(dimensions, shares, "-o", color=colour, markersize=3, label=f"random {kind}")
        best = [np.mean(column(select(rows, part="random", kind="neuron", d=d), "tiny")) for d in dimensions]
        axes.plot(dimensions, best, "-o", color=style.ACCENT, markersize=3, label="TINY's first neuron")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("d")
        axes.set_ylabel("share of |V_goal|²")
        axes.legend(fontsize=7, frameon=False)

        axes = panels["stuck"]
        axes.set_title("Stuck on x₁x₂, and the cure")
        for name, colour in (
            ("TINY", style.INK),
            ("completed", style.SECOND),
            ("completed on stall", style.ACCENT),
            ("second order on stall", "#2a9d8f"),
        ):
            for index, row in enumerate(select(rows, part="stuck", method=name)):
                curve = np.maximum(row["losses"], 1e-32)
                axes.plot(curve, color=colour, linewidth=1.2, label=None if index else name)
        _loss_axes(axes)
    return figure


def _loss_axes(axes: Any) -> None:
    axes.set_yscale("log")
    axes.set_xlabel("neurons added")
    axes.set_ylabel("loss / first loss")
    axes.legend(fontsize=7, frameon=False)


def findings(rows: list[Row]) -> list[Finding]:
    bounds = select(rows, part="bound")
    greedy_rows, points = select(rows, part="greedy"), select(rows, part="points")
    n = max(distinct(greedy_rows, "n"))
    largest = select(greedy_rows, n=n)
    within = all(row["slowest"][name] <= row["bound"] for row in greedy_rows for name in row["slowest"])
    after = np.median([row["losses"]["construction"][-1] for row in largest])
    exact = all(row["monotone"] and row["losses"][-1] < ZERO for row in points)
    polynomial = select(rows, part="completed")
    reached = column(polynomial, "last_least_squares") < ZERO
    through = column(polynomial, "last") < ZERO
    dimensions = np.array(distinct(select(rows, part="random"), "d"))

    def exponent(kind: str) -> float:
        shares = [np.mean(column(select(rows, part="random", kind=kind, d=d), "share")) for d in dimensions]
        return float(np.polyfit(np.log(dimensions), np.log(shares), 1)[0])

    neuron = select(rows, part="random", kind="neuron", d=int(dimensions[-1]))
    ratio = np.mean(column(neuron, "tiny")) / np.mean(column(neuron, "share"))
    stuck_rows = select(rows, part="stuck")
    alone, *cures = (select(stuck_rows, method=m) for m in distinct(stuck_rows, "method"))
    by_rank, on_stall, second, second_on_stall = cures
    cured = max(column(some, "last").max() for some in (on_stall, second_on_stall)) < ZERO

    def listed(some: list[Row]) -> str:
        return ", ".join(f"{v:.0e}" for v in column(some, "last"))

    def until_zero(some: list[Row]) -> str:
        counts = [next((k for k, loss in enumerate(row["losses"]) if loss < ZERO), None) for row in some]
        return ", ".join(map(str, counts))

    return [
        Finding(
            "Proposition 4.1",
            f"n = {n}: bound on the factor {spread([r['bound'] for r in largest], 6)}, slowest step of the "
            f"construction {spread([r['slowest']['construction'] for r in largest], 3)}; median loss after "
            f"{len(largest[0]['losses']['construction']) - 1} neurons {after:.1e} of the first"
            "; least (|A^-1| dm)^2 over random data sets "
            + ", ".join(f"{row['inverse_least']:.3g} (n = {row['n']})" for row in bounds)
            + "; data sets with a residual whose best neuron decreases it less than promised: "
            + ", ".join(f"{row['violated']} of {row['problems']} (n = {row['n']})" for row in bounds),
            ("holds for random targets, far from tight" if within else "differs: a step was slower than the bound")
            + (
                ". The proof has a gap: equation 188 takes |A^-1| dm to be at most 1 for triangular A, which is false "
                "for any two points (5.83); to some residuals the best of its neurons gives less than the stated "
                "factor (other ReLU neurons may do better)"
                if min(row["inverse_least"] for row in bounds) > 1
                else ""
            ),
        ),
        Finding(
            "Appendix D.6",
            f"{len(points)} problems, n = {', '.join(map(str, distinct(points, 'n')))}: largest loss after n neurons "
            f"{max(row['losses'][-1] for row in points):.0e} of the first",
            "reproduced" if exact else "differs",
        ),
        Finding(
            "Proposition 4.2",
            f"loss below {ZERO:.0e} of the first after n neurons in {reached.sum()} of {len(reached)} runs by least "
            f"squares on the activities, in {through.sum()} by `best_update`; largest condition number "
            f"{column(polynomial, 'condition').max():.0e}; completed by a random neuron "
            f"{column(polynomial, 'fallbacks').sum():.0f} times",
            ("reproduced" if reached.all() else "differs: not in every run")
            + (
                "" if through.all() else "; second moments square the condition number, which stops `best_update` early"
            ),
        ),
        Finding(
            "Appendix D.3",
            f"share of |V_goal|^2 falls as d^{exponent('direction'):.2f} for random directions and "
            f"d^{exponent('neuron'):.2f} for random neurons on digits; at d = {dimensions[-1]} TINY's first neuron "
            f"gains {ratio:.0f} times as much as a random one",
            "reproduced" if abs(exponent("direction") + 1) < 0.1 else "differs",
        ),
        Finding(
            "Section 4, the stuck case",
            f"psi {alone[0]['psi']:.2f}, largest gain of a new neuron {alone[0]['gain']:.0e}; loss after "
            f"{len(alone[0]['losses']) - 1} neurons by seed: TINY {np.mean(column(alone, 'last')):.2f} of the first; "
            f"completed by random neurons where the singular value is zero {listed(by_rank)}; also where an addition "
            f"lowers the loss by less than 0.1 % {listed(on_stall)}; completed by second-order neurons "
            f"{listed(second)}; also on a stall {listed(second_on_stall)}; the first addition leaves "
            f"{np.mean([row['losses'][1] for row in second_on_stall]):.2f} by second order and "
            f"{np.mean([row['losses'][1] for row in on_stall]):.2f} by random neurons; neurons until the loss "
            f"is zero on 8 points: {until_zero(second_on_stall)} and {until_zero(on_stall)}",
            "reproduced, with a finding: TINY may propose again a neuron that is there already, with a slope and "
            "without effect, so completion must look at the loss, not only at the singular value"
            if cured
            else "differs: not cured in every run",
        ),
    ]


EXPERIMENT = Experiment("convergence", PRESETS, measure, draw, findings)


def main(arguments: list[str] | None = None) -> Any:
    return run(EXPERIMENT, __doc__, arguments)


if __name__ == "__main__":
    main()
