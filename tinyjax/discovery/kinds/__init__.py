"""One file a kind of dimension: whether it is one, and its paths."""
