"""Training and growing in one call.

`fit` is the loop that the README spells out: gradient steps on batches, growths when the schedule asks for them, more
room when a site is full. It is a generator of records, so logging, plotting, checkpointing and stopping stay with the
caller.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from tinyjax.growth import make_grow_step
from tinyjax.info import GrowthInfo, check
from tinyjax.layout import Params, named_leaves, replace_leaves
from tinyjax.schedule import Schedule
from tinyjax.site import Site, Sites, as_sites
from tinyjax.sites import find_sites
from tinyjax.slots import per_site, require_names, width
from tinyjax.surgery import Trainable, everything, multiple_of, resize
from tinyjax.surgery.capacity import Policy
from tinyjax.surgery.trained import trained_names
from tinyjax.trace import batch_size, has_samples

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
    """

    step: int
    loss: Array
    growth: GrowthInfo | None
    width: dict[str, int]
    params: Params
    opt_state: Any
    sites: Sites
    loss_fn: LossFn


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
        >>> step = jax.jit(train_step(loss_fn, optax.adam(1e-3)))
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(params: Params, opt_state: Any, batch: Any) -> tuple[Params, Any, Array, Any]:
        names = trained_names(trainable, params)
        part = trainable(params)

        def put(part: Params) -> Params:
            return replace_leaves(params, {names[name]: leaf for name, leaf in named_leaves(part).items()})

        def loss_of(part: Params) -> tuple[Array, Any]:
            out = loss_fn(put(part), batch)
            return out if has_aux else (out, None)

        (loss, aux), gradient = jax.value_and_grad(loss_of, has_aux=True)(part)
        updates, opt_state = optimizer.update(gradient, opt_state, part)
        return put(optax.apply_updates(part, updates)), opt_state, loss, aux

    return step


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
    growth_samples: int = 2048,
    make_loss: Callable[[dict[str, int]], LossFn] | None = None,
    policy: Policy | None = None,
    final: Mapping[str, int] | None = None,
    trainable: Trainable = everything,
    has_aux: bool = False,
    with_aux: WithAux | None = None,
    **growth: Any,
) -> Iterator[Record]:
    """Trains on `batches`, grows when `schedule` says so, yields a record a step.

    A growth looks at the next batches, at least `growth_samples` samples of them, before they are trained on. Where a
    site has fewer free slots than the schedule asks for, sites are resized by `policy` (and everything is recompiled
    once) if there is one; else as many neurons as fit are added.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, the mean over the samples of the batch.
        params: the parameters, at their starting widths (see `thin`).
        batches: training batches of one size; an iterator is consumed.
        optimizer: wrap it in `with_birth` so that newborn neurons start as in a fresh optimizer.
        schedule: `schedule(step, widths, history)`, see `tinyjax.schedule`; `history` holds the past `GrowthInfo`s.
        key: for methods and fillers that draw.
        num_neurons: the largest number of neurons the schedule asks for at once, for all sites or by name.
        sites: what to grow; default: every growable site.
        growth_samples: samples a growth uses at least: statistics on 3/4 of them, line searches on the rest.
        make_loss: from capacities to a loss, for models that check shapes (Linen, Haiku); not needed for others.
        policy: how much room to make; `multiple_of(8)` if only `make_loss` is given.
        final: final widths, which some policies need.
        trainable: the part of the parameters that the optimizer sees.
        has_aux: whether the loss returns `(loss, aux)`.
        with_aux: puts aux (new running statistics) into the parameters after a step.
        **growth: further options of `make_grow_step` (`method`, `update`, `fill`, ...).

    Yields:
        A `Record` a step.

    Raises:
        ValueError: no batch; a schedule that names an unknown site or asks for more than `num_neurons`; and as
            `find_sites`, `make_grow_step` and `check`.

    Example:
        >>> optimizer = tinyjax.with_birth(optax.adam(1e-3))
        >>> schedule = tinyjax.early(len(batches), events=8, final=64)
        >>> for record in tinyjax.fit(loss_fn, params, batches, optimizer, schedule, key, num_neurons=8):
        ...     print(record.step, record.loss, record.width)
    """
    stream = _Stream(batches)
    first = stream.peek(1)
    found = find_sites(loss_fn, params, first, has_aux=has_aux).growable if sites is None else as_sites(sites)
    most = per_site(found, num_neurons)
    policy = multiple_of(8) if policy is None and make_loss is not None else policy
    options = dict(optimizer=optimizer, trainable=trainable, has_aux=has_aux) | growth
    compiled = _Compiled(loss_fn, found, most, options)
    opt_state = optimizer.init(trainable(params))
    widths = _widths(params, found)
    history: list[GrowthInfo] = []
    for step in itertools.count():
        if not stream.has_next():
            return
        info = None
        wanted = {name: k for name, k in schedule(step, widths, history).items() if k > 0}
        if wanted:
            _check_wanted(wanted, found, most)
            needed = {name: w + wanted.get(name, 0) for name, w in widths.items()}
            if policy is not None and any(needed[site.name] > site.capacity for site in found):
                capacities = policy(needed, final)
                params, opt_state, found = resize(
                    params, found, capacities, optimizer=optimizer, opt_state=opt_state, trainable=trainable
                )
                loss_fn = loss_fn if make_loss is None else make_loss(capacities)
                compiled = _Compiled(loss_fn, found, most, options)
            fits = {site.name: min(wanted.get(site.name, 0), site.capacity - widths[site.name]) for site in found}
            if any(fits.values()):
                batch = stream.peek(growth_samples)
                params, opt_state, info = compiled.grow(params, batch, opt_state, jax.random.fold_in(key, step), fits)
                check(info)
                widths = {name: int(w) for name, w in info.width.items()}
                history.append(info)
        params, opt_state, loss, aux = compiled.train(params, opt_state, stream.take())
        if with_aux is not None:
            params = with_aux(params, aux)
        yield Record(step + 1, loss, info, dict(widths), params, opt_state, found, loss_fn)


