"""Training and growing in one call.

`fit` is the loop that the README spells out: gradient steps on batches, growths when the schedule asks for them, more
room when a site is full. It is a generator of records, so logging, plotting, checkpointing and stopping stay with the
caller.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from tinyjax.averaging import require_mean_in_parts
from tinyjax.growth import make_grow_step, require_counts
from tinyjax.info import GrowthInfo, check
from tinyjax.layout import Params, named_leaves, replace_leaves
from tinyjax.optimizer.reset import require_state
from tinyjax.parts import FEWEST
from tinyjax.schedule import Schedule
from tinyjax.site import Site, Sites, as_sites
from tinyjax.sites import find_sites
from tinyjax.slots import per_site, require_names, width
from tinyjax.surgery import (
    Trainable,
    everything,
    frozen_leaves,
    mark_frozen,
    multiple_of,
    require_unfrozen,
    resize,
)
from tinyjax.surgery.capacity import Policy
from tinyjax.surgery.trained import trained_names
from tinyjax.trace import batch_size, has_samples, map_samples, take_samples
from tinyjax.whole import whole_number

LossFn = Callable[..., Any]
WithAux = Callable[[Params, Any], Params]


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


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Trainable = everything,
    has_aux: bool = False,
) -> Callable[[Params, Any, Any], tuple[Params, Any, Array, Any]]:
    """A gradient step on the trained part of the parameters: pure, not yet jitted.

    Returns:
        `params, opt_state, loss, aux = step(params, opt_state, batch)`; aux is None without `has_aux`.

    Example:
        >>> step = jax.jit(tinyjax.train_step(loss_fn, optimizer))
        >>> params, opt_state, loss, _ = step(params, opt_state, batch)
    """
    gradient_step = _gradient_step(loss_fn, trainable, has_aux)
    update_step = _update_step(optimizer, trainable)

    def step(params: Params, opt_state: Any, batch: Any) -> tuple[Params, Any, Array, Any]:
        gradient, loss, aux = gradient_step(params, batch)
        return *update_step(params, opt_state, gradient), loss, aux

    return step


def train_epoch(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Trainable = everything,
    has_aux: bool = False,
    with_aux: WithAux | None = None,
) -> Callable[[Params, Any, Any, Array], tuple[Params, Any, Array]]:
    """Gradient steps over data that lies on the device, as one `lax.scan`: pure, not yet jitted.

    For data sets that fit into the device's memory: no batch is copied and nothing is dispatched step by step.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, or `(loss, aux)` with `has_aux`.
        optimizer: an Optax optimizer.
        trainable: the part of the parameters that the optimizer sees.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
        with_aux: puts aux (new running statistics) into the parameters after a step.

    Returns:
        `params, opt_state, losses = epoch(params, opt_state, data, order)`: `order` (steps, batch) holds the samples of
        every step, `losses` is (steps,).

    Example:
        >>> epoch = jax.jit(tinyjax.train_epoch(loss_fn, optimizer))
        >>> order = jax.random.permutation(key, 64).reshape(-1, 16)
        >>> params, opt_state, losses = epoch(params, opt_state, batch, order)
        >>> losses.shape
        (4,)
    """
    one_step = train_step(loss_fn, optimizer, trainable=trainable, has_aux=has_aux)

    def epoch(params: Params, opt_state: Any, data: Any, order: Array) -> tuple[Params, Any, Array]:
        def body(state: tuple[Params, Any], rows: Array) -> tuple[tuple[Params, Any], Array]:
            # `clip` leaves out the masks of plain indexing, which cost a sixth of a small network's step
            batch = map_samples(lambda leaf: leaf.at[rows].get(mode="clip"), data)
            params, opt_state, loss, aux = one_step(*state, batch)
            return (params if with_aux is None else with_aux(params, aux), opt_state), loss

        (params, opt_state), losses = jax.lax.scan(body, (params, opt_state), order)
        return params, opt_state, losses

    return epoch


def _gradient_step(
    loss_fn: LossFn, trainable: Trainable, has_aux: bool
) -> Callable[[Params, Any], tuple[Params, Array, Any]]:
    """`gradient, loss, aux = step(params, batch)`, the gradient with respect to the trained part."""

    def step(params: Params, batch: Any) -> tuple[Params, Array, Any]:
        def loss_of(part: Params) -> tuple[Array, Any]:
            out = loss_fn(_put(params, part, trainable), batch)
            return out if has_aux else (out, None)

        (loss, aux), gradient = jax.value_and_grad(loss_of, has_aux=True)(trainable(params))
        return gradient, loss, aux

    return step


def _update_step(
    optimizer: optax.GradientTransformation, trainable: Trainable
) -> Callable[[Params, Any, Params], tuple[Params, Any]]:
    """`params, opt_state = step(params, opt_state, gradient)`."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(params: Params, opt_state: Any, gradient: Params) -> tuple[Params, Any]:
        part = trainable(params)
        updates, opt_state = optimizer.update(gradient, opt_state, part)
        return _put(params, optax.apply_updates(part, updates), trainable), opt_state

    return step


