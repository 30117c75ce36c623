"""From a loss to the hidden dimensions that can grow, by reading its jaxpr.

Enters: a loss function, parameters, a batch. Leaves: `Sites`, and for each that can grow a tuple of `Path`, which says
where b_prev, b and V_goal are to be recorded and what lies between them. A staircase: `graph` (the loss as a list of
operations), `dimensions` (axes that must have one length), `paths` (from a product to its readers), `kinds` (hidden
layers, gated units, attention, recurrence, residual streams), `classification` (which kind, or why none), `census`
(what no kind claims), `sites`. Read first: `sites.py`, then `paths/path.py`.
"""
