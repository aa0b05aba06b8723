"""Keeps Python's garbage collector away from what lives as long as an engine does.

JAX, a tokenizer and an engine are some 150,000 objects: a full collection, which any step may set off, takes 50 ms to
find that all of them are still in use. vLLM does the same.
"""

from __future__ import annotations

import gc
import weakref

from vjax.engine.interrupt import DeferInterrupt


def freeze(owner: object) -> None:
    """What lives now is not looked at by collections until `owner` is gone."""
    # JAX follows collections with a callback, and Python drops what a callback raises, a KeyboardInterrupt too.
    with DeferInterrupt():
        gc.collect()
        gc.freeze()
        weakref.finalize(owner, gc.unfreeze).atexit = False