def _put(params: Params, part: Params, trainable: Trainable) -> Params:
    """The parameters with another trained part."""
    names = trained_names(trainable, params)
    return replace_leaves(params, {names[name]: leaf for name, leaf in named_leaves(part).items()})


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
    trainable: Trainable = everything,
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
        schedule: `schedule(step, widths, history)`, see `tinyjax.schedule`; `history` holds the past `GrowthInfo`s.
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
        programs: keeps what was compiled: pass one dict to the runs of several seeds, and only the first compiles.
            Programs are shared by runs whose `loss_fn`, `optimizer` and other functions are the same objects.
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
    stream = _Stream(batches)
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
        require_mean_in_parts(loss_fn, params, take_samples(first, 0, micro_batch), has_aux=has_aux)
    options = dict(optimizer=optimizer, trainable=trainable, has_aux=has_aux) | growth
    compiled = _Compiled(loss_fn, found, most, options, with_aux, programs, history)
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
                new_loss = loss_fn if make_loss is None else make_loss(capacities)
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
                compiled = _Compiled(loss_fn, found, most, options, with_aux, programs)
            fits = {name: min(k, found[name].capacity - widths[name]) for name, k in wanted.items()}
            fits = {name: k for name, k in fits.items() if k}
            _tell_full([found[name] for name in wanted if name not in fits and name not in told])
            told |= wanted.keys() - fits.keys()
            if fits and stream.holds(FEWEST):
                batch = stream.peek(max(samples[name] for name in fits))
                params, opt_state, info = compiled.grow(params, opt_state, batch, jax.random.fold_in(key, done), fits)
                check(info)
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


class _TrainingPrograms(NamedTuple):
    """Jitted: a step; and in parts, for micro-batches, a gradient, a sum of two, and the update by their mean."""

    step: Callable[..., Any]
    gradient: Callable[..., Any]
    add: Callable[..., Any]
    update: Callable[..., Any]


def _training_programs(loss_fn: LossFn, options: Mapping[str, Any]) -> _TrainingPrograms:
    optimizer, trainable, has_aux = (options[name] for name in ("optimizer", "trainable", "has_aux"))
    return _TrainingPrograms(
        jax.jit(train_step(loss_fn, optimizer, trainable=trainable, has_aux=has_aux)),
        jax.jit(_gradient_step(loss_fn, trainable, has_aux)),
        jax.jit(partial(jax.tree.map, jnp.add), donate_argnums=0),
        jax.jit(partial(_mean_update, _update_step(optimizer, trainable))),
    )


_Programs = tuple[_TrainingPrograms, dict[frozenset[str], Callable[..., Any]]]


