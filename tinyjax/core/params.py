"""Parameter trees by the names of their leaves."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jaxtyping import Array

Params = Any


def path_name(path: tuple[Any, ...]) -> str:
    """Name of a key path: `"params/Dense_0/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(params: Params) -> dict[str, Array]:
    """The leaves of a parameter tree by path.

    Raises:
        ValueError: two leaves have one path: `{"a": {"b": ...}, "a/b": ...}`.
    """
    leaves: dict[str, Array] = {}
    paths: dict[str, tuple[Any, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        if name in leaves:
            first, second = (jax.tree_util.keystr(p) for p in (paths[name], path))
            raise ValueError(
                f"two leaves have the path `{name}`: {first} and {second}. Paths join the keys of a leaf by `/`, so "
                "rename one of these keys"
            )
        leaves[name], paths[name] = leaf, path
    return leaves


def replace_leaves(params: Params, new: Mapping[str, Any]) -> Params:
    """The tree with the leaves named in `new` replaced."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get(path_name(path), leaf), params)


def require_leaves(params: Params, names: Iterable[str]) -> dict[str, Array]:
    """The named leaves; a name that is not there is an error that says which site needs it."""
    leaves = named_leaves(params)
    missing = [name for name in names if name not in leaves]
    if missing:
        raise ValueError(
            f"these parameters have no leaf `{missing[0]}`: they are not the tree that the sites were found in. "
            "Call `find_sites` on the tree you grow."
        )
    return {name: leaves[name] for name in names}
