"""Figures of a growing run; matplotlib comes with the `demo` extra.

Enters: the records of a run, `Statistics`, widths. Leaves: figures. Read first: `run.py`.

Every function takes plain records and returns a matplotlib `Figure` that belongs to no window: save it with
`figure.savefig("growth.png")`, or show it in a notebook that began with `%matplotlib inline`.
"""

from tinyjax.plot.run import bottleneck_map as bottleneck_map
from tinyjax.plot.run import growth_curves as growth_curves
from tinyjax.plot.snapshot import spectrum as spectrum
from tinyjax.plot.snapshot import widths as widths
