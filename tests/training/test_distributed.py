"""Several devices and several processes compute what one device computes."""

import dataclasses
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tinyjax
from tests.support import distributed_run as example

LOSS = example.loss_fn
GROWN_AXIS = {"w": P(None, "data"), "b": P("data"), "u": P("data", None), "c": P()}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


def on(mesh, specs, tree):
    return {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in tree.items()}


def by_samples(mesh, batch):
    return on(mesh, dict.fromkeys(batch, P("data")), batch)


def copied(mesh, params):
    return on(mesh, dict.fromkeys(params, P()), params)


def same(got, want, tolerance):
    """Equal up to rounding of the largest entry of every array."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    for a, b in zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(jax.device_get(want))):
        scale = max(1e-3, np.abs(np.where(np.isfinite(b), b, 0)).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module")
def alone():
    return example.run(lambda params: params, lambda batch: batch)


@pytest.mark.parametrize("specs", [dict.fromkeys("wbuc", P()), GROWN_AXIS], ids=["copied", "grown_axis"])
def test_a_run_over_four_devices_is_the_run_of_one(alone, mesh, specs):
    """Statistics, line searches, solves and training; 30 and 10 samples a growth, which cut across the devices."""
    spread = example.run(partial(on, mesh, specs), partial(by_samples, mesh))
    for got, want in zip(spread, alone, strict=True):
        assert got.width == want.width
        same((got.params, got.opt_state, got.loss), (want.params, want.opt_state, want.loss), 1e-12)
        if want.growth is not None:
            same(got.growth, want.growth, 1e-12)
    assert want.width == {"w": 7}
    for name, leaf in got.params.items():
        assert len(leaf.sharding.device_set) == 4
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), leaf.ndim)


def test_float32_statistics_agree_over_four_devices(mesh):
    with jax.enable_x64(False):
        params, batch = example.init(np.float32), next(example.make_batches(np.float32, samples=400))
        sites = tinyjax.find_sites(LOSS, params, batch)

        @jax.jit
        def measure(params, batch):
            statistics = tinyjax.estimate(LOSS, params, batch, sites["w"])
            neurons = tinyjax.methods.tiny(statistics, num_neurons=4, ridge=0.0)
            psi = tinyjax.methods.bottleneck(statistics)
            shares = jnp.stack([psi.after, *psi.gains]) / psi.before  # psi's unit is |V_goal|^2: differences of it
            return statistics, psi.before, 1 + shares, neurons.singular_values

        want = measure(params, batch)
        same(measure(on(mesh, GROWN_AXIS, params), by_samples(mesh, batch)), want, 1e-5)


@pytest.mark.parametrize("samples", [12, 20])
def test_shard_map_adds_sums_and_solves_alike_on_each_device(mesh, samples):
    """Three samples a device start odd ones at even places: halves differ, sums do not."""
    batch = {name: x[:samples] for name, x in next(example.make_batches()).items()}
    params = example.init()
    sites = tinyjax.find_sites(LOSS, params, batch)
    site = sites["w"]
    params = tinyjax.thin(params, sites, 3)

    def grow(params, batch, over_devices, mean):
        statistics = over_devices(tinyjax.estimate(LOSS, params, batch, site))
        neurons = tinyjax.methods.tiny(statistics, num_neurons=2, ridge=1e-3)
        write = lambda gamma: tinyjax.surgery.write(params, site, neurons, amplitude=gamma)[0]  # noqa: E731
        found = tinyjax.growth.line_search(lambda gamma: mean(LOSS(write(gamma), batch)), dtype=neurons.alpha.dtype)
        return tinyjax.statistics.moments(statistics), write(found.amplitude), statistics.count.sum()

    def on_a_device(params, batch):
        return grow(
            params,
            batch,
            partial(tinyjax.statistics.merge_over, axis_name="data"),
            partial(jax.lax.pmean, axis_name="data"),
        )

    specs = dict(in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    got = jax.jit(jax.shard_map(on_a_device, mesh=mesh, **specs))(copied(mesh, params), by_samples(mesh, batch))
    want = jax.jit(partial(grow, over_devices=lambda x: x, mean=lambda x: x))(params, batch)
    same(got, want, 1e-12)
    assert int(got[2]) == samples and int(tinyjax.width(got[1], site)) == 5


def test_a_site_too_wide_to_be_added_is_refused(mesh):
    params, batch = example.init(), next(example.make_batches())
    statistics = tinyjax.estimate(LOSS, params, batch, tinyjax.find_sites(LOSS, params, batch)["w"])
    with pytest.raises(ValueError, match="too wide, so that its statistics cannot be added"):
        tinyjax.statistics.merge_over(dataclasses.replace(statistics, link=None), "data")


def test_convolutions_over_four_devices(mesh):
    rng = np.random.default_rng(0)
    params = {"k": jnp.asarray(rng.normal(size=(3, 3, 2, 4))), "q": jnp.asarray(rng.normal(size=(3, 3, 4, 3)))}
    batch = {"x": jnp.asarray(rng.normal(size=(12, 5, 5, 2)))}
    conv = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    loss = lambda p, b: jnp.mean(conv(jnp.tanh(conv(b["x"], p["k"])), p["q"]) ** 2)  # noqa: E731
    sites = tinyjax.find_sites(loss, params, batch)
    measure = jax.jit(lambda p, b: tinyjax.estimate(loss, p, b, sites["k"]))
    channels = {"k": P(None, None, None, "data"), "q": P(None, None, "data")}
    same(measure(on(mesh, channels, params), by_samples(mesh, batch)), measure(params, batch), 1e-12)


def test_two_processes_are_one_device(alone, tmp_path):
    """Gloo carries the sums; both save, the first one writes, and one process reads it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=2"),
        "PYTHONPATH": str(Path(tinyjax.__file__).parent.parent),
    }
    command = [sys.executable, example.__file__, str(tmp_path / "run"), f"127.0.0.1:{port}", "2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*command, str(i)], env=environment, **pipes) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (output, errors) in zip(processes, outputs):
        assert process.returncode == 0, errors
        assert "2 processes, 4 devices, 2 here" in output
    saved = tinyjax.restore(tmp_path / "run", tinyjax.with_birth(optax.adam(1e-2)), like=example.init())
    last = alone[-1]
    assert saved.step == last.step == example.STEPS
    same((saved.params, saved.opt_state), (last.params, last.opt_state), 1e-12)
    same(saved.history, jax.tree.map(np.asarray, last.history), 1e-12)
