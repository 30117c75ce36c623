"""The way from a product to those that read it: rows, pixels, factors, norms, what an empty slot holds.

Enters: a dimension and the product that writes it. Leaves: a `Path` to its readers, or `CannotGrow` with the reason:
rows that do not match, an activation with sigma(0) != 0, slots that are mixed. Read first: `path.py`,
then `flow.py`.
"""
