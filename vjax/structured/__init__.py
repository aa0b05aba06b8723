"""Structured output: which tokens keep a completion within its grammar."""
