"""The operations compiled by numba, for CPUs."""
