"""Answers are read as prompts while nobody waits, so that the next turn of a conversation finds them in the cache.

The rows that a decode step writes are not those that a prompt of the same tokens has: below a sparse policy they come
from what was read, and below dense attention from another order of additions. So they are not kept. What was said is
read once more instead, in steps that nobody waits for, and given up as soon as somebody asks for something.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from alisa.cache.prefix.cache import PrefixCache
from alisa.config import SamplingParams
from alisa.engine.prefix import PrefixRules
from alisa.engine.runner import ModelRunner
from alisa.engine.status import AnswerView
from alisa.scheduler.prefix import BlockName
from alisa.scheduler.request import Request
from alisa.scheduler.scheduler import Scheduler

ANSWER_CHUNK = 256
"""Tokens of an answer that a step reads, at most: whoever asks meanwhile waits for that step. Where rows are rounded,
a section of 1024 is the least."""

MAX_ANSWERS = 64
"""Answers that wait to be read; the one that has waited longest is forgotten first."""

_NOTHING_SAID = SamplingParams(max_tokens=1)


class _Answer(NamedTuple):
    """A conversation up to the end of what was said last."""

    token_ids: tuple[int, ...]
    names: tuple[BlockName, ...]
    """Of all its blocks."""
    num_read: int
    """Of these, the first that have been read as a prompt when it ended."""


class AnswerReader:
    """Reads answers into the prefix cache, one after the other, while the engine has nothing else to do.

    Args:
        scheduler: the engine's; outside of `step` and `stop` it may hold one request that is nobody's.
        runner: the engine's.
        prefix: takes what is read.
        rules: of that cache.
        chunk_tokens: tokens of a step at most; a multiple of what a prompt is read in.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, prefix: PrefixCache, rules: PrefixRules, chunk_tokens: int
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._prefix = prefix
        self._rules = rules
        self._chunk_tokens = chunk_tokens
        self._answers: deque[_Answer] = deque(maxlen=MAX_ANSWERS)
        self._reading: Request | None = None
        self.num_tokens = 0
        """Tokens that were read in this way."""

    def add(self, request: Request, cache_salt: str) -> None:
        """A request has ended whose prompt and output another prompt is likely to begin with."""
        if self._rules.rotates_by_length:  # K depends on how long that one may become, which nobody knows
            return
        # The last token may have no row, and a row more than the request had might not fit.
        end = min(len(request.token_ids), request.num_rows) // self._rules.hit_tokens * self._rules.hit_tokens
        token_ids = tuple(request.token_ids[:end])
        names = self._rules.names(token_ids, end, cache_salt)
        num_read = min(self._rules.num_kept(request.prompt_len), len(names))
        if num_read < len(names) <= self._prefix.capacity:
            self._answers.append(_Answer(token_ids, names, num_read))

    def step(self) -> bool:
        """Read on, a step; False: there is nothing to read. Only while no other request is open."""
        request = self._reading or self._next()
        if request is None:
            return False
        session = self._runner.session
        plan = self._scheduler.schedule(session.cache, self._chunk_tokens)
        assert plan is not None, "a request that is alone runs"
        [chunk] = plan.chunks
        result = self._runner.run(plan, [request.token_ids[chunk.start : chunk.end]], [0])
        is_over = chunk.end == request.prompt_len or bool(result.traffic.failed)
        self.num_tokens += 0 if plan.restored else chunk.count
        self._scheduler.update(plan, (), {})
        if is_over:
            self.stop()
        return True

    @property
    def view(self) -> AnswerView | None:
        """What is being read; None: nothing is."""
        request = self._reading
        return None if request is None else AnswerView(request.prompt_len, request.num_cached, len(self._answers))

    def stop(self) -> None:
        """Somebody asks for something: what is being read is given up, and the blocks that were read stay known."""
        if self._reading is None:
            return
        self._scheduler.abort(self._reading.request_id)
        if self._reading.req_idx is not None:
            self._runner.session.close(self._reading.req_idx)
        self._reading = None

    def _next(self) -> Request | None:
        """The next answer that is worth reading is queued; None: there is none."""
        while self._answers:
            answer = self._answers.popleft()
            known = self._prefix.known(answer.names)
            # Either somebody has read it meanwhile, or its beginning is gone, and all would have to be read again.
            if not answer.num_read <= known < len(answer.names):
                continue
            request = Request("what was said", answer.token_ids, _NOTHING_SAID, max_new_tokens=1)
            request.block_names, request.max_restored = answer.names, len(answer.token_ids)
            request.append(0)  # never fed: a prompt that has been read has a token after it
            self._scheduler.add(request)
            self._reading = request
            return request
        return None
