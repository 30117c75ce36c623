"""Benchmarks: scripts that print JSON lines. Machines are noisy, so only ratios measured in one run count."""
