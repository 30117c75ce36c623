"""The loop: steps and growths in turn, schedules, progress, checkpoints, forecasts of time.

Enters: a loss, parameters, batches, an optimizer, a schedule. Leaves: a `Record` a step, and runs on disk.
Read first: `loop.py`, then `schedules/basic.py`.
"""

from tinyjax.training.loop import Record as Record
from tinyjax.training.loop import fit as fit
from tinyjax.training.reporting import log_line as log_line
from tinyjax.training.reporting import progress as progress
from tinyjax.training.reporting import summary as summary
from tinyjax.training.steps import train_epoch as train_epoch
from tinyjax.training.steps import train_step as train_step
