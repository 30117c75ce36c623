"""The loss as a flat list of operations, and who makes and who reads each value.

Enters: a loss function, parameters, a batch. Leaves: a `Graph`, calls inlined and loops opened once. Read first:
`tracing.py`, then `graph.py`.
"""
