"""A device and an engine loop for scheduler tests: no model, but the same rows, block tables and KV slots.

The KV of a token depends on all tokens before it, so the simulated device stores in each slot a fingerprint of the
whole history. It checks that every scheduled token would attend to exactly the history of its request, and samples as a
function of the fingerprint that it reads.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from vjax.config.cache import CacheConfig
from vjax.config.scheduler import SchedulerConfig
from vjax.messages import LAST_SAMPLED, EngineOutput, EngineRequest, SchedulerOutput, StepOutput
from vjax.request import Request
from vjax.sampling_params import RepetitionDetectionParams, SamplingParams
from vjax.scheduler.factory import make_scheduler

VOCAB_SIZE = 14
EOS = 0


def make_request(
    request_id: str,
    prompt: list[int],
    *,
    max_tokens: int = 8,
    eos: int | None = None,
    salt: str | None = None,
    **kwargs,
) -> EngineRequest:
    priority, arrival_time = kwargs.pop("priority", 0), kwargs.pop("arrival_time", 0.0)
    params = SamplingParams(max_tokens=max_tokens, **kwargs)
    return EngineRequest(request_id, prompt, params, eos, arrival_time, priority, salt)


def configs(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 64,
    max_model_len: int = 64,
    caching: bool = True,
    **kwargs,
) -> tuple[SchedulerConfig, CacheConfig]:
    cache = CacheConfig(block_size=block_size, num_gpu_blocks=num_blocks, enable_prefix_caching=caching)
    return SchedulerConfig(max_num_seqs, budget, max_model_len, **kwargs), cache


def extend_fingerprint(parent: int, token_id: int) -> int:
    return hash((parent, token_id))


def sample(fingerprint: int) -> int:
    return (fingerprint >> 5) % VOCAB_SIZE


def repeats(output: list[int], detection: RepetitionDetectionParams | None) -> bool:
    """Whether the last tokens are a pattern as often as it takes, by trying each."""
    if detection is None:
        return False
    return any(
        len(output) >= size * detection.min_count
        and output[-size * detection.min_count :] == output[-size:] * detection.min_count
        for size in range(max(detection.min_pattern_size, 1), detection.max_pattern_size + 1)
    )


class Matcher:
    """Stands for a place in a grammar: released once, by a request that ends."""

    is_released = False

    def release(self) -> None:
        assert not self.is_released
        self.is_released = True


class History:
    """What a request's tokens are, whatever the scheduler does: each next one is sampled from those before it."""

    def __init__(self, prompt: list[int], salt: str | None):
        self.root = hash(tuple((salt or "").encode()))
        self.num_prompt = len(prompt)
        self.token_ids: list[int] = []
        self.fingerprints: list[int] = []
        for token_id in prompt:
            self._append(token_id)

    def _append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        parent = self.fingerprints[-1] if self.fingerprints else self.root
        self.fingerprints.append(extend_fingerprint(parent, token_id))

    def extend_to(self, num_tokens: int) -> None:
        while len(self.token_ids) < num_tokens:
            self._append(sample(self.fingerprints[-1]))

    def expected(self, request: EngineRequest, max_model_len: int) -> tuple[list[int], str, int | str | None]:
        """Output tokens, finish_reason and stop_reason of the request when nothing disturbs it."""
        params = request.sampling_params
        assert params.max_tokens is not None
        end = min(self.num_prompt + params.max_tokens, max_model_len)
        self.extend_to(end)
        output: list[int] = []
        for token_id in self.token_ids[self.num_prompt : end]:
            output.append(token_id)
            if token_id == request.eos_token_id:
                return output, "stop", None
            if token_id in (params.stop_token_ids or ()):
                return output, "stop", token_id
            if len(output) < end - self.num_prompt and repeats(output, params.repetition_detection):
                return output, "repetition", "repetition_detected"
        return output, "length", None


@dataclass
class Row:
    num_computed: int
    table: dict[int, int] = field(default_factory=dict)
    last_sampled: int | None = None


