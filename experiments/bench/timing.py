"""Medians of programs that run in turns in one process, and what a line of a benchmark says about where it ran."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.paper.cost import interleaved


def medians(programs: Mapping[str, tuple[Any, tuple[Any, ...]]], repeats: int) -> dict[str, float]:
    """Milliseconds of every program, the first round (which compiles) left out."""
    return {name: 1e3 * float(np.median(seconds)) for name, seconds in interleaved(dict(programs), repeats).items()}


def temporary_mib(compiled: Any) -> float:
    """The temporary memory of a compiled program, in MiB."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def where() -> dict[str, Any]:
    """Device and version, for every line."""
    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
