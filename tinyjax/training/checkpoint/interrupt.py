"""Ctrl-C that waits for the end of the step."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into an answer, so that a loop can finish its step, save, and say how to go on.

    A second Ctrl-C interrupts at once. Use it in the main thread: Python delivers signals nowhere else.

    Yields:
        `stopped()`: whether Ctrl-C was pressed.

    Example:
        >>> with tinyjax.stop_on_interrupt() as stopped:
        ...     for record in run:
        ...         if record.step % 100 == 0 or stopped():
        ...             tinyjax.save("run", record, key=key)
        ...         if stopped():
        ...             raise SystemExit(f"stopped after step {record.step}; `--resume` goes on")
    """
    pressed = False

    def note(signum: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
