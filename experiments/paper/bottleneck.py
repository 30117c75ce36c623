"""Where a network is stuck: the example of appendix A.4, psi of every layer over training, and Figure 2 on data.

    python -m experiments.paper.bottleneck --preset cpu       # digits, 3 seeds, 30 s on 2 shared CPU cores

**A.4**: f(x) = a x + b at (a, b) = (1, 0) must learn 2 sin x + x from x = 0, pi/2, pi, 3 pi/2. The paper: no update of
(a, b) improves all four points. As a network the model is one ReLU neuron, for x >= 0. By hand: mean |V_goal|^2 = 8, of
which the best update reaches 3.2 and leaves psi = 4.8.

**Figure 2**: V_goal, the move of gradient descent and the best move of the tangent space. The paper draws it; we
measure the cosines at every hidden layer of thin and wide networks while they train (Adam 3e-3, digits).

**psi over training**: psi, and its share of mean |V_goal|^2, in the same networks. Shares are of the batch itself: a
layer with H inputs explains about H / n of pure noise (6 % for H = 65 and the 1078 samples used).

Measured (cpu): A.4 as by hand. Once a network is trained, 92 to 99 % of V_goal is out of reach of any one layer, thin
or wide, and what wide layers do reach is what they would reach of noise.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tinyjax
from experiments.harness import Experiment, Finding, Row, column, distinct, run, select, spread
from tinyjax import data
from tinyjax.models import MLP


class Config(NamedTuple):
    """What is run.

    Attributes:
        widths: of the networks compared, each with `depth` hidden layers of one width.
        depth: number of hidden layers.
        epochs: of training.
        measure_every: epochs between measurements.
        seeds: of initialisation and batch order.
    """

    widths: tuple[int, ...]
    depth: int
    epochs: int
    measure_every: int
    seeds: tuple[int, ...]
    batch_size: int = 128
    learning_rate: float = 3e-3
    num_neurons: int = 8


PRESETS = {
    "smoke": Config(widths=(4,), depth=1, epochs=2, measure_every=1, seeds=(0,)),
    "cpu": Config(widths=(4, 64), depth=3, epochs=40, measure_every=2, seeds=(0, 1, 2)),
}


def measure(config: Config) -> Iterator[Row]:
    yield example()
    for width in config.widths:
        for seed in config.seeds:
            yield from training(config, width, seed)


def example() -> Row:
    """Appendix A.4 as a network: one ReLU neuron, which is linear on x >= 0."""
    with jax.enable_x64(True):
        x = np.arange(4)[:, None] * np.pi / 2
        y = 2 * np.sin(x) + x
        params = {"hidden": {"w": np.eye(1), "b": np.zeros(1)}, "out": {"w": np.eye(1), "b": np.zeros(1)}}
        # An axis of length 1 has no identity in a trace: a second, empty slot.
        params["hidden"] = {"w": np.array([[1.0, 0.0]]), "b": np.zeros(2)}
        params["out"]["w"] = np.array([[1.0], [0.0]])

        def predict(params: Any, x: Any) -> Any:
            hidden = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
            return hidden @ params["out"]["w"] + params["out"]["b"]

        def loss_fn(params: Any, batch: Any) -> Any:
            return jnp.mean((predict(params, batch[0]) - batch[1]) ** 2)

        params, batch = jax.tree.map(jnp.asarray, (params, (x, y)))
        (site,) = tinyjax.find_sites(loss_fn, params, batch)
        statistics = tinyjax.estimate(loss_fn, params, batch, site)
        delta = tinyjax.methods.best_update(statistics)
        found = tinyjax.methods.bottleneck(statistics)
        moved = tinyjax.surgery.add_update(params, site, delta, amplitude=1e-6)
        best = (predict(moved, x) - predict(params, x)) / 1e-6
        return dict(
            part="A.4",
            x=x[:, 0],
            target=y[:, 0],
            prediction=np.asarray(predict(params, x))[:, 0],
            goal=2 * (y - np.asarray(predict(params, x)))[:, 0],
            best=np.asarray(best)[:, 0],
            asked=float(found.before),
            psi=float(found.after),
            first_gain=float(found.gains[0]),
        )


def training(config: Config, width: int, seed: int) -> Iterator[Row]:
    """Psi and the geometry of every hidden layer while a network trains."""
    digits = data.load("digits")
    mean, std = data.channel_moments(digits.train)
    train, test = (data.as_batch(split, mean=mean, std=std) for split in (digits.train, digits.test))
    model = MLP(widths=(width,) * config.depth, num_classes=digits.num_classes)

    def loss_fn(params: Any, batch: data.Batch) -> Any:
        logits: Any = model.apply(params, batch.image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()

    params = model.init(jax.random.key(seed), jnp.asarray(train.image[:1]))
    sites = tinyjax.find_sites(loss_fn, params, train).growable
    optimizer = optax.adam(config.learning_rate)
    opt_state = optimizer.init(params)
    step = jax.jit(tinyjax.train_step(loss_fn, optimizer))

    @jax.jit
    def look(params: Any, batch: data.Batch) -> dict[str, dict[str, Any]]:
        found = tinyjax.estimate(loss_fn, params, batch, sites)
        return {name: geometry(statistics, config.num_neurons) for name, statistics in found.items()}

    for epoch in range(config.epochs + 1):
        if epoch % config.measure_every == 0:
            logits: Any = model.apply(params, jnp.asarray(test.image))
            accuracy = float(np.mean(logits.argmax(-1) == test.label))
            for layer, (name, values) in enumerate(jax.device_get(look(params, train)).items(), start=1):
                yield dict(
                    part="training", width=width, seed=seed, epoch=epoch, layer=layer, site=name, test=accuracy
                ) | {key: float(value) for key, value in values.items()}
        for batch in data.batches(train, batch_size=config.batch_size, seed=seed, epoch=epoch):
            params, opt_state, _, _ = step(params, opt_state, batch)


def geometry(statistics: tinyjax.Statistics, num_neurons: int) -> dict[str, Any]:
    """The cosine of V_goal with the moves of Figure 2, all from second moments; psi.

    The gradient step moves the pre-activations by M' b, with <V_goal, M' b> = |M|^2. A projection's cosine is the root
    of the share of |V_goal|^2 that it explains.
    """
    mean, found = tinyjax.statistics.moments(statistics), tinyjax.methods.bottleneck(statistics)
    square = jnp.sum(mean.cross**2)
    length = jnp.sqrt(jnp.sum(mean.cross * (mean.gram @ mean.cross)) * mean.energy)
    added = jnp.sum(found.gains[:num_neurons])
    return dict(
        asked=found.before,
        psi=found.after,
        share=found.after / found.before,
        cos_gradient=square / length,
        cos_best=jnp.sqrt(jnp.maximum(1 - found.after / found.before, 0)),
        cos_grown=jnp.sqrt(jnp.clip(1 - (found.after - added) / found.before, 0, 1)),
    )


def draw(rows: list[Row]) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    from tinyjax.plot import style

    with matplotlib.rc_context(style.STYLE):
        (example_row,) = select(rows, part="A.4")
        trained = select(rows, part="training")
        widths, layers = distinct(trained, "width"), distinct(trained, "layer")
        figure = Figure(figsize=(8.4, 6.4), layout="constrained")
        panels = figure.subplot_mosaic([["example", "share"], ["thin", "wide"]])
        _draw_example(panels["example"], example_row)
        axes = panels["share"]
        axes.set_title("Bottleneck: share of |V_goal|² out of reach")
        for width, dashes in zip(widths, ("-", "--")):
            for layer, colour in zip(layers, style.depth_colours(len(layers))):
                epochs, mean, deviation = _over_seeds(select(trained, width=width, layer=layer), "share")
                axes.plot(epochs, mean, dashes, color=colour, label=f"width {width}, layer {layer}")
                axes.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        axes.set_ylim(0, 1.02)
        axes.legend(fontsize=7, frameon=False, ncols=2, loc="lower right")
        axes.set_xlabel("epoch")
        for name, width in zip(("thin", "wide"), (widths[0], widths[-1])):
            _draw_cosines(panels[name], select(trained, width=width), style)
    return figure


def _draw_example(axes: Any, row: Row) -> None:
    from tinyjax.plot import style

    x = np.array(row["x"])
    fine = np.linspace(-0.3, 5.1, 200)
    axes.set_title("A.4: 2 sin x + x by a linear model")
    axes.plot(fine, 2 * np.sin(fine) + fine, color=style.FAINT)
    axes.plot(fine, fine, color=style.INK, linewidth=1)
    axes.plot(x, row["target"], "o", color=style.INK, markersize=5, label="target")
    arrows = dict(angles="xy", scale_units="xy", width=0.006, headwidth=4)
    goal, best = np.array(row["goal"]), np.array(row["best"])
    axes.quiver(x - 0.05, x, 0 * x, goal, scale=2, color=style.ACCENT, label="asked (halved)", **arrows)
    axes.quiver(x + 0.05, x, 0 * x, best, scale=2, color=style.SECOND, label="best update (halved)", **arrows)
    axes.set_ylim(-1.2, 6)
    axes.set_xlabel("x")
    axes.legend(fontsize=7, frameon=False, loc="upper left")


def _draw_cosines(axes: Any, rows: list[Row], style: Any) -> None:
    axes.set_title(f"Figure 2 on data, width {rows[0]['width']}")
    kinds = {
        "cos_gradient": ("gradient step", "#9a9ab0"),
        "cos_best": ("best update", style.SECOND),
        "cos_grown": ("+ 8 neurons", style.ACCENT),
    }
    for (field, (label, colour)), offset in zip(kinds.items(), (-0.25, 0, 0.25)):
        layers = distinct(rows, "layer")
        means = [np.mean(column(select(rows, layer=layer), field)) for layer in layers]
        deviations = [np.std(column(select(rows, layer=layer), field)) for layer in layers]
        axes.bar(np.array(layers) + offset, means, 0.23, yerr=deviations, color=colour, label=label, ecolor=style.INK)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(layers, [f"layer {layer}" for layer in layers])
    axes.set_ylabel("cosine with V_goal")
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=7, frameon=False, loc="upper left")


def _over_seeds(rows: list[Row], field: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    epochs = sorted(distinct(rows, "epoch"))
    values = [column(select(rows, epoch=epoch), field) for epoch in epochs]
    return np.array(epochs), np.array([v.mean() for v in values]), np.array([v.std() for v in values])


def findings(rows: list[Row]) -> list[Finding]:
    (row,) = select(rows, part="A.4")
    exact = np.allclose([row["asked"], row["psi"]], [8, 4.8], rtol=1e-5)
    trained = select(rows, part="training")
    widths, last = distinct(trained, "width"), max(distinct(trained, "epoch"))
    texts = []
    for width in widths:
        some = [select(trained, width=width, layer=layer, epoch=last) for layer in distinct(trained, "layer")]
        shares = ", ".join(spread(column(rows, "share"), 2) for rows in some)
        psi = ", ".join(f"{np.mean(column(rows, 'psi')):.1e}" for rows in some)
        texts.append(
            f"width {width}: by layer {shares} of |V_goal|^2 out of reach, psi {psi}, test accuracy "
            f"{spread(column(some[0], 'test'))}"
        )
    thin, wide = (column(select(trained, width=width, epoch=last), "psi").mean() for width in (widths[0], widths[-1]))
    ahead = np.all(column(trained, "cos_best") >= column(trained, "cos_gradient") - 1e-5)
    ratio = np.mean(column(trained, "cos_gradient")) / np.mean(column(trained, "cos_best"))
    return [
        Finding(
            "Appendix A.4, Figure 9",
            f"asked {row['asked']:.3f}, best update reaches {row['asked'] - row['psi']:.3f}, psi {row['psi']:.3f}; "
            f"first-order gain of a new neuron there {row['first_gain']:.1e}",
            "reproduced; TINY's linear part alone cannot help there, see the stuck case" if exact else "differs",
        ),
        Finding(
            "Definition 3.1 over training",
            f"after {last} epochs, " + "; ".join(texts),
            f"psi is {thin / wide:.0f} times larger in the thin networks; its share does not tell layers apart once "
            "a network is trained: what wide layers reach is about what they would reach of noise (6 %)"
            if thin > 2 * wide
            else "differs: the thin networks are not more stuck",
        ),
        Finding(
            "Figure 2",
            "cosine with V_goal, mean over layers, widths and epochs: gradient "
            f"{column(trained, 'cos_gradient').mean():.2f}, best update {column(trained, 'cos_best').mean():.2f}, "
            f"with {PRESETS['cpu'].num_neurons} neurons "
            f"{column(trained, 'cos_grown').mean():.2f}",
            f"reproduced: the gradient's move is never closer (on average {ratio:.0%} of the best cosine)"
            if ahead
            else "differs: the gradient's move is closer somewhere",
        ),
    ]


EXPERIMENT = Experiment("bottleneck", PRESETS, measure, draw, findings)


def main(arguments: list[str] | None = None) -> Any:
    return run(EXPERIMENT, __doc__, arguments)


if __name__ == "__main__":
    main()
