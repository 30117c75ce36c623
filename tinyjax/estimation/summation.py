"""From captured arrays to the record of sums of one site: what all kinds share, and what each of them brings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.kernels import consumers_have_bias, matrices, producers_have_bias
from tinyjax.core.neurons import Pattern
from tinyjax.core.params import Params
from tinyjax.core.site import Site
from tinyjax.core.slots import width
from tinyjax.discovery.paths.path import Path
from tinyjax.estimation.recording import Captured
from tinyjax.methods.solvers.best_update import Ridge
from tinyjax.statistics.convolution.image_sums import Projection
from tinyjax.statistics.record import Statistics
from tinyjax.statistics.sums import USUAL, Extras, Sums, negated


class SitePass(NamedTuple):
    """What a pass over some samples has of one site, and what is asked of it.

    Attributes:
        params: the parameters.
        site: the site.
        paths: the ways through it; the rows of a leaf that is used twice are added.
        captured: what they captured.
        num_samples: of the pass.
        extras: what to sum besides the usual.
        given: what new neurons are given: gates (*stack, B, C) of gated units, the `Pattern` of new heads. Without, the
            record is that of units whose gate is 1, of a head that attends uniformly.
        update: what N is projected against where no `link` is formed; None: the best one of these samples.
        project: the ridge of the update that convolutions project N against at once, forming no `link`, nor N~.
    """

    params: Params
    site: Site
    paths: Sequence[Path]
    captured: Captured
    num_samples: int
    extras: Extras = USUAL
    given: Array | Pattern | None = None
    update: Projection | None = None
    project: Ridge | None = None


def added(at: SitePass, parts: Sequence[Sums]) -> tuple[Sums, dict[str, Any]]:
    """The sums of all paths."""
    if len(parts) > 1 and any(part.link is None for part in parts):
        raise ValueError(f"site `{at.site.name}` is too wide for a kernel that is used {len(parts)} times")
    return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *parts), {}


def unchanged(_: SitePass, total: Sums, __: Array, ___: Array) -> tuple[Sums, dict[str, Any]]:
    """The sums as they are."""
    return total, {}


class Summation(NamedTuple):
    """How a kind of site is summed: a kind has one, in the file that bears its name.

    Attributes:
        sums: those of one path.
        join: from the sums of the paths to those of the site, and other fields of its record.
        finish: from these sums and the weights before and behind to what the record holds, and other fields of it.
        search: finds what new neurons are given, for kinds whose neurons are given something: called with the loss,
            parameters, some samples, the sites of the kind and how many neurons by name.
        is_wide: whether the `link` of a path would be too large, so that all samples must pass before N is projected.
    """

    sums: Callable[[SitePass, Any], Sums]
    join: Callable[[SitePass, Sequence[Sums]], tuple[Sums, dict[str, Any]]] = added
    finish: Callable[[SitePass, Sums, Array, Array], tuple[Sums, dict[str, Any]]] = unchanged
    search: Callable[..., Mapping[str, Array | Pattern]] | None = None
    is_wide: Callable[[Any], bool] = lambda _: False


def summed(summation: Summation, at: SitePass) -> Statistics:
    """The record of a site from what its paths captured.

    Raises:
        ValueError: for a kernel used more than once at a site too wide for its `link` to be kept.
    """
    site, slopes = at.site, [path.slope() for path in at.paths]
    parts = [summation.sums(at, path) for path in at.paths]
    falls = [not path.signed and slope is not None and slope < 0 for path, slope in zip(at.paths, slopes)]
    parts = [negated(part) if falling else part for part, falling in zip(parts, falls)]
    total, others = summation.join(at, parts)
    weight_prev, weight = matrices(at.params, site)
    total, more = summation.finish(at, total, weight_prev, weight)
    weight_prev, dtype = more.pop("weight_prev", weight_prev), total.energy.dtype
    return Statistics(
        count=jnp.broadcast_to(sample_counts(at.num_samples, dtype), (*site.stack, 2)),
        **vars(total),
        **others,
        **more,
        weight_prev=weight_prev.astype(dtype),
        weight=weight.astype(dtype),
        width=jnp.broadcast_to(width(at.params, site), site.stack),
        bias_prev=producers_have_bias(site),
        bias=consumers_have_bias(site),
        gates=at.given,
        slope=slopes[0] if len(set(slopes)) == 1 else None,
    )


def sample_counts(num_samples: int, dtype: Any) -> Array:
    """How many samples are even, and odd."""
    return jnp.array([(num_samples + 1) // 2, num_samples // 2], dtype)
