"""The cost model: counted from traces, seconds from two runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyjax.brakes import budget
from tinyjax.schedule import every
from tinyjax.work import Rates, Work, calibrate, seconds, total, work


def test_bytes_are_read_and_written_and_views_are_free():
    x = jnp.ones((4, 8), jnp.float32)
    assert work(lambda x: x + x, x) == Work(0, (4 * 8 * 2 + 4 * 8) * 4)
    assert work(lambda x: x.reshape(8, 4), x) == Work(0, 0)
    assert work(lambda x: x @ x.T, x).operations == 2 * 4 * 4 * 8
    scanned = work(lambda x: jax.lax.scan(lambda c, _: (c * 2.0, None), x, length=10)[0], x)
    assert scanned.bytes == 10 * work(lambda x: x * 2.0, x).bytes


def test_two_runs_give_the_rates_and_the_rates_give_both_runs():
    true = Rates(3e-11, 2e-10)
    parts = [Work(1e9, 1e6), Work(2e7, 5e8)]
    found = calibrate(*((part, seconds(true, part)) for part in parts))
    np.testing.assert_allclose(found, true, rtol=1e-9)
    run = total([(parts[0], 7), (parts[1], 2)])
    np.testing.assert_allclose(seconds(found, run), sum(k * seconds(true, p) for k, p in zip((7, 2), parts)), rtol=1e-9)


def test_rates_are_never_negative():
    found = calibrate((Work(1e9, 1e6), 1.0), (Work(1e9, 1e9), 0.5))  # more bytes in less time
    assert min(found) >= 0 and max(found) > 0
    np.testing.assert_allclose(found.operation, 1e-9 * (1 + 2) / (1 + 4), rtol=1e-6)  # least squares in ratio


@pytest.mark.parametrize("run", [(Work(1.0, 1.0), 0.0), (Work(0.0, 0.0), 1.0)])
def test_a_calibration_run_does_something_in_some_time(run):
    with pytest.raises(ValueError, match="needs work and a positive time"):
        calibrate(run, (Work(1.0, 1.0), 1.0))


def test_a_schedule_is_held_to_seconds():
    rates = Rates(1e-3, 0)
    schedule = budget(every(1, 4, final=9), lambda widths: seconds(rates, Work(100 * widths["a"], 0)), limit=0.5)
    assert schedule(1, {"a": 3}) == {"a": 2}
