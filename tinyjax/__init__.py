"""Grow neural networks while they train: any JAX model in, a wider and better one out.

tinyjax measures from backpropagation alone where a network is stuck (its *expressivity bottleneck*), computes the best
update of its weights and the best neurons to add in closed form, and adds them inside a jitted training loop. It is
the method of Verbockhaven et al., *Growing Tiny Networks: Spotting Expressivity Bottlenecks and Fixing Them Optimally*
(TMLR 2024), for unmodified models in Flax, Equinox, Haiku or plain JAX.
"""

from tinyjax.checkpoint import Checkpoint as Checkpoint
from tinyjax.checkpoint import export as export
from tinyjax.checkpoint import restore as restore
from tinyjax.checkpoint import save as save
from tinyjax.checkpoint import stop_on_interrupt as stop_on_interrupt
from tinyjax.diagnosis import Diagnosis as Diagnosis
from tinyjax.diagnosis import Finding as Finding
from tinyjax.diagnosis import diagnose as diagnose
from tinyjax.estimate import estimate as estimate
from tinyjax.growth import make_grow_step as make_grow_step
from tinyjax.info import GrowthInfo as GrowthInfo
from tinyjax.info import Status as Status
from tinyjax.info import check as check
from tinyjax.methods import Bottleneck as Bottleneck
from tinyjax.methods import Neurons as Neurons
from tinyjax.methods import best_update as best_update
from tinyjax.methods import bottleneck as bottleneck
from tinyjax.methods import completed as completed
from tinyjax.methods import fisher_tiny as fisher_tiny
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
from tinyjax.methods import tiny as tiny
from tinyjax.methods import tiny0 as tiny0
from tinyjax.methods import tiny_conv_als as tiny_conv_als
from tinyjax.methods import tiny_joint as tiny_joint
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
from tinyjax.scaling import fixed as fixed
from tinyjax.scaling import line_search as line_search
from tinyjax.scaling import normalize as normalize
from tinyjax.scaling import normalized as normalized
from tinyjax.scaling import trusted_search as trusted_search
from tinyjax.scaling import twin_search as twin_search
from tinyjax.schedule import Schedule as Schedule
from tinyjax.schedule import budget as budget
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
