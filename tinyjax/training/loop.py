"""Training and growing in one call.

`fit` is the loop of `docs/loop.md`: gradient steps on batches, growths when the schedule asks for them, more
room when a site is full. It is a generator of records, so logging, plotting, checkpointing and stopping stay with the
caller.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array

from tinyjax.core.arguments import per_site, require_names
from tinyjax.core.batch import take_samples
from tinyjax.core.params import Params
from tinyjax.core.shared_programs import shared
from tinyjax.core.site import Site, Sites, as_sites
from tinyjax.core.slots import width
from tinyjax.core.whole_numbers import whole_number
from tinyjax.discovery.dimensions.loss_form import require_mean_in_parts
from tinyjax.discovery.sites import find_sites
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.growth.batch_split import FEWEST
from tinyjax.growth.checks import require_counts
from tinyjax.growth.info import GrowthInfo
from tinyjax.growth.optimizer.reset import require_state
from tinyjax.surgery import Trainable, all_params, frozen_leaves, multiple_of, resize
from tinyjax.surgery.capacity_policies import Policy
from tinyjax.surgery.frozen import mark_frozen, require_unfrozen
from tinyjax.training.batch_queue import BatchQueue
from tinyjax.training.programs import CompiledPrograms
from tinyjax.training.schedules.basic import Schedule
from tinyjax.training.steps import LossFn, WithAux


class Record(NamedTuple):
    """One gradient step of `fit`, and the growth before it if there was one.

    Attributes:
        step: number of gradient steps done.
        loss: mean loss of the step's batch, () (not yet waited for).
        growth: what the growth before the step did, or None.
        width: used slots by site name.
        params: the parameters after the step.
        opt_state: the optimizer's state after the step.
        sites: the sites at their present capacities.
        loss_fn: the loss at these capacities.
        history: what every growth so far did, newest last.
        refused: sites that cannot grow, with their reasons, where `fit` chose the sites itself.
    """

    step: int
    loss: Array
    growth: GrowthInfo | None
    width: dict[str, int]
    params: Params
    opt_state: Any
    sites: Sites
    loss_fn: LossFn
    history: tuple[GrowthInfo, ...]
    refused: Sites = Sites(())


def fit(
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Any],
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    key: Array,
    *,
    num_neurons: int | Mapping[str, int],
    sites: Sites | Sequence[Site] | Site | None = None,
    growth_samples: int | Mapping[str, int] = 2048,
    micro_batch: int | None = None,
    make_loss: Callable[[dict[str, int]], LossFn] | None = None,
    policy: Policy | None = None,
    final: Mapping[str, int] | None = None,
    trainable: Trainable = all_params,
    has_aux: bool = False,
    with_aux: WithAux | None = None,
    opt_state: Any = None,
    step: int = 0,
    history: Sequence[GrowthInfo] = (),
    programs: dict[Any, Any] | None = None,
    **growth: Any,
) -> Iterator[Record]:
    """Trains on `batches`, grows when `schedule` says so, yields a record a step.

    A growth looks at the next batches, at `growth_samples` samples of them, before they are trained on. Where a
    site has fewer free slots than the schedule asks for, sites are resized by `policy` (and everything is recompiled
    once) if there is one, and the loss of the next batch is compared before and after; else as many neurons as fit are
    added. Sites that grow together share one program, so a schedule that visits one site at a time compiles, and
    estimates, one site at a time.

    A run that was stopped goes on as if it had not been: pass the `params`, `opt_state`, `sites`, `step` and `history`
    of its last record, the same key, and the batches from there on.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, the mean over the samples of the batch.
        params: the parameters, at their starting widths (see `thin`).
        batches: training batches of one size (with `micro_batch`: of its multiples); an iterator is consumed.
        optimizer: wrap it in `with_birth` so that newborn neurons start as in a fresh optimizer.
        schedule: `schedule(step, widths, history)`, see `tinyjax.training.schedules.basic`; `history` holds the past
            `GrowthInfo`s.
        key: for methods and fillers that draw.
        num_neurons: the largest number of neurons the schedule asks for at once, for all sites or by name.
        sites: what to grow; default: every growable site whose neurons are read by kernels that `optimizer` and
            `trainable` let train (the others are in `refused` of the records, with their reasons).
        growth_samples: samples a growth uses (fewer if the batches end, and no growth with fewer than 8): statistics on
            3/4 of them, line searches on the rest. By site name or one number for all; sites that grow together use the
            largest.
        micro_batch: gradients are computed on so many samples at a time and averaged over the batch, so that batches of
            any multiple of it share one program. A loss that couples samples couples those of a micro-batch.
        make_loss: from capacities to a loss, for models that check shapes (Linen, Haiku); not needed for others.
        policy: how much room to make; `multiple_of(8)` if only `make_loss` is given.
        final: final widths, which some policies need.
        trainable: the part of the parameters that the optimizer sees.
        has_aux: whether the loss returns `(loss, aux)`.
        with_aux: puts aux (new running statistics) into the parameters after a step, or after each micro-batch.
        opt_state: of a run to go on with; default: the optimizer's initial state.
        step: number of gradient steps done before.
        history: growths done before.
        programs: keeps what was compiled for as long as the dict lives. Runs whose `loss_fn`, `optimizer`, `make_loss`
            and other functions are the same objects share programs without it too, the 32 used last.
        **growth: further options of `make_grow_step` (`method`, `update`, `fill`, ...).

    Yields:
        A `Record` a step.

    Raises:
        ValueError: no batch (unless `step` says that the run was at its end); a schedule that names an unknown site or
            asks for more than `num_neurons`; a policy without the `final` it needs; a resize that would change
            the loss, or did (with the names of the sites); and as `find_sites`, `make_grow_step` and `check`; a loss
            that sums over the samples of a micro-batch.

    Example:
        >>> optimizer = tinyjax.with_birth(optax.adam(1e-3))
        >>> schedule = tinyjax.every(2, 4, final=12)  # instead of the one above, which waits for step 100
        >>> for record in tinyjax.fit(loss_fn, params, batches, optimizer, schedule, key, sites=site, num_neurons=4):
        ...     print(record.step, record.width)
        1 {'hidden_1': 8}
        2 {'hidden_1': 8}
        3 {'hidden_1': 12}
        4 {'hidden_1': 12}
    """
    _check_arguments(batches, optimizer, schedule, key)
    stream = BatchQueue(batches)
    if step and not stream.has_next():  # a run that was stopped at its end
        return
    first = stream.peek()
    frozen = frozen_leaves(params, optimizer, trainable)
    if sites is None:
        every = mark_frozen(find_sites(loss_fn, params, first, has_aux=has_aux, make_loss=make_loss), frozen)
        found, refused = every.growable, Sites(site for site in every if not site.growable)
    else:
        found, refused = as_sites(sites), Sites(())
        require_unfrozen(found, frozen)
    most = require_counts(found, per_site(found, num_neurons))
    policy = multiple_of(8) if policy is None and make_loss is not None else policy
    if policy is not None and not callable(policy):
        raise ValueError(f"`policy` must be a function, such as `tinyjax.multiple_of(8)`, got {policy!r}")
    if final is not None and not isinstance(final, Mapping):
        raise ValueError(f"`final` must be a dict of widths by site name, got {final!r}")
    samples = {name: whole_number(k, "`growth_samples`") for name, k in per_site(found, growth_samples).items()}
    if min(samples.values(), default=FEWEST) < FEWEST:
        raise ValueError(f"`growth_samples` must be at least {FEWEST} samples, got {growth_samples}")
    if micro_batch is not None:
        micro_batch = whole_number(micro_batch, "`micro_batch`", least=1)
        loss = TracedLoss(loss_fn, has_aux)
        require_mean_in_parts(partial(loss.trace, params), take_samples(first, 0, micro_batch))
    options = dict(optimizer=optimizer, trainable=trainable, has_aux=has_aux) | growth
    compiled = CompiledPrograms(loss_fn, found, most, options, with_aux, programs, history)
    if opt_state is None:
        opt_state = optimizer.init(trainable(params))
    require_state(optimizer, opt_state, trainable(params))
    widths = _widths(params, found)
    if policy is not None:
        policy(widths, final)  # what it lacks shall be said now, not when a site is full
    history, told = tuple(history), set[str]()
    for done in itertools.count(step):
        if not stream.has_next():
            return
        info = None
        wanted = _wanted(schedule(done, widths, history), found, most, refused)
        if not (wanted or told or history or policy) and all(widths[site.name] == site.capacity for site in found):
            # Full from the start: would the schedule grow a network with room?
            asked = schedule(done, dict.fromkeys(widths, 1), history)
            _tell_full([site for site in found if asked.get(site.name, 0) > 0])
            told |= asked.keys()
        if wanted:
            needed = {name: w + wanted.get(name, 0) for name, w in widths.items()}
            if policy is not None and any(needed[site.name] > site.capacity for site in found):
                capacities = policy(needed, final)
                if make_loss is not None:  # the same loss again for an identical run: it finds its programs then
                    new_loss = shared(("loss", make_loss, capacities), partial(make_loss, capacities))
                else:
                    new_loss = loss_fn
                some = take_samples(stream.peek(), 0, micro_batch) if micro_batch is not None else stream.peek()
                params, opt_state, found = resize(
                    params,
                    found,
                    capacities,
                    optimizer=optimizer,
                    opt_state=opt_state,
                    trainable=trainable,
                    check=(loss_fn, some, _always(new_loss)),
                )
                loss_fn = new_loss
                compiled = CompiledPrograms(loss_fn, found, most, options, with_aux, programs)
            fits = {name: min(k, found[name].capacity - widths[name]) for name, k in wanted.items()}
            fits = {name: k for name, k in fits.items() if k}
            _tell_full([found[name] for name in wanted if name not in fits and name not in told])
            told |= wanted.keys() - fits.keys()
            if fits and stream.holds(FEWEST):
                batch = stream.peek(max(samples[name] for name in fits))
                params, opt_state, info = compiled.grow(params, opt_state, batch, jax.random.fold_in(key, done), fits)
                widths |= {name: int(w) for name, w in info.width.items()}
                history += (info,)
        params, opt_state, loss = compiled.train(params, opt_state, stream.take(), micro_batch)
        yield Record(done + 1, loss, info, dict(widths), params, opt_state, found, loss_fn, history, refused)


def _check_arguments(batches: Any, optimizer: Any, schedule: Any, key: Any) -> None:
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise ValueError(f"`batches` must be an iterable of batches, such as `[batch]`, got a {type(batches).__name__}")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            f"`optimizer` must be an Optax optimizer, such as `optax.adam(1e-3)`, got a {type(optimizer).__name__}"
        )
    if not callable(schedule):
        raise ValueError(
            f"`schedule` must be a function `(step, widths, history) -> {{site: neurons}}`, such as "
            f"`tinyjax.every(...)`, got a {type(schedule).__name__}"
        )
    if not isinstance(key, (jax.Array, np.ndarray)):
        raise ValueError(f"`key` must be a PRNG key, `jax.random.key(seed)`, got {key!r}")


def _tell_full(sites: Sequence[Site]) -> None:
    """Warns that nothing can grow at sites that the schedule asks for and that have no room."""
    if sites:
        names = ", ".join(f"`{site.name}` (all {site.capacity} slots are used)" for site in sites)
        warnings.warn(
            f"`fit`: the schedule asks for neurons at {names}, where nothing can grow: empty slots with `thin` before, "
            "or pass a `policy` that makes room (and `make_loss`, if the model checks shapes)",
            stacklevel=3,
        )


def _wanted(answer: Any, sites: Sites, most: Mapping[str, int], refused: Sites) -> dict[str, int]:
    """What the schedule asks for, without the zeros."""
    if not isinstance(answer, Mapping):
        raise ValueError(f"the schedule must return the neurons to add by site, {{}} for none; it returned {answer!r}")
    for site in refused:
        if answer.get(site.name):
            raise ValueError(f"the schedule asks for neurons at site `{site.name}`, which cannot grow: {site.reason}")
    require_names(sites, answer)
    for name, k in answer.items():
        if k != int(k):
            raise ValueError(f"the schedule asks for {k} neurons at site `{name}`: ask for a whole number")
        if k > most[name]:
            raise ValueError(
                f"the schedule asks for {k} neurons at site `{name}` at once, more than `num_neurons`, {most[name]}"
            )
    return {name: int(k) for name, k in answer.items() if k > 0}


def _always(loss_fn: LossFn) -> Callable[[dict[str, int]], LossFn]:
    """A `make_loss` that has been called."""
    return lambda capacities: loss_fn


def _widths(params: Params, sites: Sites) -> dict[str, int]:
    return {site.name: int(width(params, site)) for site in sites}
