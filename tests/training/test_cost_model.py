"""The cost model: counted from traces, seconds from a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyjax.training.cost_model import LANES, OVERHEAD, WHILE_ROUNDS, Work, calibrate, seconds, total, work
from tinyjax.training.schedules.basic import every
from tinyjax.training.schedules.limits import budget


def test_operations_that_are_started_are_counted_and_views_are_free():
    x = jnp.ones((4, 8), jnp.float32)
    assert work(lambda x: x + x, x) == Work(0, 0, 1)
    assert work(lambda x: x.reshape(8, 4), x) == Work(0, 0, 0)
    assert work(lambda x: x @ x[0], x).operations == 2 * 4 * 8
    once = work(lambda x: x * 2.0, x)
    scanned = work(lambda x: jax.lax.scan(lambda c, _: (c * 2.0, None), x, length=10)[0], x)
    assert scanned.calls == 10 * once.calls
    doubled = work(lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c * 2.0, x), x)
    assert doubled.calls == WHILE_ROUNDS * (once.calls + 2)  # the condition: a slice, a comparison

    def calls(*branches):
        return work(lambda i: jax.lax.switch(i, branches, x), 0).calls

    def short(x):
        return x

    def long(x):
        return x * x * x

    assert calls(short, long) == calls(long, short) == calls(short, short) + 2


@pytest.mark.parametrize("channels", [3, LANES, LANES + 1])
def test_channels_of_convolutions_fill_vectors(channels):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    done = work(convolve, jnp.ones((2, 5, 5, 4)), jnp.ones((3, 3, 4, channels)))
    assert done.operations == 2 * 2 * 25 * 9 * 4 * channels
    assert done.vectorised == 2 * 2 * 25 * 9 * 4 * LANES * (1 if channels <= LANES else 2)


def test_a_run_gives_the_rate_and_the_rate_gives_the_run():
    parts = [Work(1e9, 2e9, 100), Work(2e7, 2e7, 5000)]
    rate = calibrate(parts[0], 0.3)
    np.testing.assert_allclose(rate, 0.3 / (2e9 + 100 * OVERHEAD))
    np.testing.assert_allclose(seconds(rate, parts[0]), 0.3)
    whole = total([(parts[0], 7), (parts[1], 2)])
    np.testing.assert_allclose(seconds(rate, whole), 7 * seconds(rate, parts[0]) + 2 * seconds(rate, parts[1]))


@pytest.mark.parametrize(("done", "taken"), [(Work(1.0, 1.0, 1.0), 0.0), (Work(0.0, 0.0, 0.0), 1.0)])
def test_a_calibration_run_does_something_in_some_time(done, taken):
    with pytest.raises(ValueError, match="needs work and a positive time"):
        calibrate(done, taken)


def test_a_schedule_is_held_to_seconds():
    schedule = budget(every(1, 4, final=9), lambda widths: seconds(1e-3, Work(0, 100 * widths["a"], 0)), limit=0.5)
    assert schedule(1, {"a": 3}) == {"a": 2}
