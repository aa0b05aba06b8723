"""Benchmarks on the public parts of the product; `vjax bench --help` lists them."""