class _Compiled:
    """The programs of a capacity: one for training, one for each set of sites that grow together."""

    def __init__(
        self,
        loss_fn: LossFn,
        sites: Sites,
        most: Mapping[str, int],
        options: dict[str, Any],
        with_aux: WithAux | None,
        programs: dict[Any, Any] | None,
        history: Sequence[GrowthInfo] = (),
    ):
        self._loss_fn, self._sites, self._options, self._with_aux = loss_fn, sites, options, with_aux
        # A growth never adds more than a site has slots; a network that starts without room is resized first.
        self._counts = {name: min(k, sites[name].capacity) for name, k in most.items()}
        fresh: _Programs = (_training_programs(loss_fn, options), {})
        if programs is not None:
            fresh = programs.setdefault((loss_fn, sites, *self._counts.items(), *options.items()), fresh)
        self._training, self._growths = fresh
        # The sets of sites with a program, oldest first: those of the run that this one goes on with are known from
        # what its growths report, so that it chooses as that run would have, and its draws are the same.
        present = (frozenset(info.width) for info in history if _at_capacities(info, sites))
        self._known: list[frozenset[str]] = list(dict.fromkeys(present))

    def grow(self, params: Params, opt_state: Any, batch: Any, key: Array, neurons: Mapping[str, int]) -> Any:
        names = frozenset(neurons)
        if names not in self._known:
            # A schedule whose sites fill up one by one asks for fewer and fewer of them: no new program for that.
            names = next((known for known in self._known if names < known), names)
        self._known += [] if names in self._known else [names]
        if names not in self._growths:
            self._growths[names] = self._compile(names)
        return self._growths[names](params, batch, opt_state, key, dict(neurons))

    def _compile(self, names: frozenset[str]) -> Callable[..., Any]:
        sites = [site for site in self._sites if site.name in names]
        counts = {site.name: self._counts[site.name] for site in sites}
        return jax.jit(make_grow_step(self._loss_fn, sites, num_neurons=counts, **self._options))

    def train(self, params: Params, opt_state: Any, batch: Any, micro_batch: int | None) -> tuple[Params, Any, Array]:
        if micro_batch is None:
            params, opt_state, loss, aux = self._training.step(params, opt_state, batch)
            return self._after(params, aux), opt_state, loss
        size = batch_size(batch)
        if size % micro_batch:
            raise ValueError(f"a batch of {size} samples is not a multiple of `micro_batch`, {micro_batch}")
        total = None
        for start in range(0, size, micro_batch):
            gradient, loss, aux = self._training.gradient(params, take_samples(batch, start, start + micro_batch))
            params = self._after(params, aux)
            total = (gradient, loss) if total is None else self._training.add(total, (gradient, loss))
        return self._training.update(params, opt_state, total, size // micro_batch)

    def _after(self, params: Params, aux: Any) -> Params:
        return params if self._with_aux is None else self._with_aux(params, aux)


def _always(loss_fn: LossFn) -> Callable[[dict[str, int]], LossFn]:
    """A `make_loss` that has been called."""
    return lambda capacities: loss_fn


def _at_capacities(info: GrowthInfo, sites: Sites) -> bool:
    """Whether a growth happened at the present capacities."""
    here = {site.name: site.capacity for site in sites}
    return all(born.shape[-1] == here.get(name) for name, born in info.born.items())


def _mean_update(
    update_step: Callable[..., tuple[Params, Any]], params: Params, opt_state: Any, total: Any, count: Array
) -> tuple[Params, Any, Array]:
    """An update by the mean of `count` gradients, and the mean of their losses."""
    gradient, loss = jax.tree.map(lambda x: x / count, total)
    return *update_step(params, opt_state, gradient), loss


_END = object()


class _Stream:
    """Batches that can be looked at before they are taken."""

    def __init__(self, batches: Iterable[Any]):
        self._batches = iter(batches)
        self._ahead: list[Any] = []

    def has_next(self) -> bool:
        return bool(self._ahead) or self._read()

    def holds(self, num_samples: int) -> bool:
        """Whether so many samples are left; reads them."""
        while sum(map(batch_size, self._ahead)) < num_samples:
            if not self._read():
                return False
        return True

    def take(self) -> Any:
        return self._ahead.pop(0)

    def peek(self, num_samples: int | None = None) -> Any:
        """The next so many samples (fewer at the end), or the next batch, as one batch."""
        self.holds(num_samples or 1)
        if not self._ahead:
            raise ValueError("`batches` is empty")
        if num_samples is None:
            return self._ahead[0]
        sizes = list(itertools.accumulate(map(batch_size, self._ahead)))
        count = next((i + 1 for i, size in enumerate(sizes) if size >= num_samples), len(sizes))
        return take_samples(_joined(self._ahead[:count]), 0, num_samples)

    def _read(self) -> bool:
        batch = next(self._batches, _END)
        if batch is _END:
            return False
        self._ahead.append(batch)
        return True


def _joined(batches: Sequence[Any]) -> Any:
    """Batches as one; of leaves without samples the first."""
    num_samples = batch_size(batches[0])

    def join(*leaves: Any) -> Any:
        return jnp.concatenate([jnp.asarray(x) for x in leaves]) if has_samples(leaves[0], num_samples) else leaves[0]

    return jax.tree.map(join, *batches)


def _widths(params: Params, sites: Sites) -> dict[str, int]:
    return {site.name: int(width(params, site)) for site in sites}
