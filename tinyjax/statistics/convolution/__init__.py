"""Sums of convolutions: over windows, or by correlations of whole images, whichever is cheaper."""
