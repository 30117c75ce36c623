"""Which leaf of the parameters a leaf of an optimizer's state, or of a tree shaped like the parameters, belongs to.

An optimizer may see only a part of the parameters (`trainable`), and wraps its own containers around trees shaped like
that part. So a state leaf belongs to the trained leaf whose path its own path ends with.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import jax

from tinyjax.core.params import Params, named_leaves

Trainable = Callable[[Params], Params]


@runtime_checkable
class Initialiser(Protocol):
    """What `resize` and `restore` need of an optimizer: an Optax `GradientTransformation` has it."""

    @property
    def init(self) -> Callable[[Any], Any]: ...  # noqa: D102


def all_params(params: Params) -> Params:
    """The default `trainable`: all parameters.

    Example:
        >>> tinyjax.surgery.all_params(params) is params
        True
    """
    return params


def trained_names(trainable: Trainable, params: Params) -> dict[str, str]:
    """Paths of the trained leaves, each with the path of the same leaf in the full parameters.

    Args:
        trainable: picks the trained part of the parameters; it may rearrange leaves but not compute new ones.
        params: the full parameters.

    Returns:
        Path in `trainable(params)` -> path in `params`.

    Raises:
        ValueError: when `trainable` computes a leaf instead of picking it.
    """
    found: dict[str, str] = {}

    def match(params: Params) -> None:
        # Traced leaves are distinct objects even where the same array sits at two paths.
        names = {id(leaf): name for name, leaf in named_leaves(params).items()}
        for name, leaf in named_leaves(trainable(params)).items():
            if id(leaf) not in names:
                raise ValueError(f"`trainable` must pick leaves of the parameters, but it computed `{name}`")
            found[name] = names[id(leaf)]

    jax.eval_shape(match, params)
    return found


def owner(path: str, names: Iterable[str]) -> str | None:
    """The longest of `names` that `path` ends with, or None."""
    ends = [name for name in names if name in ("", path) or path.endswith(f"/{name}")]
    return max(ends, key=len, default=None)
