"""The thin ResNet-18 of `experiments.grow`: the widths inside its blocks grow one site at a time (algorithm 1).

Capacities follow a policy: all at once where training a wide network costs less than compiling a narrow one (`cpu`),
in eight steps for the paper's schedule. Batches grow with the network by micro-batches of one size (E.2), statistics
come from as many images as E.1 asks for.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tinyjax
from experiments.activations import relu
from experiments.beyond.controls import never
from experiments.demo.runs import METHODS, Task, load, own_update
from experiments.paper import protocol
from experiments.paper import protocol as paper
from tinyjax import data, methods
from tinyjax.core.site import resized
from tinyjax.models import ResNet18
from tinyjax.surgery.capacity_policies import Policy
from tinyjax.training.forecast import Forecast, of_fit
from tinyjax.training.schedules import costs

EVALUATED = 1024  # training images that accuracy is measured on
CHUNK = 512  # images of one forward pass


class Preset(NamedTuple):
    """What a `--preset` stands for.

    Attributes:
        protocol: schedule, widths, batches, optimizer.
        policy: how capacities grow.
    """

    protocol: paper.Protocol
    policy: Policy


def adam() -> optax.GradientTransformation:
    return optax.adam(1e-3)


PRESETS = {
    # Two blocks of a quarter-size network have something to grow: seconds.
    "smoke": Preset(
        protocol.Protocol(
            stream=(4, 8), start=(1, 4, 2, 8), neurons=(3, 3, 6, 6), between=0.125, extra=0.125, optimizer=adam,
            augment=False,
        ),
        tinyjax.surgery.full,
    ),
    # An eighth of the paper's channels, from its thinnest start (1, 1, 2, 2, 4, 4, 8, 8): three growths of each block.
    "cpu": Preset(
        protocol.Protocol(
            stream=(8, 16, 32, 64), start=protocol.inner_widths(1 / 64), neurons=protocol.NEURONS, between=0.25,
            extra=2,
            optimizer=adam, augment=False,
        ),
        tinyjax.surgery.full,
    ),
    "paper": Preset(protocol.figure_5(1 / 64), tinyjax.multiple_of(8)),
}  # fmt: skip


class Network(NamedTuple):
    """A ResNet-18 of a protocol on a data set, and what growing it needs.

    Attributes:
        protocol: its schedule.
        policy: of capacities.
        splits: the data, on the device.
        sites: inside the blocks, at the final widths.
        calendar: growths and batch sizes.
        samples: images a growth looks at, by site.
        make_loss: capacities by site -> loss.
        init: (key, widths by site) -> parameters of a network of these widths.
        correct: (capacities, parameters, batch) -> fraction of correct answers, running statistics in use.
        parameters: inner widths -> number of parameters.
        optimizer: of all runs.
        programs: what was compiled, for the runs of all seeds.
    """

    protocol: paper.Protocol
    policy: Policy
    splits: Mapping[str, data.Batch]
    sites: tinyjax.Sites
    calendar: paper.Calendar
    samples: Mapping[str, int]
    make_loss: Callable[[Mapping[str, int]], Callable[..., Any]]
    init: Callable[[jax.Array, Mapping[str, int]], Any]
    correct: Callable[[Any, tinyjax.Sites, data.Batch], float]
    parameters: Callable[[tuple[int, ...]], int]
    optimizer: optax.GradientTransformation
    programs: dict[Any, Any]


def trained(variables: Any) -> Any:
    """What the optimizer sees: not the running statistics."""
    return variables["params"]


def with_running_statistics(variables: Any, statistics: Any) -> Any:
    return {**variables, **statistics}


def build(preset: Preset, dataset: data.Dataset, splits: Mapping[str, data.Batch]) -> Network:
    """The network of a preset on a data set."""
    protocol, policy = preset
    train = splits["train"]
    size, num_train = train.image.shape[1], len(train.label)

    @cache
    def model(widths: tuple[int, ...]) -> ResNet18:
        return ResNet18(widths, dataset.num_classes, relu, protocol.stream)

    @cache  # `fit` shares programs by the identity of the loss
    def loss_of(widths: tuple[int, ...]) -> Callable[..., Any]:
        def loss_fn(variables: Any, batch: data.Batch) -> tuple[jax.Array, Any]:
            logits, updates = model(widths).apply(variables, batch.image, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean(), updates

        return loss_fn

    final = jax.eval_shape(partial(model(protocol.final).init, train=False), jax.random.key(0), train.image[:1])
    few = data.Batch(*(x[:16] for x in train))
    sites = tinyjax.find_sites(loss_of(protocol.final), final, few, has_aux=True).growable
    assert tuple(site.capacity for site in sites) == protocol.final, "the sites are the blocks, in order"
    elsewhere = sum(leaf.size for leaf in jax.tree.leaves(trained(final))) - costs.parameters(sites, {})

    def parameters(widths: tuple[int, ...]) -> int:
        return elsewhere + costs.parameters(sites, dict(zip(sites.names, widths)))

    def init(key: jax.Array, widths: Mapping[str, int]) -> Any:
        model_init = partial(model(tuple(widths.values())).init, train=False)
        return jax.jit(model_init)(key, train.image[:1])

    @partial(jax.jit, static_argnums=0)
    def correct_of(widths: tuple[int, ...], variables: Any, batch: data.Batch) -> jax.Array:
        logits: Any = model(widths).apply(variables, batch.image, train=False)
        return jnp.sum(logits.argmax(-1) == batch.label)

    def correct(variables: Any, sites: tinyjax.Sites, batch: data.Batch) -> float:
        widths = tuple(site.capacity for site in sites)
        chunks = (data.Batch(*(x[i : i + CHUNK] for x in batch)) for i in range(0, len(batch.label), CHUNK))
        return sum(float(correct_of(widths, variables, chunk)) for chunk in chunks) / len(batch.label)

    samples = paper.estimation_samples(protocol, size=size, training_set=num_train)
    return Network(
        protocol,
        policy,
        splits,
        sites,
        paper.calendar(protocol, parameters, num_train),
        dict(zip(sites.names, samples)),
        lambda capacities: loss_of(tuple(capacities.values())),
        init,
        correct,
        parameters,
        tinyjax.with_birth(protocol.optimizer()),
        {},
    )


def on_schedule(network: Network, protocol: protocol.Protocol) -> Network:
    """The same network, its programs included, with another start and another time between growths."""
    num_train = len(network.splits["train"].label)
    return network._replace(protocol=protocol, calendar=paper.calendar(protocol, network.parameters, num_train))


def stream(network: Network, seed: int, step: int) -> Iterator[data.Batch]:
    """The training batches from a step on: epoch after epoch in an order of its own, cut at the calendar's sizes."""
    train, num_train = network.splits["train"], len(network.splits["train"].label)

    @cache
    def order(epoch: int) -> np.ndarray:
        return data.epoch_order(seed, epoch, num_train)

    for start, size in zip(network.calendar.starts[step:], network.calendar.sizes[step:]):
        first, last = start // num_train, (start + size - 1) // num_train
        indices = np.concatenate([order(epoch) for epoch in range(first, last + 1)])[start - first * num_train :][:size]
        images, labels = train.image[indices], train.label[indices]
        if network.protocol.augment:
            images = data.augment(jax.random.fold_in(data.epoch_key(seed, int(first)), int(start)), images)
        yield data.Batch(images, labels)


