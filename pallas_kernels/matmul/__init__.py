"""Matrix products of steps that cuBLAS cuts badly."""
