"""From a loss, a batch and sites to their second moments.

Enters: a loss function, parameters, a batch, `Sites`. Leaves: `Statistics` by site. One backpropagation records what
the paths ask for (`recording.py`): b_prev, b, and V_goal = -n dloss/da. `rows.py` brings these in one order,
the file of each kind sums them (`kinds.py`), `chunks.py` passes over the batch in parts. Read first: `estimator.py`.
"""
