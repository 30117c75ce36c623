"""A growing run whose batches and parameters lie on a mesh; alone, or as one of several processes.

python tests/support/distributed_run.py FOLDER HOST:PORT PROCESSES PROCESS
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tinyjax

STEPS = 5


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"] + params["b"]) @ params["u"] + params["c"] - batch["t"]) ** 2)


def init(dtype=float):
    rng = np.random.default_rng(0)
    shapes = {"w": (5, 8), "b": (8,), "u": (8, 3), "c": (3,)}
    return {name: jnp.asarray(rng.normal(size=shape) / 2, dtype) for name, shape in shapes.items()}


def make_batches(dtype=float, samples=20):
    """20 samples a batch: three quarters of the two that a growth sees are 30, and cut across the devices."""
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        x = rng.normal(size=(samples, 5))
        yield {"x": x.astype(dtype), "t": np.sin(2 * x[:, :3]).astype(dtype)}


def run(place_params, place_batch, dtype=float):
    """3 -> 7 of 8 neurons by `tiny`, whose amplitude is searched."""
    params, optimizer = init(dtype), tinyjax.with_birth(optax.adam(1e-2))
    batches = list(make_batches(dtype))
    sites = tinyjax.find_sites(loss_fn, params, batches[0])
    return list(
        tinyjax.fit(
            loss_fn,
            place_params(tinyjax.thin(params, sites, 3)),
            map(place_batch, batches),
            optimizer,
            tinyjax.every(2, 2, final=7),
            jax.random.key(0),
            sites=sites,
            num_neurons=2,
            growth_samples=40,
            method=tinyjax.methods.tiny,
            fill=None,
        )
    )


def main(folder, coordinator, processes, process):
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(coordinator, processes, process)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    spread, copied = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def place_batch(batch):
        """Every process holds its own rows."""
        rows = len(batch["x"]) // processes
        mine = {name: x[process * rows : (process + 1) * rows] for name, x in batch.items()}
        return {name: jax.make_array_from_process_local_data(spread, x) for name, x in mine.items()}

    for record in run(lambda params: jax.device_put(params, copied), place_batch):
        tinyjax.save(folder, record, key=jax.random.key(0))
    print(f"{jax.process_count()} processes, {jax.device_count()} devices, {jax.local_device_count()} here")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
