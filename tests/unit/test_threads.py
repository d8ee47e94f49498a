"""The number of threads follows the load: a governor with clocks that the test sets."""

import pytest
import torch

from alisa.engine.threads import FIRST_PAUSE_S, ThreadClock, ThreadGovernor, Waited, make_governor


class World:
    """A machine whose load is a number: processors that others want, beside our threads."""

    def __init__(self, processors=2, most=2):
        self.processors, self.busy = processors, 0.0
        self.now_s = self.ran_s = self.waited_s = self.others_s = 0.0
        self.threads = most
        self.calls = []
        self.governor = ThreadGovernor(
            most,
            processors,
            clock=self,
            others=lambda: self.others_s,
            now=lambda: self.now_s,
            get_threads=lambda: self.threads,
            set_threads=self.use,
        )

    def use(self, count):
        self.threads = count
        self.calls.append((round(self.now_s, 3), count))

    def read(self):
        return Waited(self.ran_s, self.waited_s)

    def close(self):
        pass

    def steps(self, seconds, step_s=0.02):
        """Steps for this long; everybody who is ready gets the same share."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.governor.before_step()
            share = min(1.0, self.processors / (self.busy + self.threads))
            self.now_s += step_s
            self.ran_s += step_s * share
            self.waited_s += step_s * (1 - share)
            self.others_s += step_s * self.busy * share


def test_all_threads_run_on_a_quiet_machine():
    world = World()
    world.busy = 0.05
    world.steps(10)
    assert world.calls == []


def test_one_thread_is_left_beside_busy_programs_and_all_come_back_after():
    world = World()
    world.steps(1)
    world.busy = 3
    world.steps(1)
    assert [count for _, count in world.calls] == [1]
    assert world.calls[0][0] < 1.3
    world.steps(20)
    assert world.threads == 1
    world.busy = 0
    world.steps(1)
    assert world.threads == 2


def test_one_busy_program_leaves_one_processor_and_no_swinging():
    world = World()
    world.busy = 1
    world.steps(60)
    assert world.threads == 1
    assert len(world.calls) == 1


def test_many_processors_are_not_given_up_for_a_few_busy_programs():
    world = World(processors=16, most=16)
    world.busy = 4
    world.steps(30)
    assert 11 <= world.threads <= 12


def test_trying_again_becomes_rare_where_others_do_not_show():
    """Bound to processors that others use, of many that are idle: the accounts of the machine say there is room."""
    world = World()
    world.busy = 3
    world.governor._others = lambda: 0.0
    end_s = 120
    # While one thread runs it never waits here, so that all are tried again and again.
    while world.now_s < end_s:
        world.busy = 3 if world.threads == 2 else 0
        world.steps(0.02)
    raised = [at for at, count in world.calls if count == 2]
    assert 3 < len(raised) < 15
    assert raised[-1] - raised[-2] > 10 * FIRST_PAUSE_S


def test_a_pause_in_which_nothing_runs_is_no_load():
    world = World()
    world.steps(1)
    world.now_s += 100
    world.others_s += 150
    world.steps(1)
    assert world.calls == []


def test_it_gives_back_what_it_took():
    world = World()
    world.busy = 3
    world.steps(1)
    world.governor.restore()
    assert world.threads == 2


def test_the_next_run_begins_where_the_last_one_ended():
    world = World()
    world.busy = 3
    world.steps(1)
    world.governor.restore()
    world.steps(0.02)
    assert world.threads == 1


def test_a_number_that_was_asked_for_between_two_runs_holds():
    world = World(processors=8, most=4)
    world.steps(1)
    world.governor.restore()
    world.threads = 2
    world.steps(1)
    assert world.governor.most == world.threads == 2


def test_the_system_says_how_long_a_thread_ran():
    clock = ThreadClock()
    before = clock.read()
    if before is None:
        pytest.skip("the kernel keeps no account of threads")
    total = 0
    while (after := clock.read()).ran_s - before.ran_s < 0.01:
        total += sum(range(1000))
    assert after.waited_s >= before.waited_s
    clock.close()


def test_a_system_that_says_nothing_keeps_its_threads(tmp_path):
    clock = ThreadClock(tmp_path / "none")
    governor = ThreadGovernor(2, 2, clock=clock, set_threads=lambda count: pytest.fail("changed"))
    for _ in range(3):
        governor.before_step()


@pytest.mark.parametrize(("fixed", "processors", "most"), [(None, 1.5, 1), (None, 8.0, 2), ("2", 1.5, 2)])
def test_no_more_threads_than_processors_unless_the_user_says_so(fixed, processors, most, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    if fixed:
        monkeypatch.setenv("OMP_NUM_THREADS", fixed)
    monkeypatch.setattr("alisa.engine.threads.num_cpus", lambda: processors)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make_governor()
        assert torch.get_num_threads() == most
    finally:
        torch.set_num_threads(before)
