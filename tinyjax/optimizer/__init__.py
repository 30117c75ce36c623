"""Optimizers that treat a newborn slot as a fresh optimizer would."""

from tinyjax.optimizer.birth import BirthState as BirthState
from tinyjax.optimizer.birth import with_birth as with_birth
from tinyjax.optimizer.reset import everything as everything
from tinyjax.optimizer.reset import fresh as fresh
from tinyjax.optimizer.reset import reset_grown as reset_grown
from tinyjax.optimizer.reset import zeros as zeros
