"""The multilayer perceptron of `experiments.grow`: two hidden layers, grown from width 2 to 64.

Growths lie in the first quarter of training: best update of the existing weights at an amplitude found by line search,
then the neurons. All runs share data, batches, steps and optimizer.
"""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tinyjax
from experiments.beyond.controls import never, no_neurons
from experiments.demo.runs import METHODS, Refused, Task, load, own_update
from tinyjax import data, methods
from tinyjax.core.site import resized
from tinyjax.models import MLP
from tinyjax.surgery import all_params
from tinyjax.training.schedules.basic import Additions, Widths

EPOCHS = {"digits": 40, "mnist5k": 20}


def prepare(config: argparse.Namespace) -> Task:
    """The task of a command line."""
    dataset, splits = load(config.dataset)
    train = splits["train"]
    model = MLP(widths=tuple(config.widths), num_classes=dataset.num_classes)
    small = MLP(widths=(config.start,) * len(config.widths), num_classes=dataset.num_classes)

    def logits(params: Any, batch: data.Batch) -> Any:
        return model.apply(params, batch.image)

    def loss_fn(params: Any, batch: data.Batch) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch.label).mean()

    @jax.jit
    def accuracy(params: Any, batch: data.Batch) -> jax.Array:
        return jnp.mean(logits(params, batch).argmax(-1) == batch.label)

    params = jax.eval_shape(model.init, jax.random.key(0), train.image[:1])
    sites = tinyjax.find_sites(loss_fn, params, train).growable
    final = {site.name: site.capacity for site in sites}
    optimizer = tinyjax.with_birth(optax.adam(config.learning_rate))
    if config.batch_size > len(train.label):
        raise Refused(f"--batch-size {config.batch_size} is more than the {len(train.label)} training samples")
    steps_per_epoch = len(train.label) // config.batch_size
    steps = config.epochs * steps_per_epoch
    if config.growths > steps // 4:
        raise Refused(
            f"--growths {config.growths} do not fit into the first quarter of training, {steps // 4} steps: ask for "
            "fewer, or for more --epochs"
        )
    schedule = tinyjax.early(steps, events=config.growths, final=final)
    start_widths = {name: config.start for name in sites.names}
    most = _largest_growth(schedule, steps, start_widths)

    @jax.jit
    def init(key: jax.Array) -> Any:
        return model.init(key, train.image[:1])

    @jax.jit
    def init_small(key: jax.Array) -> Any:
        """A network of the starting widths, initialised as such, then given room."""
        params = small.init(key, train.image[:1])
        return tinyjax.resize(params, resized(sites, start_widths), final)[0]

    def batches(seed: int, step: int) -> Iterator[data.Batch]:
        for epoch in range(step // steps_per_epoch, config.epochs):
            skipped = step - epoch * steps_per_epoch
            of_epoch = data.batches(train, batch_size=config.batch_size, seed=seed, epoch=epoch)
            yield from itertools.islice(of_epoch, max(0, skipped), None)

    def trained(seed: int, record: tinyjax.Record | None, params: Any, schedule: Any, **growth: Any) -> Any:
        step = 0 if record is None else record.step
        state = {} if record is None else dict(opt_state=record.opt_state, history=record.history)
        return tinyjax.fit(
            loss_fn,
            params if record is None else record.params,
            batches(seed, step),
            optimizer,
            schedule,
            jax.random.key(seed),
            num_neurons=most,
            sites=sites,
            step=step,
            growth_samples=len(train.label),
            **state,
            **growth,
        )

    def growing(method: methods.Method, **options: Any) -> Any:
        def start(seed: int, record: tinyjax.Record | None) -> Iterator[tinyjax.Record]:
            return trained(seed, record, init_small(jax.random.key(seed)), schedule, method=method, **options)

        return start

    def fixed(seed: int, record: tinyjax.Record | None) -> Iterator[tinyjax.Record]:
        return trained(seed, record, init(jax.random.key(seed)), never)

    train_step = jax.jit(tinyjax.train_step(loss_fn, optimizer))
    update_step = jax.jit(
        tinyjax.make_grow_step(loss_fn, sites, num_neurons=1, method=no_neurons, fill=None, optimizer=optimizer)
    )

    def fixed_with_updates(seed: int, record: tinyjax.Record | None) -> Iterator[tinyjax.Record]:
        """The full network with the best updates of the growing one: the calendar is that of its widths."""
        step = 0 if record is None else record.step
        params = init(jax.random.key(seed)) if record is None else record.params
        opt_state = optimizer.init(params) if record is None else record.opt_state
        history = () if record is None else record.history
        widths = dict(start_widths)
        for done in range(step):
            widths = _wider(widths, schedule(done, widths, ()))
        for done, batch in enumerate(batches(seed, step), start=step):
            info = None
            if added := schedule(done, widths, ()):
                widths = _wider(widths, added)
                params, opt_state, info = update_step(
                    params, train, opt_state, jax.random.fold_in(jax.random.key(seed), done), dict.fromkeys(added, 1)
                )
                history += (info,)
            params, opt_state, loss, _ = train_step(params, opt_state, batch)
            yield tinyjax.Record(done + 1, loss, info, dict(final), params, opt_state, sites, loss_fn, history)

    return Task(
        sites=sites,
        runs={
            "grown": growing(METHODS[config.method], **own_update(config.method)),
            "random0 + dW*": growing(methods.random0),
            "fixed": fixed,
            "fixed + dW*": fixed_with_updates,
        },
        accuracy=lambda params, sites, batch: float(accuracy(params, batch)),
        splits=splits,
        optimizer=optimizer,
        trainable=all_params,
        steps=steps,
        evaluate_every=steps_per_epoch,
        num_train=len(train.label),
    )


def _wider(widths: Widths, added: Additions) -> dict[str, int]:
    return {name: width + added.get(name, 0) for name, width in widths.items()}


def _largest_growth(schedule: tinyjax.schedules.Schedule, steps: int, widths: dict[str, int]) -> int:
    """The most neurons the schedule asks for at once."""
    most = 1
    for step in range(steps):
        added = schedule(step, widths, ())
        most = max([most, *added.values()])
        widths = _wider(widths, added)
    return most
