"""Growth methods: from sums to neurons. They know nothing of networks."""

from tinyjax.methods.base import Method as Method
from tinyjax.methods.base import Neurons as Neurons
from tinyjax.methods.base import is_function_preserving as is_function_preserving
from tinyjax.methods.base import is_stochastic as is_stochastic
from tinyjax.methods.base import traits as traits
from tinyjax.methods.bottleneck import Bottleneck as Bottleneck
from tinyjax.methods.bottleneck import bottleneck as bottleneck
from tinyjax.methods.gains import held_out_gain as held_out_gain
from tinyjax.methods.gains import predicted_gain as predicted_gain
from tinyjax.methods.gains import refit_fan_out as refit_fan_out
from tinyjax.methods.gains import update_gain as update_gain
from tinyjax.methods.random0 import random0 as random0
from tinyjax.methods.ridge import held_out as held_out
from tinyjax.methods.ridge import held_out_update as held_out_update
from tinyjax.methods.tiny import tiny as tiny
from tinyjax.methods.tiny0 import tiny0 as tiny0
from tinyjax.methods.update import best_update as best_update
from tinyjax.methods.update import residual_cross as residual_cross
