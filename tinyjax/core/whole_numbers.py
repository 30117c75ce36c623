"""Whole numbers as they are passed in: of neurons, slots, samples and steps."""

from numbers import Real
from typing import Any

import numpy as np
from jax.core import Tracer


def whole_number(value: Any, what: str, *, least: int | None = None, clause: str = "") -> int:
    """A whole number as an int, whoever made it (NumPy, JAX).

    Args:
        value: what was passed.
        what: its name in the message, with what it is of.
        least: the smallest that is right; None for any.
        clause: what the message asks for; default: from `least`.

    Raises:
        ValueError: for a fraction, a truth value, a text, a traced value or anything else, or below `least`.
    """
    asked = clause or ("an int" if least is None else f"an int of at least {least}")
    if isinstance(value, Tracer):
        raise ValueError(f"{what} must be {asked}, got a traced value: it must be known at trace time")
    array: Any = value if isinstance(value, Real) else np.asarray(value)
    if isinstance(array, np.ndarray) and array.ndim == 0:
        array = array[()]  # a scalar of NumPy's or JAX's
    is_number = isinstance(array, Real) and not isinstance(array, bool | np.bool_)
    number = round(float(array)) if is_number and np.isfinite(float(array)) else None
    if number is None or number != array:
        raise ValueError(f"{what} must be {asked}, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{what} must be {clause or f'at least {least}'}, got {number}")
    return number
