"""Which axes of which tensors must have one length: unification, one rule a primitive.

Enters: a `Graph`. Leaves: `Dimensions`: the leaves that each dimension runs through, the products that write and read
it; and what follows its length, found by tracing again. Read first: `unification.py`, then `axes.py`.
"""
