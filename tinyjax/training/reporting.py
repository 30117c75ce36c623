"""What a run says of itself while it runs: a growth in one line, a record as plain numbers, the time that is left."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import jax
import numpy as np

from tinyjax.growth.info import GrowthInfo, Status
from tinyjax.training.loop import Record

SECONDS = 10.0  # between two lines that no growth asks for
REFRESH = 0.2  # between two looks of a bar


def summary(record: Record) -> dict[str, Any]:
    """A record of `fit` as plain numbers and strings, ready for one line of JSON.

    Args:
        record: of `fit`. Its loss is waited for.

    Returns:
        `step`, `loss`, `width` by site and, after a growth, `growth`: for each site that was asked to grow, the fields
        of `GrowthInfo` but `born` and `width`, with `status` in words. What is not finite is None; what a stack of
        layers has by layer is a list.

    Example:
        >>> summary = tinyjax.training.summary(record)  # `json.dumps` takes it
        >>> summary["step"], summary["width"]
        (1, {'hidden_1': 4})
    """
    row = {"step": record.step, "loss": _plain(record.loss), "width": dict(record.width)}
    return row if record.growth is None else row | {"growth": _growth(record.growth)}


def log_line(record: Record) -> str:
    """A record of `fit` in one line of `key=value` pairs: step, loss, widths, and what its growth did.

    Example:
        >>> tinyjax.training.log_line(record)
        'step=1 loss=0.68... width=hidden_1:4'

    After a growth such as
    `step=20 loss=0.4102 width=fc1:12,fc2:12 grown=fc1:+4,fc2:+2 status=fc1:grown,fc2:rejected fell=0.0213`.
    """
    row = summary(record)
    pairs = {"step": row["step"], "loss": _short(row["loss"]), "width": _by_site(row["width"])}
    if sites := row.get("growth"):
        pairs["grown"] = _by_site({name: f"+{site['written'] + site['filled']}" for name, site in sites.items()})
        pairs["status"] = _by_site({name: site["status"] for name, site in sites.items()})
        pairs["fell"] = _short(_total(site["gain_achieved"] for site in sites.values()))
    return " ".join(f"{name}={value}" for name, value in pairs.items())


def progress(
    records: Iterable[Record],
    total: int | None = None,
    *,
    out: TextIO | None = None,
    log: TextIO | None = None,
) -> Iterator[Record]:
    """Yields the records of a run as they come, and says on the way how far it is and how long it takes.

    A growth leaves a line. On a terminal, a bar with the time left stands below; elsewhere a line is written at
    most every ten seconds.

    Args:
        records: of `fit`.
        total: the step with which the run ends, for the bar and the time left.
        out: where lines and bar go, standard error by default.
        log: a file that gets `summary` as one line of JSON for every line of `out`.

    Yields:
        The records.

    Example:
        >>> with open("log.jsonl", "a") as log:
        ...     for record in tinyjax.progress(run, total=len(batches), log=log):
        ...         last = record.loss
    """
    stream: TextIO = sys.stderr if out is None else out
    live = stream.isatty()
    clock = _Clock(total)
    shown = said = -math.inf
    record = None
    try:
        for record in records:
            now = time.monotonic()
            left = clock.tick(record.step, now)
            if record.growth is not None or record.step == total or (not live and now - said > SECONDS):
                said = now
                stream.write(f"{_CLEAR if live else ''}{log_line(record)}{'' if live else left}\n")
                if log is not None:
                    log.write(json.dumps(summary(record)) + "\n")
                    log.flush()
            if live and (now - shown > REFRESH or said == now):
                shown = now
                stream.write(f"{_CLEAR}{clock.bar(record.step)}{left}")
                stream.flush()
            yield record
    finally:
        if live and record is not None:
            stream.write("\n")
            stream.flush()


_CLEAR = "\r\x1b[K"


class _Clock:
    """How far a run is: steps are timed from the first on, which is the slow one (it compiles)."""

    def __init__(self, total: int | None):
        self._total = total
        self._first: tuple[int, float] | None = None

    def tick(self, step: int, now: float) -> str:
        """Time since the first step, and the time left if the total is known."""
        self._first = self._first or (step, now)
        first, began = self._first
        text = f" time={_duration(now - began)}"
        if self._total is not None and step > first:
            text += f" left={_duration((now - began) / (step - first) * (self._total - step))}"
        return text

    def bar(self, step: int) -> str:
        if self._total is None:
            return f"step {step}"
        done = min(30, 30 * step // max(1, self._total))
        return f"[{'#' * done}{'.' * (30 - done)}] {step}/{self._total}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def _growth(info: GrowthInfo) -> dict[str, dict[str, Any]]:
    fields = jax.device_get(info)._asdict()
    asked = [name for name, status in fields["status"].items() if status != Status.SKIPPED]
    kept = {field: values for field, values in fields.items() if field not in ("born", "width", "status")}
    return {
        name: {field: _plain(values[name]) for field, values in kept.items()}
        | {"status": Status(int(fields["status"][name])).name.lower()}
        for name in asked
    }


def _plain(value: Any) -> Any:
    """An array as numbers and lists, None for what is not finite."""
    plain = np.asarray(value).tolist()
    if isinstance(plain, list):
        return [_plain(item) for item in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _by_site(values: dict[str, Any]) -> str:
    return ",".join(f"{name}:{value}" for name, value in values.items()) or "none"


def _short(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"
