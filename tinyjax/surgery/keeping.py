"""Whether a resize kept the loss: evaluated before and after on a batch, where tracing could not tell."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyjax.core.arguments import require_concrete
from tinyjax.core.params import Params
from tinyjax.core.site import Site, Sites

LossFn = Callable[..., Any]
Check = tuple[LossFn, Any] | tuple[LossFn, Any, Callable[[dict[str, int]], LossFn] | None]
"""`(loss_fn, batch)`, or `(loss_fn, batch, make_loss)` for a model that checks shapes."""


def require_free_capacity(site: Site, capacity: int) -> None:
    """Raises a ValueError where another capacity would change the function, whatever is done to the leaves."""
    if site.fixed and capacity != site.capacity:
        raise ValueError(
            f"site `{site.name}` cannot go from {site.capacity} to {capacity} slots, the loss would change: "
            f"{site.fixed}. It can grow inside its capacity: allocate the final one at the start and `thin`; or keep "
            "the number with the model, computed once and not from the shapes of the parameters."
        )


def require_same_loss(check: Check, before: Params, after: Params, sites: Sites, capacities: Mapping[str, int]) -> None:
    """Raises a ValueError if the loss of a batch is another after a resize, naming what was resized."""
    if not (isinstance(check, tuple) and len(check) in (2, 3) and callable(check[0])):
        raise ValueError(
            f"`check` must be `(loss_fn, batch)` or `(loss_fn, batch, make_loss)`, got a {type(check).__name__}"
        )
    require_concrete((before, after), "the loss that `check` compares")
    loss_fn, batch, make_loss = check if len(check) == 3 else (*check, None)
    changed = [sites[name] for name, capacity in capacities.items() if capacity != sites[name].capacity]
    if not changed:
        return
    everywhere = {site.name: capacities.get(site.name, site.capacity) for site in sites.growable}
    old = _loss(loss_fn, before, batch)
    new = _loss(loss_fn if make_loss is None else make_loss(everywhere), after, batch)
    rounding = 1e4 * float(jnp.finfo(old.dtype).eps)
    if not np.isfinite(old) or abs(float(new) - float(old)) <= min(rounding, 0.05) * (abs(float(old)) + 1e-2):
        return
    resized = ", ".join(f"`{site.name}` from {site.capacity} to {capacities[site.name]} slots" for site in changed)
    raise ValueError(
        f"resizing {resized} changes the loss of a batch from {float(old):.8g} to {float(new):.8g}: the model holds a "
        "number that follows a capacity (a root of a width? random numbers of another shape?), or `make_loss` builds "
        "another model. Resize one site at a time to see which; it can grow inside its capacity, or keep the number "
        "with the model."
    )


def _loss(loss_fn: LossFn, params: Params, batch: Any) -> np.ndarray:
    out = jax.jit(loss_fn)(params, batch)
    return np.asarray(out[0] if isinstance(out, tuple) else out)