class Device:
    def __init__(self, config: SchedulerConfig, cache: CacheConfig):
        self.config, self.cache = config, cache
        self.wipe()

    def wipe(self) -> None:
        """A failed step loses the KV cache and the rows."""
        self.slots = [[0] * self.cache.block_size for _ in range(self.cache.num_gpu_blocks)]
        self.rows: dict[int, Row] = {}

    def execute(self, s: SchedulerOutput, histories: list[History]) -> StepOutput:
        self._apply_updates(s)
        spans = self._spans(s)
        self._write(s, histories, spans)
        for row_id, history, (start, n) in zip(s.rows, histories, spans, strict=True):
            row = self.rows[row_id]
            read = [self._read(row, position) for position in range(start + n)]
            history.extend_to(start + n)
            assert read == history.fingerprints[: start + n], f"row {row_id} attends to a wrong history"
            row.num_computed += n
        sampled = []
        for row_id in s.rows[: s.num_sampled]:
            row = self.rows[row_id]
            row.last_sampled = sample(self._read(row, row.num_computed - 1))
            sampled.append(row.last_sampled)
        return StepOutput(s.step_id, sampled)

    def _apply_updates(self, s: SchedulerOutput) -> None:
        for init in s.new_rows:
            assert 1 <= init.row <= self.config.max_num_seqs
            self.rows[init.row] = Row(init.num_computed_tokens)
        for row_id, column, block in zip(s.block_rows, s.block_columns, s.block_ids, strict=True):
            assert 0 < block < self.cache.num_gpu_blocks
            assert column < -(-self.config.max_model_len // self.cache.block_size)
            self.rows[row_id].table[column] = block

    def _spans(self, s: SchedulerOutput) -> list[tuple[int, int]]:
        return [(self.rows[row].num_computed, n) for row, n in zip(s.rows, s.num_scheduled_tokens, strict=True)]

    def _write(self, s: SchedulerOutput, histories: list[History], spans: list[tuple[int, int]]) -> None:
        """In order of position: sequences that share blocks in this step need what the owner writes."""
        writes = []
        flat = iter(s.token_ids)
        for row_id, history, (start, n) in zip(s.rows, histories, spans, strict=True):
            for position in range(start, start + n):
                writes.append((position, row_id, next(flat), history.root))
        assert next(flat, None) is None
        written = set()
        for position, row_id, token_id, root in sorted(writes):
            row = self.rows[row_id]
            if token_id == LAST_SAMPLED:
                assert row.last_sampled is not None, "the row has not sampled a token"
                token_id = row.last_sampled
            parent = self._read(row, position - 1) if position else root
            slot = row.table[position // self.cache.block_size], position % self.cache.block_size
            assert slot not in written, "two sequences write the same slot in one step"
            written.add(slot)
            self.slots[slot[0]][slot[1]] = extend_fingerprint(parent, token_id)

    def _read(self, row: Row, position: int) -> int:
        return self.slots[row.table[position // self.cache.block_size]][position % self.cache.block_size]


class Engine:
    """The engine core's loop around a scheduler and a simulated device; checks every step and every output.

    Args:
        depth: Steps dispatched before the oldest one's tokens are read: 1 is the plain loop, 2 the overlapped one.
    """

    def __init__(self, config: SchedulerConfig, cache: CacheConfig, *, depth: int = 1):
        self.config, self.depth = config, depth
        self.scheduler = make_scheduler(config, cache)
        self.device = Device(config, cache)
        self.in_flight: deque[tuple[SchedulerOutput, StepOutput]] = deque()
        self.requests: dict[str, EngineRequest] = {}
        self.histories: dict[tuple[tuple[int, ...], str | None], History] = {}
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, EngineOutput] = {}
        self.num_generated = 0
        #: In the order of their arrival; some may have been aborted.
        self.blocked: list[Request] = []

    def add(self, request: EngineRequest, *, blocked: bool = False) -> None:
        added = self.scheduler.add(request, blocked=blocked)
        if blocked:
            self.blocked.append(added)
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = []
        self.finished.pop(request.request_id, None)

    def unblock(self, index: int = 0) -> None:
        request = self.blocked.pop(index)
        if not request.is_finished:
            self.scheduler.unblock(request, Matcher())

    def history(self, prompt: list[int], salt: str | None) -> History:
        return self.histories.setdefault((tuple(prompt), salt), History(prompt, salt))

    def requests_of(self, s: SchedulerOutput) -> list[Request]:
        return self.scheduler._state.in_flight[s.step_id].requests

    def step(self) -> SchedulerOutput:
        s = self.scheduler.schedule()
        self.check(s)
        if s.rows:
            self.dispatch(s)
        if len(self.in_flight) >= self.depth or (self.in_flight and not s.rows):
            self.receive()
        return s

    def dispatch(self, s: SchedulerOutput) -> None:
        requests = self.requests_of(s)
        histories = [self.history(r.token_ids[: r.num_prompt_tokens], r.cache_salt) for r in requests]
        self.in_flight.append((s, self.device.execute(s, histories)))
        if s.step_id % 2 == 0:  # nothing depends on when it is called
            self.scheduler.cache_scheduled_blocks()

    def receive(self) -> list[EngineOutput]:
        outputs = self.scheduler.update(*self.in_flight.popleft())
        self.collect(outputs)
        return outputs

    def fail_dispatch(self) -> None:
        s = self.scheduler.schedule()
        self.check(s)
        if s.rows:
            self.scheduler.unschedule(s)

    def fail_device(self, index: int, receive_first: bool) -> None:
        """Step `index` of those in flight fails, and the ones behind it with it."""
        if receive_first:
            for _ in range(index):
                self.receive()
            index = 0
        lost = list(self.in_flight)[index:]
        if not lost:
            return
        for _ in lost:
            self.in_flight.pop()
        self.device.wipe()
        doomed = {r.request_id for r in self.requests_of(lost[0][0]) if not r.is_finished}
        outputs = self.scheduler.fail_step([s for s, _ in lost], "device fault")
        assert {o.request_id for o in outputs} == doomed
        assert all(o.finish_reason == "error" and o.error == "device fault" for o in outputs)
        self.collect(outputs)

    def run(self, max_steps: int = 5000) -> None:
        """Until all requests are done. Each step must dispatch or receive something."""
        while self.blocked:
            self.unblock()
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished_requests:
                break
            had = len(self.in_flight)
            assert self.step().rows or had, "the scheduler is stuck"
            self.scheduler.check_integrity()
        assert not self.scheduler.has_unfinished_requests, "the requests do not end"
        while self.in_flight:
            self.receive()
        self.scheduler.check_integrity()
        assert self.scheduler.stats().kv_cache_usage == 0

    def collect(self, outputs: list[EngineOutput]) -> None:
        for o in outputs:
            assert o.request_id not in self.finished, "output after the end"
            tokens = self.outputs[o.request_id]
            tokens += o.new_token_ids
            self.num_generated += len(o.new_token_ids)
            request = self.requests[o.request_id]
            history = self.history(request.prompt_token_ids, request.cache_salt)
            expected = history.expected(request, self.config.max_model_len)
            if o.finish_reason in ("stop", "length", "repetition"):
                assert (tokens, o.finish_reason, o.stop_reason) == expected
            else:
                assert o.finish_reason in (None, "error")
                assert tokens == expected[0][: len(tokens)] and len(tokens) < len(expected[0])
            if o.finish_reason:
                self.finished[o.request_id] = o

    def check(self, s: SchedulerOutput) -> None:
        """The order and limits that `SchedulerOutput` promises."""
        n = s.num_scheduled_tokens
        assert len(s.rows) == len(set(s.rows)) == len(n) and sum(n) == len(s.token_ids) == s.num_tokens
        assert s.num_tokens <= self.config.max_num_batched_tokens
        if not s.rows:
            return
        assert 0 <= s.num_decodes <= s.num_sampled <= len(n) and min(n) >= 1
        assert all(k == 1 for k in n[: s.num_decodes]) and all(k > 1 for k in n[s.num_decodes : s.num_sampled])
        requests = self.requests_of(s)
        assert [r.row for r in requests] == s.rows
        for index, request in enumerate(requests):
            left = request.num_tokens + request.num_placeholders - request.num_computed_tokens
            assert left == 1 if index < s.num_sampled else left > 0 and not request.num_placeholders
        if not self.config.enable_chunked_prefill:
            assert s.num_sampled == len(s.rows)
        if self.config.static_batch:
            self.check_static(s, requests)

    def check_static(self, s: SchedulerOutput, requests: list[Request]) -> None:
        """A step of a static batch either prefills or decodes; it decodes only when every prompt is computed."""
        before = [r.num_computed_tokens - n for r, n in zip(requests, s.num_scheduled_tokens, strict=True)]
        decoding = [b >= r.num_prefill_tokens for b, r in zip(before, requests, strict=True)]
        assert all(decoding) or not any(decoding)
        if any(decoding):
            assert not s.new_rows
            assert all(r.num_computed_tokens >= r.num_prefill_tokens for r in self.scheduler._state.running)
