"""Changing a network's neurons and nothing else: write, empty, resize, compact, prune.

Enters: parameters, a `Site`, `Neurons`. Leaves: parameters. Knows only `core`. Read first: `writing.py`.
"""

from tinyjax.core.kernels import matrices as matrices
from tinyjax.core.slots import free_slots as free_slots
from tinyjax.core.slots import width as width
from tinyjax.surgery.capacity_policies import exact as exact
from tinyjax.surgery.capacity_policies import full as full
from tinyjax.surgery.capacity_policies import geometric as geometric
from tinyjax.surgery.capacity_policies import multiple_of as multiple_of
from tinyjax.surgery.frozen import Frozen as Frozen
from tinyjax.surgery.frozen import frozen_leaves as frozen_leaves
from tinyjax.surgery.pruning import prune as prune
from tinyjax.surgery.resizing import compact as compact
from tinyjax.surgery.resizing import resize as resize
from tinyjax.surgery.thinning import thin as thin
from tinyjax.surgery.trainable import Trainable as Trainable
from tinyjax.surgery.trainable import all_params as all_params
from tinyjax.surgery.writing import add_update as add_update
from tinyjax.surgery.writing import write as write
