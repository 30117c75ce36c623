"""One growth: estimate, solve, search an amplitude, write, accept.

Enters: a loss, parameters, a batch, how many neurons. Leaves: parameters and a `GrowthInfo`, inside one jitted
function. At each site the best update of the weights there are (proposition 3.1), then neurons (proposition 3.2), each
at an amplitude of its own and kept only if the loss does not rise. `optimizer` brings the state of an Optax optimizer
along. Read first: `grow_step.py`, then `site_growth.py`.
"""

from tinyjax.growth.grow_step import make_grow_step as make_grow_step
from tinyjax.growth.info import GrowthInfo as GrowthInfo
from tinyjax.growth.info import Status as Status
from tinyjax.growth.info import check as check
from tinyjax.growth.input_spectra import Inputs as Inputs
from tinyjax.growth.input_spectra import decompose_inputs as decompose_inputs
from tinyjax.growth.line_searches import fixed as fixed
from tinyjax.growth.line_searches import line_search as line_search
from tinyjax.growth.line_searches import trusted_search as trusted_search
from tinyjax.growth.line_searches import twin_search as twin_search
from tinyjax.growth.neuron_norms import normalize as normalize
from tinyjax.growth.neuron_norms import normalized as normalized
from tinyjax.growth.signs import better_twins as better_twins
from tinyjax.growth.signs import twin_slopes as twin_slopes