def grow(network: Network, seed: int, record: tinyjax.Record | None = None, **growth: Any) -> Iterator[tinyjax.Record]:
    """Algorithm 1 with a method (`growth` holds options of `make_grow_step`), from the beginning or from a record."""
    protocol = network.protocol
    key = jax.random.key(seed)
    if record is None:
        start = dict(zip(network.sites.names, protocol.start))
        params, sites = tinyjax.resize(network.init(key, start), resized(network.sites, start), _first_rung(network))
        state: dict[str, Any] = {}
    else:
        params, sites = record.params, record.sites
        state = dict(opt_state=record.opt_state, step=record.step, history=record.history)
    return tinyjax.fit(
        network.make_loss({site.name: site.capacity for site in sites}),
        params,
        stream(network, seed, state.get("step", 0)),
        network.optimizer,
        algorithm_1(network),
        key,
        sites=sites,
        micro_batch=protocol.micro_batch,
        with_aux=with_running_statistics,
        programs=network.programs,
        **_options(network),
        **state,
        **growth,
    )


def forecast(network: Network, **growth: Any) -> Forecast:
    """What `grow` will do from the beginning."""
    rung, train = _first_rung(network), network.splits["train"]
    shapes = jax.eval_shape(lambda key: network.init(key, rung), jax.random.key(0))
    return of_fit(
        network.make_loss(rung),
        shapes,
        data.Batch(*(x[:1] for x in train)),
        network.optimizer,
        algorithm_1(network),
        network.calendar.sizes.tolist(),
        sites=resized(network.sites, rung),
        widths=dict(zip(network.sites.names, network.protocol.start)),
        **_options(network),
        **growth,
    )


