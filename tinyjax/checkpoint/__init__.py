"""Growing runs on disk: save, go on, hand the result over."""

from tinyjax.checkpoint.export import export as export
from tinyjax.checkpoint.interrupt import stop_on_interrupt as stop_on_interrupt
from tinyjax.checkpoint.run import Checkpoint as Checkpoint
from tinyjax.checkpoint.run import restore as restore
from tinyjax.checkpoint.run import save as save
