"""Grow neural networks while they train: any JAX model in, a wider and better one out.

tinyjax measures from backpropagation alone where a network is stuck (its *expressivity bottleneck*), computes the best
update of its weights and the best neurons to add in closed form, and adds them inside a jitted training loop. It is
the method of Verbockhaven et al., *Growing Tiny Networks: Spotting Expressivity Bottlenecks and Fixing Them Optimally*
(TMLR 2024), for unmodified models in Flax, Equinox, Haiku or plain JAX.

Every example of these pages goes on from this one, a network of two hidden layers with 4 of their 12 neurons in use:

    >>> from functools import partial
    >>> import jax, jax.numpy as jnp, numpy as np, optax, tinyjax
    >>> from tinyjax import costs, data, forecast, methods, models, plot, work
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

from tinyjax.brakes import budget as budget
from tinyjax.brakes import plateau as plateau
from tinyjax.brakes import worthwhile as worthwhile
from tinyjax.checkpoint import Checkpoint as Checkpoint
from tinyjax.checkpoint import export as export
from tinyjax.checkpoint import restore as restore
from tinyjax.checkpoint import save as save
from tinyjax.checkpoint import stop_on_interrupt as stop_on_interrupt
from tinyjax.costs import flop_cost as flop_cost
from tinyjax.costs import forward_flops as forward_flops
from tinyjax.costs import parameter_cost as parameter_cost
from tinyjax.costs import parameters as parameters
from tinyjax.diagnosis import Diagnosis as Diagnosis
from tinyjax.diagnosis import Finding as Finding
from tinyjax.diagnosis import diagnose as diagnose
from tinyjax.edges import Edge as Edge
from tinyjax.edges import score_edges as score_edges
from tinyjax.estimate import estimate as estimate
from tinyjax.growth import make_grow_step as make_grow_step
from tinyjax.info import GrowthInfo as GrowthInfo
from tinyjax.info import Status as Status
from tinyjax.info import check as check
from tinyjax.inputs import Inputs as Inputs
from tinyjax.inputs import decompose_inputs as decompose_inputs
from tinyjax.methods import Bottleneck as Bottleneck
from tinyjax.methods import ConvGains as ConvGains
from tinyjax.methods import Neurons as Neurons
from tinyjax.methods import best_update as best_update
from tinyjax.methods import bottleneck as bottleneck
from tinyjax.methods import completed as completed
from tinyjax.methods import conv_gains as conv_gains
from tinyjax.methods import energy as energy
from tinyjax.methods import fisher_tiny as fisher_tiny
from tinyjax.methods import fraction as fraction
from tinyjax.methods import gradmax as gradmax
from tinyjax.methods import gradmax_dual as gradmax_dual
from tinyjax.methods import held_out as held_out
from tinyjax.methods import held_out_gain as held_out_gain
from tinyjax.methods import held_out_update as held_out_update
from tinyjax.methods import net2net as net2net
from tinyjax.methods import north as north
from tinyjax.methods import north_weight as north_weight
from tinyjax.methods import predicted_gain as predicted_gain
from tinyjax.methods import random as random
from tinyjax.methods import random0 as random0
from tinyjax.methods import rank_trigger as rank_trigger
from tinyjax.methods import second_order as second_order
from tinyjax.methods import significant as significant
from tinyjax.methods import tiny as tiny
from tinyjax.methods import tiny0 as tiny0
from tinyjax.methods import tiny_conv_als as tiny_conv_als
from tinyjax.methods import tiny_joint as tiny_joint
from tinyjax.methods import tiny_linear as tiny_linear
from tinyjax.methods import tiny_unprojected as tiny_unprojected
from tinyjax.methods import traits as traits
from tinyjax.optimizer import everything as everything
from tinyjax.optimizer import fresh as fresh
from tinyjax.optimizer import reset_grown as reset_grown
from tinyjax.optimizer import with_birth as with_birth
from tinyjax.optimizer import zeros as zeros
from tinyjax.ranking import Score as Score
from tinyjax.ranking import gauss_newton as gauss_newton
from tinyjax.ranking import score_sites as score_sites
from tinyjax.report import log_line as log_line
from tinyjax.report import progress as progress
from tinyjax.report import summary as summary
from tinyjax.scaling import fixed as fixed
from tinyjax.scaling import line_search as line_search
from tinyjax.scaling import normalize as normalize
from tinyjax.scaling import normalized as normalized
from tinyjax.scaling import trusted_search as trusted_search
from tinyjax.scaling import twin_search as twin_search
from tinyjax.schedule import Schedule as Schedule
from tinyjax.schedule import early as early
from tinyjax.schedule import every as every
from tinyjax.schedule import most_gain as most_gain
from tinyjax.schedule import round_robin as round_robin
from tinyjax.site import Kernel as Kernel
from tinyjax.site import Member as Member
from tinyjax.site import Site as Site
from tinyjax.site import Sites as Sites
from tinyjax.sites import find_sites as find_sites
from tinyjax.statistics import Moments as Moments
from tinyjax.statistics import Statistics as Statistics
from tinyjax.statistics import merge as merge
from tinyjax.statistics import merge_over as merge_over
from tinyjax.statistics import moments as moments
from tinyjax.surgery import add_update as add_update
from tinyjax.surgery import compact as compact
from tinyjax.surgery import exact as exact
from tinyjax.surgery import full as full
from tinyjax.surgery import geometric as geometric
from tinyjax.surgery import multiple_of as multiple_of
from tinyjax.surgery import prune as prune
from tinyjax.surgery import resize as resize
from tinyjax.surgery import thin as thin
from tinyjax.surgery import width as width
from tinyjax.surgery import write as write
from tinyjax.training import Record as Record
from tinyjax.training import fit as fit
from tinyjax.training import train_epoch as train_epoch
from tinyjax.training import train_step as train_step
from tinyjax.twins import better_twins as better_twins
from tinyjax.twins import twin_slopes as twin_slopes
