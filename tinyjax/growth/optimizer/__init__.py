"""Optimizers that treat a newborn slot as a fresh optimizer would.

Enters: an Optax optimizer, its state, which slots were born. Leaves: an optimizer, or a state. Read first: `birth.py`.
"""

from tinyjax.growth.optimizer.birth import BirthState as BirthState
from tinyjax.growth.optimizer.birth import with_birth as with_birth
from tinyjax.growth.optimizer.reset import all_afresh as all_afresh
from tinyjax.growth.optimizer.reset import fresh as fresh
from tinyjax.growth.optimizer.reset import reset_grown as reset_grown
from tinyjax.growth.optimizer.reset import zeros as zeros
