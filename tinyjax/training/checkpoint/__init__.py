"""Growing runs on disk: save, go on, hand the result over.

Enters: a `Record` of `fit`. Leaves: what `fit` goes on from, bit for bit, or one `.npz` that NumPy reads. Read first:
`run.py`.
"""

from tinyjax.training.checkpoint.exports import export as export
from tinyjax.training.checkpoint.interrupt import stop_on_interrupt as stop_on_interrupt
from tinyjax.training.checkpoint.run import Checkpoint as Checkpoint
from tinyjax.training.checkpoint.run import restore as restore
from tinyjax.training.checkpoint.run import save as save
