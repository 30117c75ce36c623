"""Reports of a run: plain numbers, one line, a bar with the time left; the records themselves pass unchanged."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax
from tinyjax.training import reporting


def info(names=("a", "b"), **changes):
    """A growth of sites of four slots; `b` is a stack of two layers."""
    shapes = {"a": (), "b": (2,)}
    fields = {field: {name: jnp.ones(shapes[name]) for name in names} for field in tinyjax.GrowthInfo._fields}
    for field in ("written", "filled", "status", "width", "gain_achieved"):
        fields[field] = {name: jnp.asarray(1) for name in names}
    fields["born"] = {name: jnp.ones(4, bool) for name in names}
    return tinyjax.GrowthInfo(**fields | changes)


def record(step, growth=None, loss=0.5):
    width = {"a": 3, "b": 4}
    return tinyjax.Record(step, jnp.float32(loss), growth, width, {}, (), tinyjax.Sites([]), None, ())


def grown(**changes):
    status = {"a": jnp.asarray(tinyjax.Status.GROWN), "b": jnp.asarray(tinyjax.Status.REJECTED)}
    return info(status=status, written={"a": jnp.asarray(1), "b": jnp.asarray(0)}, **changes)


def test_a_summary_is_json_with_everything_but_the_slots():
    row = tinyjax.training.summary(
        record(7, grown(psi_before={"a": jnp.float32(jnp.nan), "b": jnp.array([1.0, jnp.inf])}))
    )
    back = json.loads(json.dumps(row, allow_nan=False))
    assert back["step"] == 7 and back["loss"] == 0.5 and back["width"] == {"a": 3, "b": 4}
    assert set(back["growth"]["a"]) == set(tinyjax.GrowthInfo._fields) - {"born", "width"}
    assert back["growth"]["a"]["status"] == "grown" and back["growth"]["b"]["status"] == "rejected"
    assert back["growth"]["a"]["psi_before"] is None and back["growth"]["b"]["psi_before"] == [1.0, None]
    assert "growth" not in tinyjax.training.summary(record(7))


def test_sites_that_were_skipped_are_left_out():
    status = {"a": jnp.asarray(tinyjax.Status.SKIPPED), "b": jnp.asarray(tinyjax.Status.DEAD_INPUTS)}
    row = tinyjax.training.summary(record(7, info(status=status)))
    assert list(row["growth"]) == ["b"] and row["growth"]["b"]["status"] == "dead_inputs"


def test_a_line():
    assert tinyjax.training.log_line(record(7, loss=jnp.nan)) == "step=7 loss=nan width=a:3,b:4"
    assert (
        tinyjax.training.log_line(record(20, grown()))
        == "step=20 loss=0.5 width=a:3,b:4 grown=a:+2,b:+1 status=a:grown,b:rejected fell=2"
    )


class Clock:
    """A time that passes by so many seconds a look."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def monotonic(self):
        self.now += self.seconds
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_gets_a_line_a_growth_and_one_every_ten_seconds(monkeypatch):
    monkeypatch.setattr(reporting, "time", Clock(4.0))
    out, log = io.StringIO(), io.StringIO()
    records = [record(i, grown() if i == 3 else None) for i in range(1, 9)]
    assert list(tinyjax.progress(records, 8, out=out, log=log)) == records
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["step=1", "step=3", "step=6", "step=8"]
    assert lines[2].endswith(" time=20s left=8s") and lines[1].count("grown=") == 1
    rows = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 6, 8] and "growth" in rows[1]


def test_a_terminal_has_a_bar_and_lines_of_growths(monkeypatch):
    monkeypatch.setattr(reporting, "time", Clock(100.0))
    out = Terminal()
    list(tinyjax.progress([record(11), record(12, grown()), record(13)], 20, out=out))
    shown = out.getvalue().split("\r\x1b[K")
    assert "[################..............] 11/20" in shown[1]
    assert shown[2].startswith("step=12 ") and shown[2].endswith("\n")
    assert shown[4].startswith("[###################...........] 13/20 time=3m20s left=11m40s")
    assert out.getvalue().endswith("\n")


def test_without_a_total_steps_are_counted():
    out = Terminal()
    list(tinyjax.progress([record(1)], out=out))
    assert "step 1" in out.getvalue() and "left" not in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (75, "1m15s"), (3599.6, "1h00m"), (7322, "2h02m")])
def test_durations(seconds, text):
    assert reporting._duration(seconds) == text


def test_a_run_reports_itself():
    """End to end: `fit`'s own records, to a log."""
    rng = np.random.default_rng(0)
    batch = {"x": jnp.asarray(rng.normal(size=(16, 3)))}
    loss = lambda p, b: jnp.mean((jnp.tanh(b["x"] @ p["w"]) @ p["u"]) ** 2)  # noqa: E731
    params = {"w": jnp.asarray(rng.normal(size=(3, 6))), "u": jnp.asarray(rng.normal(size=(6, 2)))}
    sites = tinyjax.find_sites(loss, params, batch)
    records = tinyjax.fit(
        loss, tinyjax.thin(params, sites, 2), [batch] * 3, tinyjax.with_birth(optax.sgd(0.1)),
        tinyjax.every(2, 2, final=6), jax.random.key(0), num_neurons=2, growth_samples=16,
        method=tinyjax.methods.random0, update=None, fill=None,
    )  # fmt: skip
    log = io.StringIO()
    assert [r.step for r in tinyjax.progress(records, 3, out=io.StringIO(), log=log)] == [1, 2, 3]
    rows = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(row["step"], row["width"]["w"]) for row in rows] == [(1, 4), (3, 6)]
    assert rows[0]["growth"]["w"]["written"] == 2 and rows[0]["growth"]["w"]["finite_loss"] is True
