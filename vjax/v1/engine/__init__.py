"""V1's engine."""
