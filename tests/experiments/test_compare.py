"""The comparison of methods: what it counts, what it runs, what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.beyond import compare, compare_resnet
from tinyjax.training.cost_model import flops


def test_products_and_convolutions_are_counted():
    assert flops(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 5))) == 2 * 2 * 3 * 5
    assert flops(jax.vmap(lambda a, b: a @ b), jnp.ones((7, 2, 3)), jnp.ones((7, 3, 5))) == 7 * 60

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    outputs = 2 * 3 * 3 * 5  # 8x8 images, 3x3 kernels, stride 2
    assert flops(convolve, jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 5))) == 2 * outputs * 9 * 4


def test_loops_count_their_rounds_and_conditionals_their_dearest_branch():
    x = jnp.ones((4, 4))
    square = 2 * 4**3

    def scanned(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=10)[0]

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    def looped(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 100, lambda x: x @ x, x)

    assert flops(jax.jit(scanned), x) == 10 * square
    assert flops(either, x) == 2 * square
    assert flops(looped, x) == 2 * square
    assert flops(jnp.linalg.cholesky, x) == pytest.approx(4**3 / 3)
    assert flops(jax.grad(lambda x: jnp.sum(x @ x)), x) == 3 * square


def test_runs_share_steps_and_data_and_end_at_the_final_width(tmp_path):
    config = compare.Config(
        ("digits",), ("random0",), start=2, final=4, growths=1, epochs=2, seeds=(0,), record_every=1
    )
    rows = list(compare.measure(config))
    assert [(row["run"], row["epoch"]) for row in rows] == [
        (name, epoch) for name in ("random0", "fixed", "fixed + dW*") for epoch in (1, 2)
    ]
    last = {row["run"]: row for row in rows}
    assert last["random0"]["parameters"] == 64 * 4 + 4 + 4 * 4 + 4 + 4 * 10  # all but the last bias
    assert len({row["step"] for row in last.values()}) == 1
    assert len({row["parameters"] for row in last.values()}) == 1
    # A forward and a backward pass are three products a layer, but the first layer's input has no gradient.
    per_step = 2 * config.batch_size * (2 * 64 * 4 + 3 * 4 * 4 + 3 * 4 * 10)
    assert last["fixed"]["gflop"] * 1e9 == last["fixed"]["step"] * per_step
    assert last["fixed"]["gflop"] < last["random0"]["gflop"] and last["fixed"]["gflop"] < last["fixed + dW*"]["gflop"]
    compare.draw(rows).savefig(tmp_path / "figure.png")


def test_the_fixed_twin_is_read_off_at_the_flops_of_the_grown_run():
    def row(run, seed, epoch, gflop, test):
        values = dict(part="run", task="digits", run=run, seed=seed, epoch=epoch, gflop=gflop, test=test)
        return values | {"validation": test}

    rows = [
        row(run, seed, epoch, gflop, accuracy + seed / 100)
        for seed in (0, 1)
        for run, measured in {
            "tiny0": [(1.0, 0.5), (2.5, 0.9)],
            "fixed": [(1.0, 0.4), (2.0, 0.7), (3.0, 0.95)],
        }.items()
        for epoch, (gflop, accuracy) in enumerate(measured)
    ]
    stopped = compare.final_rows(rows, "digits")[compare.EQUAL_FLOPS]
    assert [line["gflop"] for line in stopped] == [2.0, 2.0]
    np.testing.assert_allclose([line["test"] for line in stopped], [0.7, 0.71])
    (finding,) = compare.findings(rows)
    assert "tiny0 90.50 ± 0.71 (minus fixed -5.00 ± 0.00; 2.5 GFLOP)" in finding.ours
    assert finding.ours.endswith(f"; tiny0 minus fixed -5.00 ± 0.00; tiny0 minus {compare.EQUAL_FLOPS} +20.00 ± 0.00")
    assert finding.verdict == f"below fixed by more than two standard errors: tiny0, {compare.EQUAL_FLOPS}"


@pytest.mark.slow
def test_a_resnet_is_compared_in_the_same_rows(tmp_path):
    config = compare_resnet.PRESETS["smoke"]
    rows = list(compare_resnet.measure(config))
    assert [row["run"] for row in rows] == ["gradmax", "fixed", "fixed + dW*"]
    assert len({row["step"] for row in rows}) == len({row["parameters"] for row in rows}) == 1
    last = {row["run"]: row["gflop"] for row in rows}
    assert last["fixed"] < last["gradmax"] and last["fixed"] < last["fixed + dW*"]
    (finding,) = compare_resnet.EXPERIMENT.findings(rows)
    assert finding.item == "Methods compared, digits, thin ResNet-18"
    compare_resnet.EXPERIMENT.draw(rows).savefig(tmp_path / "figure.png")
