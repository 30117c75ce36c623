"""Which axes of which tensors must have one length: unification, one rule a primitive."""
