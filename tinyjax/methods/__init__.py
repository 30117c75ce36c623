"""Growth methods: from second moments to neurons. They know nothing of networks.

Enters: `Statistics` (S, N~, G, M, P). Leaves: `Neurons` (alpha, omega), or an update of the weights there are. One file
a method; what several share lies in `solvers`. Read first: `tiny.py` (proposition 3.2), then `solvers/best_update.py`
(proposition 3.1).
"""

from tinyjax.core.neurons import Neurons as Neurons
from tinyjax.methods.completed import completed as completed
from tinyjax.methods.completed import within_rank as within_rank
from tinyjax.methods.completed import within_significance as within_significance
from tinyjax.methods.fisher_tiny import fisher_tiny as fisher_tiny
from tinyjax.methods.gradmax import gradmax as gradmax
from tinyjax.methods.gradmax import gradmax_dual as gradmax_dual
from tinyjax.methods.gradmax import redundancy as redundancy
from tinyjax.methods.net2net import net2net as net2net
from tinyjax.methods.north import north as north
from tinyjax.methods.north import north_weight as north_weight
from tinyjax.methods.random import random as random
from tinyjax.methods.random import random0 as random0
from tinyjax.methods.random import symmetric_uniform as symmetric_uniform
from tinyjax.methods.second_order import held_out_third as held_out_third
from tinyjax.methods.second_order import second_order as second_order
from tinyjax.methods.solvers.attention_heads import Projections as Projections
from tinyjax.methods.solvers.attention_heads import Tokens as Tokens
from tinyjax.methods.solvers.attention_heads import find_heads as find_heads
from tinyjax.methods.solvers.attention_heads import value_neurons as value_neurons
from tinyjax.methods.solvers.best_update import best_update as best_update
from tinyjax.methods.solvers.best_update import residual_cross as residual_cross
from tinyjax.methods.solvers.bottleneck import Bottleneck as Bottleneck
from tinyjax.methods.solvers.bottleneck import bottleneck as bottleneck
from tinyjax.methods.solvers.gains import Effect as Effect
from tinyjax.methods.solvers.gains import Squares as Squares
from tinyjax.methods.solvers.gains import effect as effect
from tinyjax.methods.solvers.gains import held_out_gain as held_out_gain
from tinyjax.methods.solvers.gains import predicted_gain as predicted_gain
from tinyjax.methods.solvers.gains import refit as refit
from tinyjax.methods.solvers.gains import refit_fan_in as refit_fan_in
from tinyjax.methods.solvers.gains import refit_fan_out as refit_fan_out
from tinyjax.methods.solvers.gains import update_gain as update_gain
from tinyjax.methods.solvers.gated_units import find_gates as find_gates
from tinyjax.methods.solvers.neuron_count import HowMany as HowMany
from tinyjax.methods.solvers.neuron_count import energy as energy
from tinyjax.methods.solvers.neuron_count import fraction as fraction
from tinyjax.methods.solvers.neuron_count import rank_trigger as rank_trigger
from tinyjax.methods.solvers.neuron_count import significant as significant
from tinyjax.methods.solvers.query_key import QueryKeyMoments as QueryKeyMoments
from tinyjax.methods.solvers.query_key import query_key as query_key
from tinyjax.methods.solvers.query_key import query_key_gain as query_key_gain
from tinyjax.methods.solvers.query_key import query_key_moments as query_key_moments
from tinyjax.methods.solvers.query_key import query_key_scales as query_key_scales
from tinyjax.methods.solvers.ridge import held_out_ridge as held_out_ridge
from tinyjax.methods.solvers.ridge import held_out_update as held_out_update
from tinyjax.methods.solvers.ridge import with_ridges as with_ridges
from tinyjax.methods.solvers.traits import Method as Method
from tinyjax.methods.solvers.traits import common_residual as common_residual
from tinyjax.methods.solvers.traits import is_function_preserving as is_function_preserving
from tinyjax.methods.solvers.traits import is_stochastic as is_stochastic
from tinyjax.methods.solvers.traits import needs as needs
from tinyjax.methods.solvers.traits import traits as traits
from tinyjax.methods.tiny import tiny as tiny
from tinyjax.methods.tiny0 import tiny0 as tiny0
from tinyjax.methods.tiny_conv_als import ConvGains as ConvGains
from tinyjax.methods.tiny_conv_als import ConvProblem as ConvProblem
from tinyjax.methods.tiny_conv_als import conv_gains as conv_gains
from tinyjax.methods.tiny_conv_als import tiny_conv_als as tiny_conv_als
from tinyjax.methods.tiny_joint import held_out_joint as held_out_joint
from tinyjax.methods.tiny_joint import tiny_joint as tiny_joint
from tinyjax.methods.tiny_linear import tiny_linear as tiny_linear
from tinyjax.methods.tiny_unprojected import held_out_unprojected as held_out_unprojected
from tinyjax.methods.tiny_unprojected import tiny_unprojected as tiny_unprojected
from tinyjax.statistics.offsets import product as product
from tinyjax.statistics.output_metric import in_outputs as in_outputs
from tinyjax.statistics.output_metric import orthonormal as orthonormal
