"""Sums of convolutions: over windows, or by correlations of whole images, whichever is cheaper.

Enters: images at the producer and the consumer, V_goal on its pixels. Leaves: `Sums`. Read first: `image_sums.py`, then
`strategies.py`, which chooses by shapes.
"""
