"""Where to grow: which criterion ranks sites of different kinds as the real decrease of the loss on fresh data does.

    python -m experiments.beyond.ranking --preset cpu          # digits, 5 seeds, 260 s on 2 busy CPU cores

One small network over the rows of digits (8 tokens of 8 pixels) has six places to grow: a ReLU layer and a SwiGLU layer
in residual blocks, the value dimension of an attention head, the rank of a linear adapter, a residual block that is
still empty, and a tanh layer of the head. It is trained for a while, then every site is offered the same number of
neurons (`tiny0` with its best fan-out, and dW) computed from one half of the training samples. Criteria, both from
training samples alone:

**score**: `score_sites`, the Gauss-Newton model of the loss at the output of the network, on the other half.
**psi**: the local gain, by how much such neurons lower psi on samples they were not fitted to (`held_out_gain`); in
units of each layer, the way a criterion taken from the paper alone would rank.

**real**: the decrease of the loss on the *test split* by neurons and dW beyond dW alone, each at the amplitude with the
lowest loss on the other half. Ranks are compared by Spearman's correlation over the sites of a seed; **regret** is the
share of the largest real decrease that is lost by growing where the criterion says.

Measured (cpu): the head gains more than thirty times as much as any other site and both criteria see it, so neither
loses anything by its first choice; the score ranks the others better. Not tuned: the network and the sizes are the
first tried.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tinyjax
from experiments.harness import Experiment, Finding, Row, column, distinct, run, select, spread
from tinyjax import data, methods
from tinyjax.methods.solvers.ridge import held_out_best_update

CLASSES = 10
AMPLITUDES = np.concatenate([[0.0], np.geomspace(1e-3, 1e2, 41)])
KINDS = {
    "relu/w": "ReLU layer",
    "glu/up": "gated layer",
    "attention/v": "attention values",
    "adapter/a": "adapter rank",
    "empty/w": "empty block",
    "head/w": "head, tanh",
}


class Config(NamedTuple):
    """What is run.

    Attributes:
        stream: width of the residual stream.
        capacity: slots of every site.
        width: neurons of every site before it is measured; the empty block has none.
        epochs: of training before the measurement.
        num_neurons: offered to every site.
        seeds: of initialisation and batch order.
    """

    stream: int
    capacity: int
    width: int
    epochs: int
    num_neurons: int
    seeds: tuple[int, ...]
    batch_size: int = 64
    learning_rate: float = 3e-3


PRESETS = {
    "smoke": Config(stream=6, capacity=4, width=2, epochs=1, num_neurons=1, seeds=(0,)),
    "cpu": Config(stream=12, capacity=8, width=3, epochs=10, num_neurons=2, seeds=(0, 1, 2, 3, 4)),
}


def make_params(config: Config, seed: int) -> Any:
    """Kernels at variance 1 / fan-in."""
    s, c = config.stream, config.capacity
    shapes = {
        "in": (8, s),
        "relu": {"w": (s, c), "b": (c,), "u": (c, s)},
        "glu": {"gate": (s, c), "up": (s, c), "down": (c, s)},
        "attention": {"q": (s, 4), "k": (s, 4), "v": (s, c), "o": (c, s)},
        "adapter": {"a": (s, c), "b": (c, s)},
        "empty": {"w": (s, c), "b": (c,), "u": (c, s)},
        "head": {"w": (s, c), "b": (c,), "u": (c, CLASSES), "c": (CLASSES,)},
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        jax.random.normal(key, shape) / shape[0] ** 0.5 if len(shape) > 1 else jnp.zeros(shape)
        for key, shape in zip(keys, leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


def model(p: Any, batch: data.Batch) -> Any:
    """Logits; blocks of five kinds around one residual stream, all of them without norms."""
    x = batch.image.reshape(-1, 8, 8)
    s = x @ p["in"]
    s = s + jax.nn.relu(s @ p["relu"]["w"] + p["relu"]["b"]) @ p["relu"]["u"]
    head = p["attention"]
    weights = jax.nn.softmax((s @ head["q"]) @ (s @ head["k"]).swapaxes(-1, -2) / 2)
    s = s + (weights @ (s @ head["v"])) @ head["o"]
    s = s + (jax.nn.silu(s @ p["glu"]["gate"]) * (s @ p["glu"]["up"])) @ p["glu"]["down"]
    s = s + (s @ p["adapter"]["a"]) @ p["adapter"]["b"]
    s = s + jax.nn.gelu(s @ p["empty"]["w"] + p["empty"]["b"]) @ p["empty"]["u"]
    hidden = jnp.tanh(s.mean(axis=1) @ p["head"]["w"] + p["head"]["b"])
    return hidden @ p["head"]["u"] + p["head"]["c"]


def objective(logits: Any, batch: data.Batch) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()


def loss_fn(params: Any, batch: data.Batch) -> Any:
    return objective(model(params, batch), batch)


def measure(config: Config) -> Iterator[Row]:
    digits = data.load("digits")
    mean, std = data.channel_moments(digits.train)
    train, test = (data.as_batch(split, mean=mean, std=std) for split in (digits.train, digits.test))
    train = jax.tree.map(lambda x: x[: len(x) // 2 * 2], train)
    found = tinyjax.find_sites(loss_fn, make_params(config, 0), train)
    sites = tinyjax.Sites(found[name] for name in KINDS)  # the stream and the query-key dimension stay as they are
    optimizer = optax.adam(config.learning_rate)
    step = jax.jit(tinyjax.train_step(loss_fn, optimizer))
    look = jax.jit(partial(criteria, config, sites))
    for seed in config.seeds:
        params = tinyjax.thin(make_params(config, seed), sites, config.width)
        params = tinyjax.thin(params, sites, {"empty/w": 0})
        opt_state = optimizer.init(params)
        for epoch in range(config.epochs):
            for batch in data.batches(train, batch_size=config.batch_size, seed=seed, epoch=epoch):
                params, opt_state, _, _ = step(params, opt_state, batch)
        found, losses = jax.device_get((look(params, train, test), [loss_fn(params, b) for b in (train, test)]))
        for name in sites.names:
            yield dict(part="site", seed=seed, site=name, kind=KINDS[name], loss=losses[0], loss_test=losses[1]) | {
                key: float(value) for key, value in found[name].items()
            }


def criteria(config: Config, sites: tinyjax.Sites, params: Any, train: data.Batch, test: data.Batch) -> Any:
    """By site, what the criteria say and what is true."""
    scores = tinyjax.score_sites(model, objective, params, train, sites, num_neurons=config.num_neurons)
    middle = len(train.label) // 2
    fitted, other = (jax.tree.map(lambda x, s=s: x[s], train) for s in (slice(middle), slice(middle, None)))
    statistics = tinyjax.estimate(loss_fn, params, fitted, sites, num_gates=config.num_neurons)
    found = {}
    for site in sites:
        record = methods.with_ridges(statistics[site.name])
        fit = partial(fitted_to, config.num_neurons)
        found[site.name] = dict(
            score=scores[site.name].gain,
            psi=tinyjax.methods.held_out_gain(record, fit),
            real=real_decrease(site, params, *fit(record), other, test),
        )
    return found


def fitted_to(num_neurons: int, statistics: tinyjax.Statistics) -> tuple[tinyjax.methods.Neurons, Any]:
    """Neurons with their best fan-out, and the update that goes with them."""
    delta = held_out_best_update(statistics)
    return methods.refit(statistics, tinyjax.methods.tiny0(statistics, num_neurons=num_neurons), delta), delta


def real_decrease(
    site: tinyjax.Site, params: Any, neurons: tinyjax.methods.Neurons, delta: Any, choose: data.Batch, fresh: data.Batch
) -> Any:
    """The decrease of the loss on fresh samples beyond that by the update alone, amplitudes chosen on others."""

    def loss(batch: data.Batch, speaks: float, gamma: Any) -> Any:
        scaled = neurons._replace(omega=speaks * gamma * neurons.omega)
        moved = tinyjax.surgery.add_update(params, site, delta, amplitude=gamma)
        return loss_fn(tinyjax.surgery.write(moved, site, scaled, amplitude=1.0)[0], batch)

    def best(speaks: float) -> Any:
        losses = jax.lax.map(partial(loss, choose, speaks), jnp.asarray(AMPLITUDES, jnp.float32))
        return loss(fresh, speaks, jnp.asarray(AMPLITUDES, jnp.float32)[jnp.argmin(losses)])

    return best(0.0) - best(1.0)


def rank_correlation(x: Any, y: Any) -> float:
    """Spearman's, without ties."""
    first, second = np.argsort(np.argsort([x, y]))
    return float(np.corrcoef(first, second)[0, 1])


