"""Where to grow: what a growth is worth at the output of the network, in the unit of the loss.

Gains of different sites are in units of different layers and do not rank them. Here every candidate move of the
parameters is carried to the output z by one forward derivative; there the loss is expanded to second order, which gives
the best decrease along the move and the amplitude that reaches it. Neurons are computed from one half of the samples
and scored on the other.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.arguments import per_site
from tinyjax.core.batch import batch_size, take_samples
from tinyjax.core.kernels import require_growable
from tinyjax.core.linalg import matmul
from tinyjax.core.params import Params
from tinyjax.core.site import Site, as_sites
from tinyjax.core.stacks import map_layers
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.estimator import estimate_batch
from tinyjax.estimation.options import SumOptions
from tinyjax.methods import Method, Neurons, in_outputs, is_stochastic, needs, orthonormal, refit, tiny0, with_ridges
from tinyjax.methods.solvers.ridge import held_out_best_update
from tinyjax.statistics.record import Statistics
from tinyjax.surgery import add_update, write

Outputs = Callable[[Params, Any], Any]
Objective = Callable[[Any, Any], Array]
Update = Callable[[Statistics], Array]


class Move(NamedTuple):
    """How the loss changes along a move of the parameters, to second order at the output of the network.

    Attributes:
        slope: () <v_z, dz> = minus the derivative of the loss.
        curvature: () <dz, H dz>, H the Hessian of the loss with respect to the output.
    """

    slope: Array
    curvature: Array

    @property
    def gain(self) -> Array:
        """The largest decrease of the quadratic model, max(slope, 0)^2 / (2 curvature), ()."""
        bends = self.curvature > 0
        return jnp.where(bends, jnp.maximum(self.slope, 0) ** 2 / (2 * jnp.where(bends, self.curvature, 1)), 0)

    @property
    def amplitude(self) -> Array:
        """The multiple of the move that reaches it, (): where a line search may start."""
        bends = self.curvature > 0
        return jnp.where(bends, jnp.maximum(self.slope, 0) / jnp.where(bends, self.curvature, 1), 0)


class Score(NamedTuple):
    """What growing one site is worth on samples it was not computed from.

    Attributes:
        gain: () decrease of the loss by neurons and update together beyond the update alone. Negative where the neurons
            spoil the update.
        gain_update: () decrease by the update alone.
        amplitude: () of neurons and update together.
    """

    gain: Array
    gain_update: Array
    amplitude: Array


def gauss_newton(model: Outputs, objective: Objective, params: Params, tangent: Params, batch: Any) -> Move:
    """The Gauss-Newton model of the loss along `params + t tangent`.

    One forward derivative through the model and two through the objective; no gradient, no matrix.

    Args:
        model: `model(params, batch) -> z`, any pytree of outputs.
        objective: `objective(z, batch) -> loss`, convex in z (cross-entropy, squared error), a mean over samples.
        params: where to expand.
        tangent: the move, of the structure of `params`.
        batch: the samples to score on.

    Raises:
        ValueError: the objective is not a scalar.

    Example:
        >>> def model(params, batch):
        ...     return network.apply(params, batch.image)
        >>> def objective(logits, batch):
        ...     return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()
        >>> downhill = jax.tree.map(jnp.negative, jax.grad(loss_fn)(params, batch))
        >>> bool(tinyjax.analysis.gauss_newton(model, objective, params, downhill, batch).amplitude > 0)
        True
    """
    z, dz = jax.jvp(lambda p: model(p, batch), (params,), (tangent,))
    return move_at_output(objective, z, dz, batch)


def move_at_output(objective: Objective, z: Any, dz: Any, batch: Any) -> Move:
    """The Gauss-Newton model of the loss along a move `dz` of the output `z`; see `gauss_newton`."""

    def slope_at(z: Any) -> Array:
        return jax.jvp(lambda y: objective(y, batch), (z,), (dz,))[1]

    slope, curvature = jax.jvp(slope_at, (z,), (dz,))
    if slope.shape != ():
        raise ValueError(f"`objective` must return one scalar, the mean over the samples; got shape {slope.shape}")
    return Move(-slope, curvature)


def score_sites(
    model: Outputs,
    objective: Objective,
    params: Params,
    batch: Any,
    sites: Site | Sequence[Site],
    *,
    num_neurons: int | Mapping[str, int],
    method: Method = tiny0,
    update: Update | None = held_out_best_update,
    key: Array | None = None,
) -> dict[str, Score]:
    """What growing each site is worth, in the unit of the loss: the larger, the better a place to grow.

    Neurons and updates come from the first half of the batch, scores from the second. A birth is scored by its fan-out,
    with the fan-in in place at its size; neurons born without a fan-out are given the best one. Neurons born without a
    fan-in (`gradmax`) are scored by the best fan-in, with the fan-out in place. Pure: `jit` it.

    Args:
        model: `model(params, batch) -> z`.
        objective: `objective(z, batch) -> loss`; `objective(model(params, batch), batch)` is the loss of `find_sites`.
        params: the parameters; sites without a free slot score 0 (`resize` them first).
        batch: at least 4 samples.
        sites: growable sites.
        num_neurons: how many would be added, static: for all sites or by name.
        method: from statistics to neurons.
        update: from statistics to the update that goes with them; None for none.
        key: for a stochastic method.

    Returns:
        A score for each site, by name.

    Raises:
        ValueError: a site that cannot grow or has no number of neurons, a batch too small, or a method without its key.

    Example:
        >>> def model(params, batch):
        ...     return network.apply(params, batch.image)
        >>> def objective(logits, batch):
        ...     return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()
        >>> score = jax.jit(partial(tinyjax.score_sites, model, objective, sites=sites, num_neurons=4))
        >>> scores = score(params, batch)
        >>> best = max(scores, key=lambda name: float(scores[name].gain))
    """
    sites = as_sites(sites)
    counts = per_site(sites, num_neurons)
    for site in sites:
        require_growable(site)
        if site.name not in counts:
            raise ValueError(f"`num_neurons` has no entry for site `{site.name}`")
    if is_stochastic(method) and key is None:
        raise ValueError("the method draws random numbers: pass `key=`")
    num_samples = batch_size(batch)
    if num_samples < 4:
        raise ValueError(f"scoring needs at least 4 samples, half of them to compute neurons from; got {num_samples}")
    middle = num_samples // 2
    fitting, scoring = take_samples(batch, 0, middle), take_samples(batch, middle, num_samples)

    def loss_fn(params: Params, batch: Any) -> Array:
        return objective(model(params, batch), batch)

    options = SumOptions(num_gates=counts, **needs(method))
    found = estimate_batch(TracedLoss(loss_fn), params, fitting, sites, options).statistics
    scores = {}
    for index, site in enumerate(sites):
        fit = partial(_fit, method, update, counts[site.name])
        keys = None if key is None else jax.random.fold_in(key, index)
        if site.stack and keys is not None:
            keys = jax.random.split(keys, site.stack)
        born, neurons, delta = map_layers(site, fit)(found[site.name], keys)
        move_along = partial(gauss_newton, model, objective)
        scores[site.name] = _score(move_along, params, site, born, neurons, delta, scoring)
    return scores


def _fit(
    method: Method, update: Update | None, num_neurons: int, statistics: Statistics, key: Array | None
) -> tuple[Neurons, Neurons, Array | None]:
    """The neurons of one layer with one side in place, with both sides, and the update that goes with them."""
    statistics, basis = orthonormal(statistics)
    statistics = with_ridges(statistics)
    neurons = method(statistics, num_neurons=num_neurons, key=key)
    delta = neurons.delta
    if update is not None:
        if delta is not None:
            raise ValueError("the method brings its own update of the consumer: pass `update=None`")
        delta = update(statistics)
    if statistics.normed:  # a norm would see the fan-in: the fan-out is in place
        born = neurons._replace(alpha=jnp.zeros_like(neurons.alpha), delta=None)
    else:
        born = neurons._replace(omega=jnp.where(jnp.any(neurons.alpha != 0), 0, neurons.omega), delta=None)
    full = refit(statistics, neurons, delta)._replace(delta=None)
    born, full = in_outputs(born, basis), in_outputs(full, basis)
    return born, full, delta if basis is None or delta is None else matmul(delta, basis.T)


def _score(
    move_along: Callable[[Params, Params, Any], Move],
    params: Params,
    site: Site,
    born: Neurons,
    neurons: Neurons,
    delta: Array | None,
    batch: Any,
) -> Score:
    """The score of neurons and update at one site."""
    start, _ = write(params, site, born, amplitude=1.0)
    written, _ = write(params, site, neurons, amplitude=1.0)
    births = _difference(written, start)
    if delta is None:
        together = move_along(start, births, batch)
        return Score(together.gain, jnp.zeros_like(together.gain), together.amplitude)
    updating = _difference(add_update(params, site, delta, amplitude=1.0), params)
    together = move_along(start, jax.tree.map(jnp.add, births, updating), batch)
    alone = move_along(params, updating, batch)
    return Score(together.gain - alone.gain, alone.gain, together.amplitude)


def _difference(after: Params, before: Params) -> Params:
    return jax.tree.map(jnp.subtract, after, before)
