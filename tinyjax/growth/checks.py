"""What `make_grow_step` refuses before anything is traced."""

from collections.abc import Mapping
from typing import Any

from jax.core import Tracer

from tinyjax.core.kernels import require_growable
from tinyjax.core.site import Sites
from tinyjax.core.whole_numbers import whole_number
from tinyjax.growth.line_searches import searches
from tinyjax.growth.site_growth import Amplitude
from tinyjax.methods import Method, is_function_preserving


def by_name(sites: Sites, value: Any, what: str) -> dict[str, Any]:
    """One value a site, from one for all or by name."""
    if not isinstance(value, Mapping):
        return {name: value for name in sites.names}
    unknown = [name for name in value if name not in sites.names]
    if unknown:
        known = ", ".join(f"`{name}`" for name in sites.names) or "none"
        raise ValueError(f"`{what}` names the unknown site `{unknown[0]}`; this grow_step has {known}")
    return dict(value)


def require_counts(sites: Sites, counts: Mapping[str, Any]) -> dict[str, int]:
    """The static number of neurons of every site, or a ValueError unless it is at least 1."""
    found = {}
    for site in sites:
        if site.name not in counts:
            raise ValueError(f"`num_neurons` has no entry for site `{site.name}`")
        what = f"`num_neurons` of site `{site.name}`"
        found[site.name] = whole_number(counts[site.name], what, least=1, clause="an int of at least 1")
    return found


def check_static(
    sites: Sites, counts: Mapping[str, Any], method: Method, amplitude: Amplitude | None, fill: Method | None
) -> dict[str, int]:
    """The number of neurons by site, or a ValueError for choices that do not go together."""
    if not sites:
        raise ValueError("`sites` is empty: there is nothing to grow. Print `find_sites(...)` to see why")
    counts = require_counts(sites, counts)
    for site in sites:
        require_growable(site)
        k = counts[site.name]
        if k > site.capacity:
            raise ValueError(
                f"`num_neurons` of site `{site.name}` is {k}, more than its {site.capacity} slots; `resize` it first"
            )
    if amplitude is not None and searches(amplitude) and is_function_preserving(method):
        name = getattr(method, "__name__", repr(method))
        raise ValueError(
            f"`{name}` keeps the function, so the loss is the same at every amplitude and a line search would find "
            "nothing; leave `amplitude` out, or scale the neurons with `normalized`"
        )
    for what, choice in (("method", method), ("fill", fill), ("amplitude", amplitude)):
        if choice is not None and not callable(choice):
            room = "growth" if what == "amplitude" else "methods"
            raise ValueError(f"`{what}` must be a function, such as `tinyjax.{room}.{choice}`; got {choice!r}")
    if fill is not None and not is_function_preserving(fill):
        raise ValueError("`fill` must keep the function (`random0` does): it is written without a line search")
    return counts


def check_wanted(wanted: Mapping[str, Any], counts: Mapping[str, int]) -> None:
    """Raises a ValueError for what is wrong whatever the parameters are."""
    for name, k in wanted.items():
        if not isinstance(k, Tracer) and not 0 <= whole_number(k, f"`neurons` of site `{name}`") <= counts[name]:
            raise ValueError(
                f"`neurons` asks for {k} at site `{name}`; this grow_step was made for 0 .. {counts[name]}"
            )
