"""What methods are made of: updates, ridges, low-rank solutions, predicted gains, and one closed form a kind.

Enters: `Statistics`, or matrices. Leaves: an update, a ridge, `Neurons`, what they gain. Nothing here imports
`tinyjax.methods`. Read first: `best_update.py`, then `low_rank.py` and `ridge.py`.
"""
