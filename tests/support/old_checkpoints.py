"""A checkpoint of every kind of site, as tinyjax 0.1 wrote them: `old_checkpoints.zip`, of which `main` is the writer.

    python -m tests.support.old_checkpoints FOLDER          # ran once, with the last commit before the code had rooms

Each run of four steps grows once, at step 2, and is saved after step 3; `losses.json` holds what step 4 gave then.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import tinyjax

ARCHIVE = Path(__file__).with_suffix(".zip")
STEPS, SAVED = 4, 3
KEY = jax.random.key(0)
OPTIMIZER = tinyjax.with_birth(optax.adam(1e-2))
SCHEDULE = tinyjax.every(2, 1, final=4, start=2)


def waves(phase, *shape):
    return jnp.sin(phase + jnp.arange(jnp.prod(jnp.array(shape)), dtype=float) ** 1.5).reshape(shape) / 2


def mlp():
    params = {"in": {"kernel": waves(0, 3, 6), "bias": jnp.zeros(6)}, "out": {"kernel": waves(1, 6, 2)}}

    def loss_fn(p, batch):
        h = jnp.tanh(batch["x"] @ p["in"]["kernel"] + p["in"]["bias"])
        return jnp.mean((h @ p["out"]["kernel"] - batch["t"]) ** 2)

    return loss_fn, params, {"x": waves(2, 16, 3), "t": waves(3, 16, 2)}


def gated():
    params = {"up": waves(0, 3, 6), "gate": waves(4, 3, 6), "out": waves(1, 6, 2)}

    def loss_fn(p, batch):
        h = jax.nn.silu(batch["x"] @ p["gate"]) * (batch["x"] @ p["up"])
        return jnp.mean((h @ p["out"] - batch["t"]) ** 2)

    return loss_fn, params, {"x": waves(2, 16, 3), "t": waves(3, 16, 2)}


def stream():
    params = {"embed": waves(0, 3, 6), "up": waves(1, 6, 5), "down": waves(4, 5, 6), "out": waves(5, 6, 2)}

    def loss_fn(p, batch):
        h = batch["x"] @ p["embed"]
        h = h + jnp.tanh(h @ p["up"]) @ p["down"]
        return jnp.mean((h @ p["out"] - batch["t"]) ** 2)

    return loss_fn, params, {"x": waves(2, 16, 3), "t": waves(3, 16, 2)}


def attention():
    params = {"q": waves(0, 3, 2, 4), "k": waves(1, 3, 2, 4), "v": waves(4, 3, 2, 4), "o": waves(5, 2, 4, 2)}

    def loss_fn(p, batch):
        q, k, v = (jnp.einsum("btd,dhk->bhtk", batch["x"], p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bhtk,bhsk->bhts", q, k) / 2, axis=-1)
        return jnp.mean((jnp.einsum("bhts,bhsk,hko->bto", weights, v, p["o"]) - batch["t"]) ** 2)

    return loss_fn, params, {"x": waves(2, 16, 5, 3), "t": waves(3, 16, 5, 2)}


def recurrent():
    params = {"w": waves(0, 3, 4), "u": waves(1, 4, 4), "out": waves(4, 4, 2)}

    def loss_fn(p, batch):
        def step(h, x):
            return jnp.tanh(x @ p["w"] + h @ p["u"]), None

        h, _ = jax.lax.scan(step, jnp.zeros((len(batch["x"]), p["u"].shape[0])), batch["x"].swapaxes(0, 1))
        return jnp.mean((h @ p["out"] - batch["t"]) ** 2)

    return loss_fn, params, {"x": waves(2, 16, 5, 3), "t": waves(3, 16, 2)}


def convolution():
    params = {
        "first": waves(0, 3, 3, 1, 4),
        "scale": jnp.ones(4),
        "shift": jnp.zeros(4),
        "second": waves(1, 3, 3, 4, 2),
    }

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def loss_fn(p, batch):
        h = conv(batch["x"], p["first"])
        mean = h.mean((0, 1, 2))
        var = ((h - mean) ** 2).mean((0, 1, 2))
        h = jax.nn.relu((h - mean) / jnp.sqrt(var + 1e-5) * p["scale"] + p["shift"])
        return jnp.mean((conv(h, p["second"]) - batch["t"]) ** 2)

    return loss_fn, params, {"x": waves(2, 16, 5, 5, 1), "t": waves(3, 16, 5, 5, 2)}


MODELS = {make.__name__: make for make in (mlp, gated, stream, attention, recurrent, convolution)}


def main() -> None:
    """Writes the checkpoints into the folder of the command line."""
    folder, losses = Path(sys.argv[1]), {}
    for name, make in MODELS.items():
        loss_fn, params, batch = make()
        sites = [site for site in tinyjax.find_sites(loss_fn, params, batch).growable if "heads" not in site.name]
        params = tinyjax.thin(params, sites[:1] if name == "attention" else sites, 2)
        records = tinyjax.fit(loss_fn, params, [batch] * STEPS, OPTIMIZER, SCHEDULE, KEY, sites=sites, num_neurons=1)
        for record in records:
            if record.step == SAVED:
                tinyjax.save(folder / name, record, key=KEY)
        losses[name] = float(record.loss)
        print(name, record.width, losses[name])
    (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
