"""Timing, tuning and checking of the kernels on a GPU: `python -m pallas_kernels`."""
