"""Placement of arrays: one table from logical axes to mesh axes."""
