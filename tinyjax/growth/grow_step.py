"""One growth as a pure function: statistics, best update, new neurons, amplitude, write.

`make_grow_step` fixes what is static (the sites, the method, the largest number of neurons) and returns a function of
arrays that compiles once, runs inside `jit` and `scan` next to training steps, and never makes the loss of its batch
rise.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from tinyjax.core.batch import batch_size
from tinyjax.core.params import Params
from tinyjax.core.shared_programs import shared
from tinyjax.core.site import Site, Sites, as_sites
from tinyjax.core.stacks import map_layers
from tinyjax.discovery.dimensions.loss_form import require_mean
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.conv_squares import bounded_squares
from tinyjax.estimation.estimator import estimate_batch
from tinyjax.estimation.options import SumOptions
from tinyjax.growth.batch_split import BatchParts, split_batch
from tinyjax.growth.checks import by_name, check_static, check_wanted
from tinyjax.growth.fitting import Update
from tinyjax.growth.info import GrowthInfo, check
from tinyjax.growth.input_spectra import Inputs
from tinyjax.growth.line_searches import fixed, line_search, trusted_search
from tinyjax.growth.optimizer.reset import reset_grown
from tinyjax.growth.site_growth import Amplitude, Recipe, grow_site, skip_site
from tinyjax.methods import (
    HowMany,
    Method,
    Neurons,
    common_residual,
    is_function_preserving,
    needs,
    random0,
    tiny0,
)
from tinyjax.methods.solvers.ridge import held_out_best_update
from tinyjax.methods.solvers.traits import require_array
from tinyjax.statistics.record import Statistics, without_rows
from tinyjax.surgery import Frozen, Trainable, all_params, frozen_leaves
from tinyjax.surgery.frozen import frozen_rows, require_unfrozen

Orient = Callable[..., Neurons]


def make_grow_step(
    loss_fn: Callable[..., Any],
    sites: Site | Sequence[Site],
    *,
    num_neurons: int | Mapping[str, int],
    method: Method = tiny0,
    update: Update | None = held_out_best_update,
    amplitude: Amplitude | None = None,
    update_amplitude: Amplitude = trusted_search,
    fill: Method | None = random0,
    orient: Orient | None = None,
    optimizer: Any = None,
    trainable: Trainable = all_params,
    has_aux: bool = False,
    refresh: bool = False,
    estimate_micro_batch: int | None = None,
    how_many: HowMany | None = None,
    null_draws: int = 0,
) -> Callable[..., Any]:
    """A pure function that grows a network by one round.

    At each site in turn: the best update of the consumer at an amplitude found by line search, then the neurons of
    `method` at theirs, then `fill` for the slots that rank or amplitude left empty. Each is kept only if the loss of
    the whole batch does not rise. Statistics come from the first three quarters of the batch (one capture for all
    sites), line searches use the last quarter.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, the mean over the samples of the batch.
        sites: growable sites, from `find_sites`; grown in this order.
        num_neurons: neurons to add at each site, static: the largest number where `neurons` is passed. By name or one
            for all.
        method: from statistics to neurons. Sums that it declares to need are estimated for it, see `traits`.
        update: from statistics to the update of the consumer's existing weights; None for none.
        amplitude: of the neurons; default `line_search`, or 1 for a method that keeps the function.
        update_amplitude: of the update; by default `trusted_search`, an early stop.
        fill: a method that keeps the function, for the slots left empty; None leaves them empty.
        orient: which of a neuron and its twin to add, `better_twins` by their slopes in the real network (ReLU tells
            them apart); None takes them as the method gives them.
        optimizer: an Optax optimizer whose state travels along; newborn slots start afresh (wrap it in `with_birth`).
            What it never moves (`set_to_zero`, masks, labels) no growth changes.
        trainable: the part of the parameters that the optimizer sees; no growth changes the rest.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
        refresh: estimate again before each site instead of once a round.
        estimate_micro_batch: statistics of so many samples at a time, see `micro_batch` of `estimate`: for more samples
            than one capture has room for; best a divisor of three quarters of the batch. Search and acceptance
            still run forward on all their samples at once.
        how_many: from statistics to the largest number of neurons to add, 0 to skip the site; for a stack of layers the
            most that one of them asks for. None for no limit.
        null_draws: give `how_many` sign-flipped sums, see `estimate`.

    Returns:
        `params, info = grow_step(params, batch, key=None, neurons=None, inputs=None)`, or with an optimizer
        `params, opt_state, info = grow_step(params, batch, opt_state, key=None, neurons=None, inputs=None)`. `neurons`
        is an int a site (traced or not; one for all or by name), 0 skips the site. Without `key` the filler's key is
        derived from the loss and the widths. `inputs` is what `decompose_inputs` found on this very batch. Called
        outside of a trace it is jitted and passes `info` to `check`. Made again of the same functions and equal
        options, it shares what is compiled, as long as that is among the programs used last.

    Raises:
        ValueError: a site that cannot grow, `num_neurons` below 1 or beyond the capacity, a line search with a method
            that keeps the function, a `fill` that does not; when called, a loss that sums over the samples, or a site
            whose neurons are read by a frozen kernel.

    Example:
        >>> grow_step = tinyjax.make_grow_step(loss_fn, site, num_neurons=8)
        >>> params, info = grow_step(params, batch)
        >>> int(info.width["hidden_1"]), bool(info.loss_after["hidden_1"] <= info.loss_before["hidden_1"])
        (12, True)
    """
    sites = as_sites(sites)
    counts = check_static(sites, by_name(sites, num_neurons, "num_neurons"), method, amplitude, fill)
    steps = (method, update, amplitude, update_amplitude, fill, orient)
    given = (optimizer, trainable, has_aux, refresh, estimate_micro_batch, how_many, null_draws)
    made_of = ("growth", loss_fn, sites, counts, steps, given)
    if amplitude is None:
        amplitude = fixed(1.0) if is_function_preserving(method) else line_search

    wanted_sums = needs(method, fill)
    draws = max(null_draws, wanted_sums.get("null_draws", 0))
    # Other updates, null draws and rules for how many may read what is projected otherwise.
    usual = update is held_out_best_update and how_many is None and not draws
    project = common_residual(method, fill) if usual else None
    wanted = wanted_sums | {"null_draws": draws, "project": project}
    options = SumOptions(num_gates=counts, micro_batch=estimate_micro_batch, **wanted)

    def statistics_of(
        loss: TracedLoss,
        params: Params,
        batch: Any,
        inputs: Mapping[str, Inputs],
        asked: Mapping[str, Array],
        frozen: Frozen,
    ) -> dict[str, Statistics]:
        rows = {site.name: frozen_rows(site, frozen) for site in sites}
        chosen = dataclasses.replace(options, project=None) if any(rows.values()) else options
        found = estimate_batch(loss, params, batch, sites, chosen, asked=asked)
        return {
            name: without_rows(_with_inputs(name, s, inputs.get(name)), rows[name])
            for name, s in found.statistics.items()
        }

    def limited(site: Site, statistics: Statistics, wanted: Array) -> Array:
        if how_many is None:
            return wanted
        rule = map_layers(site, how_many)
        most = jax.lax.cond(
            wanted > 0, lambda s: jnp.max(rule(s)).astype(jnp.int32), lambda s: jnp.zeros((), jnp.int32), statistics
        )
        return jnp.minimum(wanted, most)

    def grow(
        params: Params,
        batch: Any,
        opt_state: Any,
        key: Array | None,
        neurons: Mapping[str, Array],
        inputs: Mapping[str, Inputs],
    ) -> tuple[Any, ...]:
        frozen = frozen_leaves(params, optimizer, trainable)
        require_unfrozen(sites, frozen)
        loss = TracedLoss(loss_fn, has_aux)
        recipe = Recipe(loss, method, update, amplitude, update_amplitude, fill, orient, frozen)
        parts = _parts(loss, params, batch, sites)
        asked = {name: k > 0 for name, k in neurons.items()} if len(sites) > 1 else {}
        found = statistics_of(loss, params, parts.estimation, inputs, asked, frozen)
        squares = bounded_squares(loss, params, parts.estimation, sites)
        current = loss(params, parts.whole)
        rows = {}
        for index, site in enumerate(sites):
            if refresh and index:
                found = statistics_of(loss, params, parts.estimation, inputs, asked, frozen)
                squares = bounded_squares(loss, params, parts.estimation, sites)
            site_key = None if key is None else jax.random.fold_in(key, index)
            exact = squares.get(site.name)
            one = partial(grow_site, recipe, site, counts[site.name], parts, squares=exact, key=site_key)
            wanted = limited(site, found[site.name], neurons[site.name])
            statistics = found[site.name]
            if "null_draws" not in wanted_sums:
                statistics = dataclasses.replace(statistics, null=None)
            params, rows[site.name] = jax.lax.cond(
                wanted > 0, one, partial(skip_site, site), params, statistics, current, wanted
            )
            current = rows[site.name]["loss_after"]
        info = GrowthInfo(**{field: {name: row[field] for name, row in rows.items()} for field in GrowthInfo._fields})
        if optimizer is None:
            return params, info
        return params, reset_grown(optimizer, opt_state, params, sites, info.born, trainable=trainable), info

    compiled = shared(made_of, lambda: jax.jit(grow))

    def run(
        params: Params, batch: Any, opt_state: Any, key: Array | None, neurons: Any, inputs: Mapping[str, Inputs] | None
    ) -> tuple[Any, ...]:
        wanted = counts if neurons is None else {name: 0 for name in sites.names} | by_name(sites, neurons, "neurons")
        check_wanted(wanted, counts)
        if key is not None:
            require_array(key)
        batch_size(batch)
        result = compiled(
            params, batch, opt_state, key, {name: jnp.asarray(k, jnp.int32) for name, k in wanted.items()}, inputs or {}
        )
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(result)):
            check(result[-1])
        return result

    if optimizer is None:

        def grow_step(
            params: Params, batch: Any, key: Array | None = None, neurons: Any = None, inputs: Any = None
        ) -> Any:
            return run(params, batch, None, key, neurons, inputs)

        return grow_step

    def grow_step_with_optimizer(
        params: Params, batch: Any, opt_state: Any, key: Array | None = None, neurons: Any = None, inputs: Any = None
    ) -> Any:
        return run(params, batch, opt_state, key, neurons, inputs)

    return grow_step_with_optimizer


def _with_inputs(name: str, statistics: Statistics, inputs: Inputs | None) -> Statistics:
    """The statistics with what is known of their S; XLA then drops the sum that nothing uses."""
    if inputs is None:
        return statistics
    if inputs.gram_prev.shape != statistics.gram_prev.shape:
        raise ValueError(
            f"`inputs` of site `{name}` has S of shape {inputs.gram_prev.shape}, the site has "
            f"{statistics.gram_prev.shape}: call `decompose_inputs` again with these sites and this batch"
        )
    return dataclasses.replace(statistics, gram_prev=inputs.gram_prev, spectra=inputs.spectra)


def _parts(loss: TracedLoss, params: Params, batch: Any, sites: Sites) -> BatchParts:
    """The parts of the batch, with what searches and births under a normalisation need of the traced loss."""
    estimation, search = split_batch(batch)
    require_mean(loss.trace(params, estimation), loss.trace(params, search))
    parts = BatchParts(estimation, search, batch, loss.trace(params, search))
    if not any(site.norm is not None for site in sites):
        return parts
    paths = {name: paths[0] for name, paths in loss.discover(params, batch).paths.items()}
    return parts._replace(normalised=(loss.trace(params, batch), paths))
