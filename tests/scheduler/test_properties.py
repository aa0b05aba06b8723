"""Random operations on the scheduler, with a simulated device that checks what every token would attend to."""

from __future__ import annotations

import random

import pytest

from tests.scheduler.simulation import EOS, VOCAB_SIZE, Engine, configs, make_request
from vjax.sampling_params import RepetitionDetectionParams

MAX_MODEL_LEN = 40
OPERATIONS = 3000

CASES = {
    "v1-async": {"depth": 2},
    "v1-async-deep": {"depth": 3},
    "v1-async-small-budget": {"depth": 2, "budget": 8},
    "v1-async-threshold": {"depth": 2, "budget": 16, "long_prefill_token_threshold": 5},
    "v1-async-priority": {"depth": 2, "policy": "priority"},
    "v1-async-priority-small-budget": {"depth": 2, "policy": "priority", "budget": 8},
    "v1-async-priority-threshold": {"depth": 2, "policy": "priority", "budget": 32, "long_prefill_token_threshold": 9},
    "v1-plain-priority-threshold": {"policy": "priority", "budget": 32, "long_prefill_token_threshold": 9},
    "v1-async-no-caching": {"depth": 2, "caching": False},
    "v1-async-no-chunks": {"depth": 2, "budget": MAX_MODEL_LEN, "enable_chunked_prefill": False},
    "v1-plain": {},
    "v1-plain-small-budget": {"budget": 8},
    "v1-plain-priority": {"policy": "priority", "budget": 12},
    "v1-plain-no-chunks": {"budget": MAX_MODEL_LEN, "enable_chunked_prefill": False, "caching": False},
    "v1-plain-one-row": {"max_num_seqs": 1, "budget": 8},
    "v0": {"static_batch": True, "enable_chunked_prefill": False, "caching": False, "budget": MAX_MODEL_LEN},
    "v0-caching": {"static_batch": True, "enable_chunked_prefill": False, "budget": MAX_MODEL_LEN},
    "v0-chunks": {"static_batch": True, "caching": False, "budget": 8},
    "v0-chunks-caching-priority": {
        "static_batch": True,
        "budget": 8,
        "policy": "priority",
        "long_prefill_token_threshold": 3,
    },
}


class Walk:
    """Draws operations; what they do to the outputs is checked by `Engine`."""

    def __init__(self, seed: str, engine: Engine):
        self.random = random.Random(seed)
        self.engine = engine
        self.num_added = 0
        self.prefixes = [self.tokens(self.random.randint(4, 20)) for _ in range(4)]

    def tokens(self, n: int) -> list[int]:
        return [self.random.randrange(1, VOCAB_SIZE) for _ in range(n)]

    def add(self) -> None:
        r = self.random
        if self.engine.scheduler.num_waiting > 10:
            return  # Operations should meet running requests, too.
        prompt = r.choice(self.prefixes)[: r.choice((4, 8, 12, 20))] + self.tokens(r.choice((0, 0, 1, 2, 5, 9, 15)))
        # An id comes back now and then, while steps may still be in flight for its aborted or finished owner.
        request_id = f"r{self.num_added}" if r.random() < 0.7 else f"s{r.randrange(6)}"
        if request_id in self.engine.scheduler._state.requests:
            return
        self.num_added += 1
        stop = [r.randrange(VOCAB_SIZE)] if r.random() < 0.2 else None
        self.engine.add(
            make_request(
                request_id,
                prompt[: MAX_MODEL_LEN - 1],
                max_tokens=r.choice((1, 2, 5, 20, 60)),
                eos=EOS if r.random() < 0.7 else None,
                salt=r.choice((None, None, None, "a", "b")),
                stop_token_ids=stop,
                skip_reading_prefix_cache=r.choice((None, None, False, True)),
                repetition_detection=r.choice((None, None, RepetitionDetectionParams(3, 0, 2))),
                priority=r.randrange(3),
                arrival_time=r.randrange(5),
            ),
            blocked=r.random() < 0.1,
        )

    def unblock(self) -> None:
        if blocked := self.engine.blocked:
            self.engine.unblock(self.random.randrange(len(blocked)))

    def abort(self) -> None:
        live = list(self.engine.scheduler._state.requests)
        chosen = self.random.sample(live, min(len(live), self.random.choice((1, 1, 1, 3))))
        assert self.engine.scheduler.abort([*chosen, "unknown"]) == chosen

    def reset(self) -> None:
        pool = self.engine.scheduler._state.kv.pool
        nothing_held = pool.num_free == pool.num_blocks - 1
        assert self.engine.scheduler.reset_prefix_cache() == nothing_held

    def preempt(self) -> None:
        assert self.engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    def fail_device(self) -> None:
        index = self.random.randrange(max(1, len(self.engine.in_flight)))
        self.engine.fail_device(index, receive_first=self.random.random() < 0.5)

    def fail_step(self) -> None:
        """A step that fails before anything else happens; in the plain loop nothing else can be in flight."""
        s = self.engine.scheduler.schedule()
        if s.rows:
            self.engine.dispatch(s)
        self.fail_device()

    def operation(self) -> None:
        operations = (
            (26, self.add),
            (4, self.unblock),
            (60, self.engine.step),
            (4, self.abort),
            (1, self.reset),
            (1, self.preempt),
            (4, self.engine.fail_dispatch),
            (1, self.fail_device),
            (1, self.fail_step),
        )
        weights, functions = zip(*operations, strict=True)
        self.random.choices(functions, weights)[0]()


@pytest.mark.parametrize("name", CASES)
def test_random_operations(name: str) -> None:
    """50,000 operations over all cases. Outputs are what an undisturbed request gives, KV is always right."""
    case = dict(CASES[name])
    depth = case.pop("depth", 1)
    num_preemptions = hits = num_finished = 0
    for part, num_blocks in enumerate((12, 20, 60)):
        options = {"num_blocks": num_blocks, "max_num_seqs": 6, "budget": 24, "max_model_len": MAX_MODEL_LEN} | case
        engine = Engine(*configs(**options), depth=depth)
        walk = Walk(f"{name}-{part}", engine)
        for _ in range(OPERATIONS // 3 + 1):
            walk.operation()
            engine.scheduler.check_integrity()
        engine.run()
        stats = engine.scheduler.stats()
        assert stats.generation_tokens == engine.num_generated > 0
        num_preemptions += stats.num_preemptions
        hits += stats.prefix_cache_hits
        num_finished += sum(o.finish_reason in ("stop", "length") for o in engine.finished.values())
    assert num_finished > 20
    assert num_preemptions > 0
    assert (hits > 0) == options.get("caching", True)
