"""What a run of `fit` will do, before it has run: its gradient steps and its growths, counted from traces.

A schedule is a function of plain numbers, so it can be walked through without a network, as if every growth added what
it should. Nothing is compiled or computed. Two calibration runs, a gradient step and a growth, make a time of it, and
`step_work` is what `budget` needs to hold a schedule to a time.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax

from tinyjax.core.arguments import per_site
from tinyjax.core.batch import batch_size, has_samples
from tinyjax.core.params import Params, named_leaves, replace_leaves
from tinyjax.core.site import Sites, resized
from tinyjax.growth.grow_step import make_grow_step
from tinyjax.surgery import Trainable, all_params
from tinyjax.surgery.capacity_policies import Policy
from tinyjax.training.cost_model import Work, seconds, total, work
from tinyjax.training.schedules.basic import Schedule, Widths
from tinyjax.training.steps import train_step

LossFn = Callable[..., Any]
Repeated = tuple[Work, int]


class Rates(NamedTuple):
    """Seconds an operation, from `work.calibrate`: in gradient steps, and in growths."""

    training: float
    growth: float


class Forecast(NamedTuple):
    """What a run will do.

    Attributes:
        training: the work of a gradient step and how many there are, for each size of batch and network, in the order
            in which they come.
        growth: the same of growths.
    """

    training: tuple[Repeated, ...]
    growth: tuple[Repeated, ...]

    def seconds(self, rates: Rates) -> float:
        """How long the run takes, compilation not included."""
        return seconds(rates.training, total(self.training)) + seconds(rates.growth, total(self.growth))


def of_fit(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    optimizer: Any,
    schedule: Schedule,
    sizes: Sequence[int],
    *,
    sites: Sites,
    widths: Widths,
    num_neurons: int | Mapping[str, int],
    growth_samples: int | Mapping[str, int] = 2048,
    make_loss: Callable[[dict[str, int]], LossFn] | None = None,
    policy: Policy | None = None,
    final: Mapping[str, int] | None = None,
    trainable: Trainable = all_params,
    has_aux: bool = False,
    **growth: Any,
) -> Forecast:
    """What `fit` with these arguments will do; options of both mean the same.

    Each site or set of sites that grows is traced once a capacity, a gradient step for the smallest and the largest
    batch: seconds for a deep network. Schedules see records of growths without gains.

    Args:
        loss_fn: the loss.
        params: the parameters at the present capacities, or their `jax.ShapeDtypeStruct`s.
        batch: an example of a batch; only the shapes of a sample matter.
        optimizer: the optimizer.
        schedule: when to grow.
        sizes: samples of every batch of the run, in order.
        sites: what grows.
        widths: used slots at the start, by site name.
        num_neurons: the largest number of neurons of a growth.
        growth_samples: samples a growth looks at.
        make_loss: from capacities to a loss.
        policy: of capacities.
        final: final widths.
        trainable: the part of the parameters that the optimizer sees.
        has_aux: whether the loss returns `(loss, aux)`.
        **growth: further options of `make_grow_step`.

    Example:
        >>> schedule = tinyjax.every(2, 4, final=12)
        >>> widths = {"hidden_1": 4, "hidden_2": 4}
        >>> found = forecast.of_fit(
        ...     loss_fn, params, batch, optimizer, schedule, [64] * 6, sites=sites, widths=widths, num_neurons=4
        ... )
        >>> [times for _, times in found.training], [times for _, times in found.growth]
        ([6], [2])
        >>> rates = forecast.Rates(work.calibrate(found.training[0][0], 1e-3), work.calibrate(found.growth[0][0], 1e-2))
        >>> print(f"{found.seconds(rates):.3f}")
        0.026
    """
    most, samples = per_site(sites, num_neurons), per_site(sites, growth_samples)
    capacities = {site.name: site.capacity for site in sites}
    plan = _walk(schedule, sizes, dict(widths), capacities, partial(_room, policy, final))
    shapes = partial(_at, jax.eval_shape(lambda tree: tree, params), sites)
    options = dict(optimizer=optimizer, trainable=trainable, has_aux=has_aux)

    def loss_at(at: _Capacities) -> LossFn:
        return loss_fn if make_loss is None else make_loss(dict(at))

    @cache
    def traced_step(at: _Capacities, size: int) -> Work:
        return _step(loss_at(at), shapes(dict(at)), _resampled(batch, size), options)

    def training(at: _Capacities, size: int) -> Work:
        """Work is linear in the number of samples."""
        present = [other for capacities, other in plan.training if capacities == at]
        low, high = min(present), max(present)
        share = (size - low) / max(1, high - low)
        return Work(*(a + share * (b - a) for a, b in zip(traced_step(at, low), traced_step(at, high))))

    def growing(at: _Capacities, names: frozenset[str]) -> Work:
        here = [site for site in resized(sites, dict(at)) if site.name in names]
        counts = {site.name: min(most[site.name], site.capacity) for site in here}
        grow = make_grow_step(loss_at(at), here, num_neurons=counts, **options, **growth)
        tree = shapes(dict(at))
        state = jax.eval_shape(lambda tree: optimizer.init(trainable(tree)), tree)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return work(grow, tree, _resampled(batch, max(samples[name] for name in names)), state, key)

    return Forecast(
        tuple((training(*key), times) for key, times in plan.training.items()),
        tuple((growing(*key), times) for key, times in plan.growth.items()),
    )


_Capacities = tuple[tuple[str, int], ...]


class _Plan(NamedTuple):
    """How often a run does what, in the order in which it comes first."""

    training: Counter[tuple[_Capacities, int]]  # by samples of the batch
    growth: Counter[tuple[_Capacities, frozenset[str]]]  # by the sites that grow


def _walk(
    schedule: Schedule,
    sizes: Sequence[int],
    widths: dict[str, int],
    capacities: dict[str, int],
    room: Callable[[dict[str, int]], dict[str, int]],
) -> _Plan:
    """The plan of a run whose growths add what the schedule asks for, as far as there is room."""
    plan = _Plan(Counter(), Counter())
    history: tuple[Any, ...] = ()
    for step, size in enumerate(sizes):
        if wanted := {name: int(k) for name, k in schedule(step, widths, history).items() if k}:
            needed = {name: width + wanted.get(name, 0) for name, width in widths.items()}
            if any(needed[name] > capacities[name] for name in wanted):
                capacities = capacities | room(needed)
            widths = {name: min(width, capacities[name]) for name, width in needed.items()}
            plan.growth[(*capacities.items(),), frozenset(wanted)] += 1
            history += (SimpleNamespace(gain_predicted={}),)
        plan.training[(*capacities.items(),), size] += 1
    return plan


def _room(policy: Policy | None, final: Mapping[str, int] | None, needed: dict[str, int]) -> dict[str, int]:
    """The capacities that change for these widths."""
    return {} if policy is None else policy(needed, final)


def step_work(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    optimizer: Any,
    sites: Sites,
    *,
    make_loss: Callable[[dict[str, int]], LossFn] | None = None,
    trainable: Trainable = all_params,
    has_aux: bool = False,
) -> Callable[[Widths], Work]:
    """The work of a gradient step of the compact network with given widths.

    With `budget` it holds a schedule to a time, or to operations. Every new combination of widths is traced once.

    Args:
        loss_fn: the loss.
        params: the parameters, or their shapes.
        batch: a batch, or its shapes.
        optimizer: the optimizer.
        sites: all sites whose widths are given.
        make_loss: from widths to a loss, for models that check shapes.
        trainable: the part of the parameters that the optimizer sees.
        has_aux: whether the loss returns `(loss, aux)`.

    Example:
        >>> def make_loss(widths):
        ...     model = models.MLP(widths=tuple(widths.values()), num_classes=2)
        ...     def loss_fn(params, batch):
        ...         logits = model.apply(params, batch.image)
        ...         return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()
        ...     return loss_fn
        >>> step = forecast.step_work(loss_fn, params, batch, optimizer, sites, make_loss=make_loss)
        >>> limit = step({"hidden_1": 6, "hidden_2": 6}).operations
        >>> within = tinyjax.schedules.budget(schedule, lambda widths: step(widths).operations, limit=limit)
        >>> within(100, {"hidden_1": 4, "hidden_2": 4}, [])
        {'hidden_1': 2, 'hidden_2': 2}
    """
    shapes = partial(_at, jax.eval_shape(lambda tree: tree, params), sites)
    samples = jax.eval_shape(lambda tree: tree, batch)
    options = dict(optimizer=optimizer, trainable=trainable, has_aux=has_aux)

    @cache
    def at(widths: tuple[tuple[str, int], ...]) -> Work:
        loss = loss_fn if make_loss is None else make_loss(dict(widths))
        return _step(loss, shapes(dict(widths)), samples, options)

    return lambda widths: at(tuple((site.name, widths.get(site.name, site.capacity)) for site in sites))


def _step(loss_fn: LossFn, params: Params, batch: Any, options: Mapping[str, Any]) -> Work:
    optimizer, trainable = options["optimizer"], options["trainable"]
    state = jax.eval_shape(lambda tree: optimizer.init(trainable(tree)), params)
    return work(train_step(loss_fn, optimizer, trainable=trainable, has_aux=options["has_aux"]), params, state, batch)


def _at(params: Params, sites: Sites, capacities: Mapping[str, int]) -> Params:
    """The shapes of parameters at other capacities."""
    leaves = named_leaves(params)
    layouts = {member.leaf: member.layout for site in resized(sites, capacities) for member in site.members}
    shapes: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(layout.shape, leaves[name].dtype) for name, layout in layouts.items()
    }
    return replace_leaves(params, shapes)


def _resampled(batch: Any, size: int) -> Any:
    """The shapes of a batch with another number of samples."""
    num_samples = batch_size(batch)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) if has_samples(x, num_samples) else x,
        jax.eval_shape(lambda tree: tree, batch),
    )
