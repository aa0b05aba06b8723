"""Pictures of what an engine did: records in, a `matplotlib.figure.Figure` out (extras `bench` and `notebooks`).

`schedule`, `step_load`, `block_table`, `block_pool` and `paged_attention` draw the records of
`llm.llm_engine.record_steps()`; the others draw measurements, those of `vjax bench --plot FILE` among them.
"""

from vjax.plot.bars import latencies, mode_bars, phases, prefix_cache
from vjax.plot.blocks import block_pool, block_table, paged_attention
from vjax.plot.canvas import check, save
from vjax.plot.steps import schedule, step_load

__all__ = [
    "block_pool",
    "block_table",
    "check",
    "latencies",
    "mode_bars",
    "paged_attention",
    "phases",
    "prefix_cache",
    "save",
    "schedule",
    "step_load",
]
