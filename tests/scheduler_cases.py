"""An engine without a model, to test the scheduler: it executes plans on integers."""

from alisa.config import SamplingParams
from alisa.policy.registry import reads_of
from alisa.scheduler.placement.all_device import AllDevice
from alisa.scheduler.prefix import BLOCK_TOKENS, block_names
from alisa.scheduler.request import Request
from alisa.scheduler.scheduler import Scheduler
from alisa.scheduler.simulate import IntegerCache

TOKEN = 7


class Costs:
    """Says of every request whether its rows are worth keeping."""

    def __init__(self, keeps):
        self.keeps = keeps

    def keeps_rows(self, request):
        return self.keeps(request)


class KnownBlocks:
    """A prefix cache without contents: it knows the blocks of what was read, up to `most` of them."""

    def __init__(self, hit_tokens=BLOCK_TOKENS, most=1000):
        self.hit_tokens = hit_tokens
        self.most = most
        self.blocks = set()

    def known(self, names):
        return self.fetch(names, 0, len(names))

    def fetch(self, names, first, count):
        missing = [place for place, name in enumerate(names[first : first + count]) if name not in self.blocks]
        return min(missing, default=min(count, len(names) - first))

    def execute(self, plan, owners):
        for chunk in plan.chunks if plan.prefill else ():
            names = owners[chunk.req_idx].block_names[chunk.start // BLOCK_TOKENS : chunk.end // BLOCK_TOKENS]
            if plan.restored:
                assert chunk.count == len(names) * BLOCK_TOKENS
                assert self.blocks.issuperset(names)
            else:
                self.blocks.update(names[: max(self.most - len(self.blocks), 0)])


class Driver:
    """Every request gets token 7, until it has all its tokens or is told to stop.

    `plan` is the last one, `bounds` says where the rows of all open sequences lay in it, by request index; `finished`
    has the ids of requests that ended by themselves.
    """

    def __init__(
        self,
        limits,
        placement=None,
        *,
        policy="dense",
        keeps=lambda request: True,
        max_num_seqs=8,
        prefill_chunk=16,
        shared_chunk=None,
        token_bytes=None,
        order=None,
        fair=None,
        prefix=None,
    ):
        self.scheduler = Scheduler(
            limits,
            placement or AllDevice(),
            reads_of(policy, 0.6),
            Costs(keeps),
            max_num_seqs=max_num_seqs,
            prefill_chunk=prefill_chunk,
            shared_chunk=shared_chunk,
            token_bytes=token_bytes,
            order=order,
            fair=fair,
            prefix=prefix,
        )
        self.prefix = prefix
        self.cache = IntegerCache(limits)
        self.plan = None
        self.bounds = {}
        self.finished = []

    def add(self, request_id, prompt_len, max_new_tokens=4, priority=0, client=None):
        params = SamplingParams(max_tokens=max_new_tokens)
        request = Request(request_id, range(prompt_len), params, max_new_tokens, priority, client=client)
        if self.prefix is not None:
            request.block_names = block_names(request.prompt_ids, b"")
            request.max_restored = (prompt_len - 1) // self.prefix.hit_tokens * self.prefix.hit_tokens
        self.scheduler.add(request)
        return request

    def abort(self, request_id):
        request = self.scheduler.abort(request_id)
        if request is not None and request.req_idx is not None:
            self.cache.close(request.req_idx)
        return request

    def step(self, *, stops=lambda request: False, failed=None):
        """Execute a step; its chunks (start, count) by request id, or None when there is nothing to do.

        `stops` says which requests end although they might have more tokens; `failed` are request indices that lose
        their rows, and why.
        """
        plan = self.scheduler.schedule(self.cache)
        if plan is None:
            return None
        self.plan = plan
        self.cache.begin(plan)
        owners = {request.req_idx: request for request in (*self.scheduler.running, *self.scheduler.swapped)}
        if self.prefix is not None:
            self.prefix.execute(plan, owners)
        self.bounds = {req_idx: self.cache.bounds(req_idx) for req_idx in owners}
        failed = {req_idx: why for req_idx, why in (failed or {}).items() if req_idx in owners}
        finished = []
        for chunk in plan.chunks:
            request = owners[chunk.req_idx]
            if chunk.end == len(request.token_ids) and chunk.req_idx not in failed:
                request.append(TOKEN)
                if len(request.output_ids) == request.max_new_tokens or stops(request):
                    request.finish_reason = "length"
                    finished.append(request)
        self.scheduler.update(plan, finished, failed)
        for request in (*finished, *(owners[req_idx] for req_idx in failed)):
            self.cache.close(request.req_idx)
        self.finished += [request.request_id for request in finished]
        return {owners[chunk.req_idx].request_id: (chunk.start, chunk.count) for chunk in plan.chunks}

    def steps(self):
        """Execute everything; the chunks of every step."""
        return list(iter(self.step, None))