def _check_wanted(wanted: Mapping[str, int], sites: Sites, most: Mapping[str, int]) -> None:
    require_names(sites, wanted)
    for name, k in wanted.items():
        if k > most[name]:
            raise ValueError(
                f"the schedule asks for {k} neurons at site `{name}` at once, more than `num_neurons`, {most[name]}"
            )


class _Compiled:
    """The two programs of a capacity."""

    def __init__(self, loss_fn: LossFn, sites: Sites, most: Mapping[str, int], options: dict[str, Any]):
        # A growth never adds more than a site has slots; a network that starts without room is resized first.
        counts = {name: min(k, sites[name].capacity) for name, k in most.items()}
        self.grow = jax.jit(make_grow_step(loss_fn, sites, num_neurons=counts, **options))
        of_train = {name: options[name] for name in ("optimizer", "trainable", "has_aux")}
        self.train = jax.jit(train_step(loss_fn, **of_train))


class _Stream:
    """Batches that can be looked at before they are taken."""

    def __init__(self, batches: Iterable[Any]):
        self._batches = iter(batches)
        self._ahead: list[Any] = []

    def has_next(self) -> bool:
        return bool(self._ahead) or self._read()

    def take(self) -> Any:
        return self._ahead.pop(0)

    def peek(self, num_samples: int) -> Any:
        """The next batches with at least that many samples (fewer at the end), as one batch."""
        while sum(map(batch_size, self._ahead)) < num_samples and self._read():
            pass
        if not self._ahead:
            raise ValueError("`batches` is empty")
        sizes = list(itertools.accumulate(map(batch_size, self._ahead)))
        count = next((i + 1 for i, size in enumerate(sizes) if size >= num_samples), len(sizes))
        return jax.tree.map(_join, *self._ahead[:count])

    def _read(self) -> bool:
        batch = next(self._batches, None)
        if batch is not None:
            self._ahead.append(batch)
        return batch is not None


def _join(*leaves: Any) -> Any:
    return jnp.concatenate([jnp.asarray(leaf) for leaf in leaves]) if has_samples(leaves[0]) else leaves[0]


def _widths(params: Params, sites: Sites) -> dict[str, int]:
    return {site.name: int(width(params, site)) for site in sites}
