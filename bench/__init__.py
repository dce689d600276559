"""Benchmarks and the baselines they compare with."""
