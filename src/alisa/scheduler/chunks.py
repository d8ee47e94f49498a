"""Which tokens of the running requests a step takes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from alisa.scheduler.plan import ScheduledChunk
from alisa.scheduler.prefix import BLOCK_TOKENS, BlockName, PrefixView
from alisa.scheduler.request import Request
from alisa.scheduler.shared_rows import SharedRows


def prompt_chunks(running: Sequence[Request], most: int, prefix: PrefixView | None) -> tuple[ScheduledChunk, ...]:
    """Pieces of the prompts that are still unread, `most` tokens together.

    A prompt whose next block is read in this step for another waits: after it, the prefix cache knows the block. So
    does one that goes on with what the cache (None: there is none) knows, unless it is the first in line: what it takes
    from there are steps of their own.
    """
    chunks: list[ScheduledChunk] = []
    num_tokens = 0
    computed: set[BlockName] = set()
    for request in running:
        if not request.in_prefill or _next_block(request) in computed:
            continue
        if chunks and prefix is not None and _is_known(request, prefix):
            continue
        count = min(most, request.prompt_len - request.num_cached)
        if chunks and num_tokens + count > most:
            break
        chunks.append(_chunk(request, count))
        num_tokens += count
        first = request.num_cached // BLOCK_TOKENS
        computed.update(request.block_names[first : chunks[-1].end // BLOCK_TOKENS])
    return tuple(chunks)


def decode_chunks(running: Sequence[Request], step_tokens: int) -> tuple[ScheduledChunk, ...]:
    """The next tokens of every request: the one that comes next and its drafts, at most `step_tokens`.

    Or several of a request that catches up with what it had said.
    """
    return tuple(_chunk(request, min(_num_next(request), step_tokens)) for request in running)


def one_by_one(chunks: Sequence[ScheduledChunk]) -> tuple[ScheduledChunk, ...]:
    """The first token of every chunk."""
    return tuple(replace(chunk, count=1) for chunk in chunks)


def restored_chunks(
    running: Sequence[Request], prefill_chunk: int, prefix: PrefixView | None, shared: SharedRows
) -> tuple[ScheduledChunk, ...]:
    """Pieces of unread prompts that the prefix cache (None: there is none) knows, as many tokens as a step reads.

    Those of the first requests in line, as many as can be read on together in the step after: the first one does not
    wait for what would have to wait all the same. A piece has a source where a running request has the rows; `shared`
    says who has rows of whom now.
    """
    if prefix is None:
        return ()
    chunks: list[ScheduledChunk] = []
    lengths = {request_index(request): request.num_cached for request in running}
    left, then_read = prefill_chunk, 0
    for request in running:
        if not request.in_prefill:
            continue
        most = max(min(request.max_restored - request.num_cached, left), 0) // BLOCK_TOKENS
        found = prefix.fetch(request.block_names, request.num_cached // BLOCK_TOKENS, most)
        end = (request.num_cached + found * BLOCK_TOKENS) // prefix.hit_tokens * prefix.hit_tokens
        if end > request.num_cached:
            source = _source(request, end, running, lengths, shared)
            chunks.append(replace(_chunk(request, end - request.num_cached), source=source))
            lengths[request_index(request)] = end
            left -= chunks[-1].count
        then_read += request.prompt_len - max(end, request.num_cached)
        if then_read >= prefill_chunk:
            break
    return tuple(chunks)


def known_rows(request: Request, running: Iterable[Request]) -> int:
    """First tokens of a waiting request's prompt whose rows one of the running ones has, and it may share."""
    most = 0
    for other in running:
        limit = min(len(request.block_names), request.max_restored // BLOCK_TOKENS)
        limit = min(limit, len(other.block_names), other.num_cached // BLOCK_TOKENS)
        # Equal names, equal beginnings.
        blocks = bisect_left(range(limit), True, key=lambda n: request.block_names[n] != other.block_names[n])
        most = max(most, blocks * BLOCK_TOKENS)
    return most


def request_index(request: Request) -> int:
    """The request index of one that runs or is swapped."""
    assert request.req_idx is not None, "requests that run or are swapped have a request index"
    return request.req_idx


def _source(
    request: Request, end: int, running: Sequence[Request], lengths: Mapping[int, int], shared: SharedRows
) -> int | None:
    """Who can share its rows up to `end` with the request, by the lengths that sequences have in this step."""
    number, req_idx = end // BLOCK_TOKENS - 1, request_index(request)
    if shared.num_shared(req_idx) < request.num_cached:  # it has rows of its own
        return None
    for other in running:
        source = request_index(other)
        begins_alike = other.block_names[number : number + 1] == request.block_names[number : number + 1]
        if other is request or not begins_alike or lengths[source] < end:
            continue
        if shared.common(req_idx, source) == request.num_cached:
            return source
    return None


def _is_known(request: Request, prefix: PrefixView) -> bool:
    """Whether the prefix cache knows how the prompt goes on, as far as it can tell without asking for it."""
    end = min(prefix.known(request.block_names) * BLOCK_TOKENS, request.max_restored)
    return end // prefix.hit_tokens * prefix.hit_tokens > request.num_cached


def _next_block(request: Request) -> BlockName | None:
    """The block of the prompt that is read next, where all of it may come from the prefix cache."""
    is_whole = request.num_cached + BLOCK_TOKENS <= request.max_restored
    return request.block_names[request.num_cached // BLOCK_TOKENS] if is_whole else None


def _num_next(request: Request) -> int:
    """Tokens that could go through the model at once."""
    return len(request.token_ids) - request.num_cached + request.num_drafts


def _chunk(request: Request, count: int) -> ScheduledChunk:
    return ScheduledChunk(request_index(request), request.num_cached, count)
