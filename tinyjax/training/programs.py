"""What a run compiles, once a capacity."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.batch import batch_size, take_samples
from tinyjax.core.params import Params
from tinyjax.core.shared_programs import shared
from tinyjax.core.site import Sites
from tinyjax.growth.grow_step import make_grow_step
from tinyjax.growth.info import GrowthInfo
from tinyjax.training.steps import LossFn, WithAux, _gradient_step, _mean_update, _update_step, train_step


class _TrainingPrograms(NamedTuple):
    """Jitted: a step; and in parts, for micro-batches, a gradient, a sum of two, and the update by their mean."""

    step: Callable[..., Any]
    gradient: Callable[..., Any]
    add: Callable[..., Any]
    update: Callable[..., Any]


def _training_programs(loss_fn: LossFn, options: Mapping[str, Any]) -> _TrainingPrograms:
    optimizer, trainable, has_aux = given = tuple(options[name] for name in ("optimizer", "trainable", "has_aux"))

    def make() -> _TrainingPrograms:
        return _TrainingPrograms(
            jax.jit(train_step(loss_fn, optimizer, trainable=trainable, has_aux=has_aux)),
            jax.jit(_gradient_step(loss_fn, trainable, has_aux)),
            jax.jit(partial(jax.tree.map, jnp.add), donate_argnums=0),
            jax.jit(partial(_mean_update, _update_step(optimizer, trainable))),
        )

    return shared(("training", loss_fn, *given), make)


_Programs = tuple[_TrainingPrograms, dict[frozenset[str], Callable[..., Any]]]


class CompiledPrograms:
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
        """One growth of the sites that `neurons` names, by a program that knows them."""
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
        return make_grow_step(self._loss_fn, sites, num_neurons=counts, **self._options)

    def train(self, params: Params, opt_state: Any, batch: Any, micro_batch: int | None) -> tuple[Params, Any, Array]:
        """One step of training, in parts of `micro_batch` samples if given."""
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


def _at_capacities(info: GrowthInfo, sites: Sites) -> bool:
    """Whether a growth happened at the present capacities."""
    here = {site.name: site.capacity for site in sites}
    return all(born.shape[-1] == here.get(name) for name, born in info.born.items())
