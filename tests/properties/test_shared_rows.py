"""Who counts which row, against sequences as lists of rows: each row once, whoever comes, shares, is cut and goes."""

import itertools
from itertools import islice

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from alisa.scheduler.shared_rows import Handover, SharedRows


class SharedRowsMachine(RuleBasedStateMachine):
    """`rows` has the numbers of every sequence's rows, `owners` who counts a row."""

    def __init__(self):
        super().__init__()
        self.shared = SharedRows()
        self.rows, self.owners = {}, {}
        self.numbers = itertools.count()
        self.names = itertools.count()

    def some(self, data):
        return data.draw(st.sampled_from(sorted(self.rows)))

    def some_length(self, data, req_idx):
        """Most often one at which something begins or ends."""
        length = len(self.rows[req_idx])
        edges = {0, length, *(min(self.shared.num_shared(other), length) for other in self.rows)}
        return data.draw(st.sampled_from(sorted(edges)) | st.integers(0, length))

    @precondition(lambda self: len(self.rows) < 3)
    @rule(count=st.integers(1, 4))
    def open(self, count):
        req_idx = next(self.names)
        self.rows[req_idx] = []
        self.append(req_idx, count)

    def append(self, req_idx, count):
        new = list(islice(self.numbers, count))
        self.rows[req_idx] += new
        self.owners |= dict.fromkeys(new, req_idx)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), count=st.integers(1, 4))
    def grow(self, data, count):
        self.append(self.some(data), count)

    @precondition(lambda self: any(self.rows.values()) and len(self.rows) < 6)
    @rule(data=st.data())
    def fork(self, data):
        """In two steps: the second one finds that all so far is shared."""
        source = data.draw(st.sampled_from([req_idx for req_idx, rows in self.rows.items() if rows]))
        first, second = sorted(self.some_length(data, source) for _ in range(2))
        req_idx = next(self.names)
        self.shared.share(req_idx, source, first)
        self.rows[req_idx] = self.rows[source][:first]
        if first:
            twins = [i for i in self.rows if i != req_idx and self.shared.common(req_idx, i) == first]
            source = data.draw(st.sampled_from(twins))
            second = min(max(first, second), len(self.rows[source]))
        self.shared.share(req_idx, source, second)
        self.rows[req_idx] = self.rows[source][:second]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def cut(self, data):
        req_idx = self.some(data)
        self.cut_at(req_idx, self.some_length(data, req_idx))

    def cut_at(self, req_idx, length):
        """What nobody reads any more is gone; the rest has an heir who reads all of it."""
        lost = [row for row in self.rows[req_idx][length:] if self.owners[row] == req_idx]
        self.rows[req_idx] = self.rows[req_idx][:length]
        read = {row for rows in self.rows.values() for row in rows}
        handover = self.shared.cut(req_idx, length)
        passed = [row for row in lost if row in read]
        assert (handover is not None) == bool(passed)
        if isinstance(handover, Handover):
            assert self.rows[handover.heir][handover.start : handover.end] == passed
            self.owners |= dict.fromkeys(passed, handover.heir)

    @precondition(lambda self: len(self.rows) > 2)
    @rule(data=st.data())
    def close(self, data):
        req_idx = self.some(data)
        self.cut_at(req_idx, 0)
        del self.rows[req_idx]

    @invariant()
    def every_row_counts_once(self):
        for req_idx, rows in self.rows.items():
            own = [row for row in rows if self.owners[row] == req_idx]
            assert rows[self.shared.num_shared(req_idx) :] == own
        for one, other in itertools.permutations(self.rows, 2):
            common = sum(a == b for a, b in zip(self.rows[one], self.rows[other], strict=False))
            assert self.shared.common(one, other) == common

    def teardown(self):
        for req_idx in sorted(self.rows):
            self.cut_at(req_idx, 0)
            del self.rows[req_idx]
        assert not self.shared._links


TestSharedRows = SharedRowsMachine.TestCase
TestSharedRows.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
