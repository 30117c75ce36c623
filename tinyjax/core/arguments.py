"""Arguments that are given once for all sites or by name, and their checks."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import jax
from jax.core import Tracer

from tinyjax.core.params import Params
from tinyjax.core.site import Sites

T = TypeVar("T")


def per_site(sites: Sites, values: "T | Mapping[str, T]") -> dict[str, T]:
    """One value a site from a single value for all or a mapping by name; unknown names are errors."""
    if not isinstance(values, Mapping):
        return dict.fromkeys(sites.names, values)
    require_names(sites, values)
    return dict(values)


def require_names(sites: Sites, names: Iterable[str]) -> None:
    """Raises a ValueError for a name that is no site's."""
    for name in names:
        if name not in sites.names:
            known = ", ".join(f"`{s}`" for s in sites.names) or "none"
            raise ValueError(f"no site `{name}`; the sites are {known}")


def require_concrete(params: Params, what: str) -> None:
    """Raises a ValueError when called while tracing: shapes cannot depend on traced values."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError(f"{what} depends on which slots are free: call it on concrete arrays, outside `jit`")
