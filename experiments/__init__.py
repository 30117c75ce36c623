"""One script an experiment; each docstring says how to run it and what to expect."""
