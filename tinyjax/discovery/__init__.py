"""From a loss to the hidden dimensions that can grow, by reading its jaxpr.

Enters: a loss function, parameters, a batch. Leaves: `Sites`, and for each a tuple of `Path` that says what estimation
records and how. A staircase: `graph` (the loss as a list of operations), `dimensions` (axes that must have one length),
`paths` (from a product to its readers), `kinds` (hidden layers, gated units, attention, recurrence, residual streams),
`classification` (which kind, or why none), `sites`. Read first: `sites.py`, then `paths/path.py`.
"""
