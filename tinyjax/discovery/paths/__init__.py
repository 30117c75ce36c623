"""The way from a product to those that read it: rows, pixels, factors, norms, what an empty slot holds."""
