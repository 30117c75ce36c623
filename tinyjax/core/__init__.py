"""What all rooms share: parameter trees, batches, sites and their slots, new neurons, linear algebra.

Enters: nothing of the library. Leaves: `Site` and `Sites` (a dimension that can grow, as data), `Layout` and `Kernel`
(where it lies in a leaf), `Neurons` (what a method returns and surgery writes). Read first: `site.py`, then `slots.py`.
"""

from tinyjax.core.site import Kernel as Kernel
from tinyjax.core.site import Member as Member
from tinyjax.core.site import Site as Site
from tinyjax.core.site import Sites as Sites
