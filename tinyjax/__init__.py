"""Grow neural networks while they train: any JAX model in, a wider and better one out.

tinyjax measures from backpropagation alone where a network is stuck (its *expressivity bottleneck*), computes the best
update of its weights and the best neurons to add in closed form, and adds them inside a jitted training loop. It is
the method of Verbockhaven et al., *Growing Tiny Networks: Spotting Expressivity Bottlenecks and Fixing Them Optimally*
(TMLR 2024), for unmodified models in Flax, Equinox, Haiku or plain JAX.

Every example of these pages goes on from this one, a network of two hidden layers with 4 of their 12 neurons in use:

    >>> from functools import partial
    >>> import jax, jax.numpy as jnp, numpy as np, optax, tinyjax
    >>> from tinyjax import costs, data, forecast, methods, models, plot, schedules, work
    >>> key = jax.random.key(0)
    >>> images = jax.random.normal(key, (64, 2, 2, 1))
    >>> batch = data.Batch(images, (images[:, 0, 0, 0] > 0).astype(int))
    >>> network = models.MLP(widths=(12, 12), num_classes=2)
    >>> def loss_fn(params, batch):
    ...     logits = network.apply(params, batch.image)
    ...     return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()
    >>> params = network.init(key, images)
    >>> sites = tinyjax.find_sites(loss_fn, params, batch)
    >>> params = tinyjax.thin(params, sites, 4)
    >>> site = sites["hidden_1"]
    >>> estimate = jax.jit(partial(tinyjax.estimate, loss_fn, sites=site))
    >>> statistics = jax.jit(methods.with_ridges)(estimate(params, batch))  # held-out ridges, chosen once
    >>> optimizer = tinyjax.with_birth(optax.adam(1e-3))
    >>> opt_state = optimizer.init(params)
    >>> batches = [batch] * 4
    >>> schedule = tinyjax.every(100, 4, final=12, start=100)
    >>> run = tinyjax.fit(loss_fn, params, batches, optimizer, schedule, key, sites=site, num_neurons=4)
    >>> record = next(run)
"""

from tinyjax import analysis as analysis
from tinyjax import core as core
from tinyjax import data as data
from tinyjax import discovery as discovery
from tinyjax import estimation as estimation
from tinyjax import growth as growth
from tinyjax import methods as methods
from tinyjax import models as models
from tinyjax import plot as plot
from tinyjax import statistics as statistics
from tinyjax import surgery as surgery
from tinyjax import training as training
from tinyjax.analysis.diagnosis import diagnose
from tinyjax.analysis.site_scores import score_sites
from tinyjax.core.site import Site, Sites
from tinyjax.core.slots import width
from tinyjax.discovery.sites import find_sites
from tinyjax.estimation.estimator import estimate
from tinyjax.growth.grow_step import make_grow_step
from tinyjax.growth.info import GrowthInfo, Status, check
from tinyjax.growth.optimizer.birth import with_birth
from tinyjax.statistics.record import Statistics
from tinyjax.surgery.capacity_policies import multiple_of
from tinyjax.surgery.pruning import prune
from tinyjax.surgery.resizing import compact, resize
from tinyjax.surgery.thinning import thin
from tinyjax.training import cost_model
from tinyjax.training import forecast as forecast
from tinyjax.training import schedules as schedules
from tinyjax.training.checkpoint.exports import export
from tinyjax.training.checkpoint.interrupt import stop_on_interrupt
from tinyjax.training.checkpoint.run import restore, save
from tinyjax.training.loop import Record, fit
from tinyjax.training.reporting import progress
from tinyjax.training.schedules import costs as costs
from tinyjax.training.schedules.basic import early, every
from tinyjax.training.steps import train_epoch, train_step

work = cost_model
__version__ = "0.2.0.dev0"
__all__ = [
    "__version__",
    "check",
    "compact",
    "diagnose",
    "early",
    "estimate",
    "every",
    "export",
    "find_sites",
    "fit",
    "GrowthInfo",
    "make_grow_step",
    "multiple_of",
    "progress",
    "prune",
    "Record",
    "resize",
    "restore",
    "save",
    "score_sites",
    "Site",
    "Sites",
    "Statistics",
    "Status",
    "stop_on_interrupt",
    "thin",
    "train_epoch",
    "train_step",
    "width",
    "with_birth",
]
_ROOMS = [
    "analysis",
    "core",
    "costs",
    "data",
    "discovery",
    "estimation",
    "forecast",
    "growth",
    "methods",
    "models",
    "plot",
    "schedules",
    "statistics",
    "surgery",
    "training",
    "work",
]


def __dir__() -> list[str]:
    """The names of the front page, and the rooms where all others are."""
    return [*__all__, *_ROOMS]
