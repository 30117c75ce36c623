"""Where a network is stuck: the expressivity bottleneck of every hidden layer, from one batch.

For each site the table says how much of what the loss asks for (mean |V_goal|^2) no change of the existing weights can
give, and how much of that new neurons would give on samples they were not computed from.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from tinyjax.core.kernels import require_growable
from tinyjax.core.kinds import ATTENTION_HEADS
from tinyjax.core.params import Params
from tinyjax.core.shared_programs import shared
from tinyjax.core.site import Site, Sites, as_sites
from tinyjax.core.stacks import map_layers
from tinyjax.discovery.dimensions.loss_form import require_mean_in_parts
from tinyjax.discovery.sites import find_sites
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.conv_squares import bounded_squares
from tinyjax.estimation.estimator import estimate_batch
from tinyjax.estimation.options import SumOptions
from tinyjax.methods import (
    Squares,
    best_update,
    bottleneck,
    held_out_gain,
    held_out_ridge,
    held_out_update,
    orthonormal,
    tiny,
)
from tinyjax.statistics.record import Statistics
from tinyjax.surgery import Trainable, all_params, frozen_leaves
from tinyjax.surgery.frozen import mark_frozen, require_unfrozen


class Finding(NamedTuple):
    """What `diagnose` says of one site; numbers are summed over the layers of a stack.

    Attributes:
        site: the hidden dimension.
        width: used slots.
        asked: mean |V_goal|^2 at the consumer.
        psi: the bottleneck: what the best update of the consumer leaves of it (proposition 3.1, exact).
        share: psi / asked, between 0 and 1.
        gain: what new neurons take away from psi on held-out samples, as a share of `asked`; negative when the batch
            is too small to say. In front of a convolution, at the amplitude that is best on the other half.
    """

    site: Site
    width: int
    asked: float
    psi: float
    share: float
    gain: float


class Diagnosis(NamedTuple):
    """The findings of all growable sites and the sites that cannot grow; printing gives a table.

    Attributes:
        findings: by site name.
        refused: sites that cannot grow, with their reasons.
        loss: of the batch.
    """

    findings: Mapping[str, Finding]
    refused: Sites
    loss: float

    def __str__(self) -> str:
        rows = [("site", "width", "asked", "bottleneck", "share", "held-out gain")]
        rows += [
            (
                name,
                f"{f.width} of {f.site.capacity}",
                f"{f.asked:.3g}",
                f"{f.psi:.3g}",
                f"{f.share:.1%}",
                f"{f.gain:+.1%}",
            )
            for name, f in self.findings.items()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in rows
        ]
        lines += [f"{site.name}: cannot grow, {site.reason}" for site in self.refused]
        return "\n".join([f"loss {self.loss:.4g}", *lines])


def diagnose(
    loss_fn: Callable[..., Any],
    params: Params,
    batch: Any,
    *,
    sites: Sites | Sequence[Site] | Site | None = None,
    num_neurons: int = 8,
    optimizer: Any = None,
    trainable: Trainable = all_params,
    has_aux: bool = False,
) -> Diagnosis:
    """The expressivity bottleneck of every hidden layer.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, the mean over the samples of the batch.
        params: the parameters.
        batch: the more samples the better; a few times the largest layer input is plenty.
        sites: what to look at; default: every site, those that cannot grow with their reasons.
        num_neurons: how many new neurons the held-out gain is for; of whole heads at most as many as there are slots.
        optimizer: the Optax optimizer of the run: sites whose neurons are read by a leaf that it never moves (frozen by
            `set_to_zero`, masks, labels) cannot grow.
        trainable: the part of the parameters that the optimizer sees; the rest is frozen too.
        has_aux: whether `loss_fn` returns `(loss, aux)`.

    Returns:
        A `Diagnosis`; `print` it.

    Raises:
        ValueError: as `find_sites`; for a loss that sums over the samples; of the sites in `sites`, for one that cannot
            grow.

    Example:
        >>> diagnosis = tinyjax.diagnose(loss_fn, params, batch)
        >>> print(diagnosis)  # doctest: +ELLIPSIS
        loss ...
        site         width  asked  bottleneck  share  held-out gain
        hidden_1   4 of 12 ...

    Reference: Verbockhaven et al., TMLR 2024, definition 3.1, propositions 3.1 and 3.2.
    """
    frozen = frozen_leaves(params, optimizer, trainable)
    if sites is None:
        sites = mark_frozen(find_sites(loss_fn, params, batch, has_aux=has_aux), frozen)
    else:
        sites = as_sites(sites)
        require_unfrozen(sites, frozen)
        for site in sites:
            require_growable(site)
    require_mean_in_parts(partial(TracedLoss(loss_fn, has_aux).trace, params), batch)
    growable = sites.growable
    refused = Sites(site for site in sites if not site.growable)
    if not growable:
        return Diagnosis({}, refused, float(TracedLoss(loss_fn, has_aux)(params, batch)))

    # New heads are searched for in the slots of the old ones.
    counts = {
        site.name: min(num_neurons, site.capacity) if site.kind == ATTENTION_HEADS else num_neurons for site in growable
    }

    measure = shared(
        ("diagnosis", loss_fn, growable, counts, has_aux),
        lambda: jax.jit(partial(_measure, loss_fn, growable, counts, has_aux)),
    )
    loss, summaries = jax.device_get(measure(params, batch))
    findings = {}
    for site in growable:
        used, asked, psi, gain = summaries[site.name]
        total = float(np.sum(asked))
        scale = 1 / total if total > 0 else 0.0
        findings[site.name] = Finding(
            site, int(np.max(used)), total, float(np.sum(psi)), float(np.sum(psi)) * scale, float(np.sum(gain)) * scale
        )
    return Diagnosis(findings, refused, float(loss))


def _measure(
    loss_fn: Callable[..., Any], sites: Sites, counts: Mapping[str, int], has_aux: bool, params: Params, batch: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """The loss and the summary of every site."""
    loss = TracedLoss(loss_fn, has_aux)
    found = estimate_batch(loss, params, batch, sites, SumOptions(num_gates=counts))
    squares = bounded_squares(loss, params, batch, sites)
    summaries = {}
    for site in sites:
        summary = map_layers(site, partial(_summary, counts[site.name], squares.get(site.name)))
        summaries[site.name] = summary(found.statistics[site.name])
    return found.loss, summaries


def _summary(num_neurons: int, squares: Squares | None, statistics: Statistics) -> tuple[jax.Array, ...]:
    statistics, _ = orthonormal(statistics)
    # Neurons are fitted on halves: half of the samples ask for twice the ridge.
    ridge, update_ridge = 2 * held_out_ridge(statistics), 2 * held_out_update(statistics)

    def fit(half: Statistics) -> tuple[Any, jax.Array]:
        delta = best_update(half, ridge=update_ridge)
        return tiny(half, num_neurons=num_neurons, ridge=ridge, update_ridge=update_ridge), delta

    exact = bottleneck(statistics)
    return statistics.width, exact.before, exact.after, held_out_gain(statistics, fit, squares)
