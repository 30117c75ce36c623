"""Second moments of activations and of V_goal: the record that every method reads.

Enters: arrays of what was recorded at a site, rows or images. Leaves: `Statistics`, sums over the samples, even and odd
ones apart; `moments` divides by the count. Nothing here knows a network. Read first: `sums.py`, which declares them,
then `dense.py`, where S and N~ of proposition 3.2 are formed.
"""

from tinyjax.statistics.averages import Moments as Moments
from tinyjax.statistics.averages import moments as moments
from tinyjax.statistics.merging import merge as merge
from tinyjax.statistics.merging import merge_over as merge_over
from tinyjax.statistics.record import Statistics as Statistics
