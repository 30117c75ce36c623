"""What tests compile once and use many times."""

import functools
from collections.abc import Callable
from typing import Any

import jax


@functools.cache
def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function of arrays as one program: outside `jit` each of its operations would be compiled on its own."""
    return jax.jit(functools.partial(function, **options))
