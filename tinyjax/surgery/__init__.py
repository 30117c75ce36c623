"""Changing a network's neurons and nothing else: write, empty, resize, compact, prune."""

from tinyjax.slots import free_slots as free_slots
from tinyjax.slots import matrices as matrices
from tinyjax.slots import width as width
from tinyjax.surgery.capacity import exact as exact
from tinyjax.surgery.capacity import full as full
from tinyjax.surgery.capacity import geometric as geometric
from tinyjax.surgery.capacity import multiple_of as multiple_of
from tinyjax.surgery.frozen import Frozen as Frozen
from tinyjax.surgery.frozen import frozen_leaves as frozen_leaves
from tinyjax.surgery.frozen import frozen_rows as frozen_rows
from tinyjax.surgery.frozen import mark_frozen as mark_frozen
from tinyjax.surgery.frozen import require_unfrozen as require_unfrozen
from tinyjax.surgery.prune import prune as prune
from tinyjax.surgery.resize import compact as compact
from tinyjax.surgery.resize import resize as resize
from tinyjax.surgery.trained import Trainable as Trainable
from tinyjax.surgery.trained import everything as everything
from tinyjax.surgery.write import NewNeurons as NewNeurons
from tinyjax.surgery.write import add_update as add_update
from tinyjax.surgery.write import thin as thin
from tinyjax.surgery.write import write as write
