"""Changing a network's neurons and nothing else: write, empty, resize, compact, prune."""

from tinyjax.slots import free_slots as free_slots
from tinyjax.slots import matrices as matrices
from tinyjax.slots import width as width
from tinyjax.surgery.write import NewNeurons as NewNeurons
from tinyjax.surgery.write import thin as thin
from tinyjax.surgery.write import write as write