def by_seed(rows: list[Row], criterion: str) -> tuple[np.ndarray, np.ndarray]:
    """For every seed the rank correlation with the real decrease, and the regret."""
    correlations, regrets = [], []
    for seed in distinct(rows, "seed"):
        says, real = (column(select(rows, seed=seed), field) for field in (criterion, "real"))
        correlations.append(rank_correlation(says, real))
        regrets.append(1 - max(real[np.argmax(says)], 0) / real.max() if real.max() > 0 else 0.0)
    return np.array(correlations), np.array(regrets)


def draw(rows: list[Row]) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    from tinyjax.plot import style

    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        for axes, field, title in zip(
            figure.subplots(1, 2), ("score", "psi"), ("Gauss-Newton score", "local psi gain")
        ):
            for kind, colour in zip(distinct(rows, "kind"), style.depth_colours(len(KINDS))):
                some = select(rows, kind=kind)
                axes.plot(column(some, field), column(some, "real"), "o", color=colour, label=kind, markersize=5)
            axes.set_title(f"{title}, {len(distinct(rows, 'seed'))} seeds")
            axes.set_xlabel(f"{title} on held-out samples")
            axes.set_ylabel("real decrease on the test split")
            axes.set_xscale("symlog", linthresh=1e-3)
            axes.set_yscale("symlog", linthresh=1e-3)
        figure.axes[1].legend(fontsize=7, frameon=False)
    return figure


def findings(rows: list[Row]) -> list[Finding]:
    texts, means = [], {}
    for criterion, name in (("score", "score"), ("psi", "local psi gain")):
        correlations, regrets = by_seed(rows, criterion)
        means[criterion] = correlations.mean(), regrets.mean()
        listed = ", ".join(f"{value:+.2f}" for value in correlations)
        texts.append(f"{name}: Spearman {spread(correlations, 2)} ({listed}), regret {spread(regrets, 2)}")
    real = ", ".join(f"{kind} {spread(column(select(rows, kind=kind), 'real'), 4)}" for kind in distinct(rows, "kind"))
    better = means["score"][0] > means["psi"][0] and means["score"][1] <= means["psi"][1]
    return [
        Finding(
            "Where to grow, sites of six kinds",
            f"{'; '.join(texts)}. Real decreases: {real}",
            "the score ranks better than the local gain"
            if better
            else "the score does not rank better than the local gain here",
        )
    ]


EXPERIMENT = Experiment("ranking", PRESETS, measure, draw, findings)


def main(arguments: list[str] | None = None) -> Any:
    return run(EXPERIMENT, __doc__, arguments)


if __name__ == "__main__":
    main()