def algorithm_1(network: Network) -> tinyjax.schedules.Schedule:
    """The schedule of the paper, its growths due when the calendar says."""
    names, protocol, due = network.sites.names, network.protocol, network.calendar.due
    neurons, final = (dict(zip(names, widths)) for widths in (protocol.neurons, protocol.final))
    return paper.algorithm_1(neurons, final, lambda step: int(due[step]))


def _options(network: Network) -> dict[str, Any]:
    """What `fit` and its forecast have in common."""
    names, protocol = network.sites.names, network.protocol
    return dict(
        num_neurons=dict(zip(names, protocol.neurons)),
        final=dict(zip(names, protocol.final)),
        growth_samples=network.samples,
        estimate_micro_batch=protocol.estimation_micro_batch,
        make_loss=network.make_loss,
        policy=network.policy,
        trainable=trained,
        has_aux=True,
    )


def _first_rung(network: Network) -> dict[str, int]:
    """The capacities that hold the start and its first growth."""
    names, protocol = network.sites.names, network.protocol
    final = dict(zip(names, protocol.final))
    needed = (min(s + k, f) for s, k, f in zip(protocol.start, protocol.neurons, protocol.final))
    return network.policy(dict(zip(names, needed)), final)


def full_from_start(
    network: Network, seed: int, record: tinyjax.Record | None = None, widths: tuple[int, ...] | None = None
) -> Iterator[tinyjax.Record]:
    """The same batches for a network that does not grow: of the final widths, or of those given."""
    names = network.sites.names
    at = dict(zip(names, network.protocol.final if widths is None else widths))
    sites, key = resized(network.sites, at), jax.random.key(seed)
    state: dict[str, Any] = {}
    if record is not None:
        state = dict(opt_state=record.opt_state, step=record.step, history=record.history)
    return tinyjax.fit(
        network.make_loss(at),
        network.init(key, at) if record is None else record.params,
        stream(network, seed, state.get("step", 0)),
        network.optimizer,
        never,
        key,
        num_neurons=1,
        sites=sites,
        micro_batch=network.protocol.micro_batch,
        trainable=trained,
        has_aux=True,
        with_aux=with_running_statistics,
        programs=network.programs,
        **state,
    )


def prepare(config: argparse.Namespace) -> Task:
    """The task of a command line."""
    dataset, splits = load(config.dataset)
    network = build(PRESETS[config.preset], dataset, splits)
    measured = {**splits, "train": data.Batch(*(x[:EVALUATED] for x in splits["train"]))}
    steps = len(network.calendar.sizes)
    return Task(
        sites=network.sites,
        runs={
            "grown": partial(grow, network, method=METHODS[config.method], **own_update(config.method)),
            "random0 + dW*": partial(grow, network, method=methods.random0),
            "fixed": partial(full_from_start, network),
        },
        accuracy=network.correct,
        splits=measured,
        optimizer=network.optimizer,
        trainable=trained,
        steps=steps,
        evaluate_every=max(1, round(len(splits["train"].label) / network.calendar.sizes[-1])),
        num_train=len(splits["train"].label),
        forecast=partial(forecast, network, method=METHODS[config.method], **own_update(config.method)),
    )
