"""The residual addition and the RMS norm after it, in one pass."""
