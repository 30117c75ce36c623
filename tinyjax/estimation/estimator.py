"""From a loss and a batch to the sums of every site, in one forward and one backward pass that all sites share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Unpack, overload

from jaxtyping import Array

from tinyjax.core.arguments import per_site
from tinyjax.core.batch import batch_size, take_samples
from tinyjax.core.kernels import require_growable
from tinyjax.core.neurons import Pattern
from tinyjax.core.params import Params
from tinyjax.core.site import Site, Sites, as_sites
from tinyjax.discovery.dimensions.loss_form import coupling, require_mean, require_mean_in_parts
from tinyjax.discovery.graph.flattening import num_numbers
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.chunks import Estimate, Step, sums_in_chunks, with_thirds
from tinyjax.estimation.kinds import SUMMATIONS
from tinyjax.estimation.options import DEFAULTS, EstimateOptions, SumOptions
from tinyjax.statistics.merging import merge
from tinyjax.statistics.record import Statistics

DEFAULT_CHUNK = 1024
AT_ONCE = 2**24  # numbers that a loss may compute for its batch to be looked at in one pass: 64 MiB in float32


@overload
def estimate(
    loss_fn: Callable[..., Any],
    params: Params,
    batch: Any,
    sites: Site,
    *,
    has_aux: bool = ...,
    **options: Unpack[EstimateOptions],
) -> Statistics: ...


@overload
def estimate(
    loss_fn: Callable[..., Any],
    params: Params,
    batch: Any,
    sites: Sequence[Site],
    *,
    has_aux: bool = ...,
    **options: Unpack[EstimateOptions],
) -> dict[str, Statistics]: ...


def estimate(
    loss_fn: Callable[..., Any],
    params: Params,
    batch: Any,
    sites: Site | Sequence[Site],
    *,
    has_aux: bool = False,
    **options: Unpack[EstimateOptions],
) -> Statistics | dict[str, Statistics]:
    """The sums of `Statistics` at the current parameters.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, the mean over the samples of the batch.
        params: the parameters.
        batch: every leaf has the samples as leading axis, except 0-d leaves and typed PRNG keys that are not as many
            as the samples; or an iterator of such batches, whose sums are merged.
        sites: growable sites of this model, from `find_sites`.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
        energy_matrix: also sum v v' (as wide as the consumer; `fisher_tiny` needs it).
        offset_gram: also sum what every two kernel offsets of a consumer read together, of which S is a bound (for thin
            convolutions; `tiny_conv_als` and `conv_gains` need it).
        null_draws: R, also sum with random signs R times (`significant` needs 19). The sign of a sample follows from
            its position among all samples alone. Costs about R times N and P.
        num_gates: how many gates to look for at a site of gated units, or patterns at one of whole attention heads, in
            a pass of their own over at most `DEFAULT_CHUNK` samples: as many as units or heads are to be added. For all
            such sites or by name.
        third_moments: R, also sum (w'v) b_prev b_prev' for the R outputs w in which the residual v is largest, in a
            second pass over the batch (`second_order` needs 4).
        chunk: samples a pass, even; default at most `DEFAULT_CHUNK`, or the whole batch where the loss computes no more
            than `AT_ONCE` numbers for it or couples its samples: one capture then, in which only the sums over patches
            pass by chunks.
        micro_batch: makes the loss the mean of the losses of so many samples at a time (even; the last may be fewer),
            as accumulated gradients do: a batch normalisation sees a micro-batch, and memory does not grow with the
            batch. A remainder is compiled on its own.
        project: the ridge of the best update whose residual N is summed against, a number or a function of the record
            (which has no S and N then) such as `held_out_update`. Convolutions of a batch that passes at once then sum
            no `link`, by far the dearest of their sums, and nothing else of the usual sums changes; but only methods
            that start from the residual take such a record, and it cannot be merged. None: sum `link`.

    Returns:
        One record for a single `Site`, a dict by site name for several. Sums are float32, or float64 if the model is.

    Raises:
        ValueError: for a site that cannot grow or is not found in this model, a bad batch, a loss that is not a scalar,
            an odd `chunk` or `micro_batch`, a `chunk` for a loss that couples the samples, parts (chunks,
            micro-batches, an iterator) of a loss that sums over them, null draws for a site too wide for them, or third
            moments where they say nothing.

    Example:
        >>> estimate = jax.jit(partial(tinyjax.estimate, loss_fn, sites=sites))
        >>> statistics = estimate(params, batch)
        >>> psi = tinyjax.methods.bottleneck(statistics["hidden_1"]).after
    """
    batches = batch if isinstance(batch, Iterator) else iter((batch,))
    total: dict[str, Statistics] = {}
    unknown = sorted(set(options) - set(EstimateOptions.__annotations__))
    if unknown:
        raise TypeError(f"estimate() got an unexpected keyword argument `{unknown[0]}`")
    chosen = SumOptions(**options)
    loss, first = TracedLoss(loss_fn, has_aux), 0
    for one in batches:
        if first == 0 and isinstance(batch, Iterator):
            require_mean_in_parts(partial(loss.trace, params), one)
        found = estimate_batch(loss, params, one, sites, chosen, first=first).statistics
        first += batch_size(one)
        if total and any(s.gates is not None for s in found.values()):
            raise ValueError("gates and patterns of new heads are looked for in one batch: pass one, not an iterator")
        if total and chosen.third_moments:
            raise ValueError("third moments belong to the residual of one batch: pass one, not an iterator")
        if total and any(s.link is None for s in found.values()):
            raise ValueError(
                "statistics without `link` (a site that is too wide, or `project`) cannot be merged: pass one batch"
            )
        total = {name: merge(total[name], s) if total else s for name, s in found.items()}
    if not total:
        raise ValueError("the iterator of batches is empty" if isinstance(batch, Iterator) else "`sites` is empty")
    return total[sites.name] if isinstance(sites, Site) else total


def estimate_batch(
    loss: TracedLoss,
    params: Params,
    batch: Any,
    sites: Site | Sequence[Site],
    options: SumOptions = DEFAULTS,
    *,
    asked: Mapping[str, Array] | None = None,
    first: Array | int = 0,
) -> Estimate:
    """`estimate` for one batch, with the loss; always by name.

    `first` is the index of its first sample. The sums of a site whose `asked` () is false are zeros but for the energy.
    """
    sites = as_sites(sites)
    for site in sites:
        require_growable(site)
    num_samples = batch_size(batch)
    chunk, micro_batch = options.chunk, options.micro_batch
    even = 2 * -(-num_samples // (2 * num_chunks(num_samples)))  # chunks as equal as can be
    size = min(micro_batch or chunk or even, num_samples)
    some = take_samples(batch, 0, min(DEFAULT_CHUNK, num_samples))
    gates: dict[str, Array | Pattern] = {}
    for kind, summation in SUMMATIONS.items():
        found = Sites(site for site in sites if site.kind == kind)
        if summation.search is not None and found:
            gates |= summation.search(loss, params, some, found, per_site(sites, options.num_gates))
    step = Step(loss, sites, options, gates, asked=asked or {})
    in_parts = size < num_samples and (chunk is not None or micro_batch is not None)
    whole = None if in_parts else loss.trace(params, batch)
    if size < num_samples and (whole is None or num_numbers(whole) > AT_ONCE):
        part = take_samples(batch, 0, size)
        traced, discovery = loss.trace(params, part), loss.discover(params, part)
        coupled = coupling(discovery.graph, discovery.axes) if micro_batch is None else ""
        if coupled and chunk is not None:
            raise ValueError(f"this loss couples the samples of a batch ({coupled}): leave `chunk` out")
        if not coupled:
            if micro_batch is None:
                require_mean(loss.trace(params, batch), traced)
            else:
                require_mean_in_parts(partial(loss.trace, params), part)

            def in_chunks(step: Step) -> Estimate:
                return sums_in_chunks(step, traced, discovery, params, batch, num_samples, size, first)

            return with_thirds(step, in_chunks, discovery)
    assert whole is not None, "a loss that couples its samples is refused a `chunk`"
    discovery = loss.discover(params, batch)

    def at_once(step: Step) -> Estimate:
        return step(whole, discovery, params, batch, first)

    return with_thirds(step, at_once, discovery)


def num_chunks(num_samples: int) -> int:
    """How many passes of at most `DEFAULT_CHUNK` samples a batch takes."""
    return -(-num_samples // DEFAULT_CHUNK)
