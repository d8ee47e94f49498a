"""What every driver of an engine shares: the job that comes on standard input, the clock, and the result it prints.

A driver runs in its engine's own environment, so this file imports nothing that one of them may lack, and nothing of
this package. It reads an `EngineJob`, runs it once to warm up and once measured, and ends standard output with one JSON
line (`finish` or `unavailable`). What is the same for all engines (the workload's name, the floor, the machine) is
added by whoever started the driver.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

Ids = list[int]

WARM_UP_TOKENS = 1024
"""Of a prompt, at the most, in a first run that is not measured."""


@dataclass(frozen=True)
class EngineJob:
    """Prompts that arrive together, each continued greedily by exactly `output_len` tokens."""

    model: str
    """Directory of the checkpoint, or a GGUF file."""
    shape: Mapping[str, Any]
    """Sizes of the model, by the names of `ModelSpec`."""
    prompts: Sequence[Ids]
    output_len: int
    batch: int
    """Most sequences that are worked on together."""
    dtype: str
    """Of the weights and the arithmetic, as torch names it."""
    threads: int
    seed: int
    kv_token_bytes: int
    """K and V of one token over all layers in `dtype`."""
    kv_budget_bytes: int | None
    """Hard cap of the memory for K and V; None: none."""
    options: Mapping[str, Any]
    """What makes this variant of the engine."""
    turns: bool = False
    """Whether the prompts are the turns of one conversation: each is new text after all that was said before."""
    scratch: str = ""
    """Directory for the model in a form of the engine's own, kept from run to run."""

    @classmethod
    def read(cls) -> EngineJob:
        """The job on standard input."""
        return cls(**json.load(sys.stdin))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence at its end; the last of them need not be cached."""
        if self.turns:
            return sum(map(len, self.prompts)) + len(self.prompts) * self.output_len
        return max(map(len, self.prompts)) + self.output_len

    def warm_up(self) -> EngineJob:
        """As large a batch with other prompts (two turns of a conversation) and three tokens of output.

        What a first run costs is not measured. Of long prompts only the end is read: all would take minutes.
        """
        prompts = [ids[: -WARM_UP_TOKENS - 1 : -1] for ids in self.prompts[: 2 if self.turns else self.batch]]
        return replace(self, prompts=prompts, output_len=min(3, self.output_len))

    def groups(self) -> Iterator[tuple[int, Sequence[Ids]]]:
        """(index of the first, prompts) of each batch that an engine without continuous batching can take at a time.

        A batch is as large as the budget allows for sequences that are all as long as the longest.

        Raises:
            NoRoom: not even one sequence fits.
        """
        size = self.batch
        if self.kv_budget_bytes is not None:
            sequence_bytes = (self.longest - 1) * self.kv_token_bytes
            size = min(size, self.kv_budget_bytes // sequence_bytes)
            if size == 0:
                raise NoRoom(f"one sequence takes {sequence_bytes} bytes, the budget is {self.kv_budget_bytes}")
        for start in range(0, len(self.prompts), size):
            yield start, self.prompts[start : start + size]


class NoRoom(Exception):
    """The engine cannot do the work within the budget."""


class Clock:
    """Seconds since the prompts were handed over: first tokens, steps, the end.

    In a conversation first tokens are counted from their own prompt.
    """

    def __init__(self, num_prompts: int) -> None:
        """Start."""
        self.first_token_s: list[float | None] = [None] * num_prompts
        self.step_s: list[float] = []
        self.wall_s = 0.0
        self.prompts_first = True
        """Whether all prompts were read before anything was decoded."""
        self.others_share = 0.0
        """Processor time that went to other programs meanwhile, over all there was."""
        self._start = self._asked = self._last = perf_counter()
        self._others_s = _others_s()

    def turn(self) -> None:
        """The next prompt of a conversation is handed over."""
        self._asked = perf_counter()

    def first(self, index: int) -> None:
        """Prompt `index` has its first token, if it had none before."""
        if self.first_token_s[index] is None:
            self._last = perf_counter()
            self.first_token_s[index] = self._last - self._asked
            self.prompts_first &= not self.step_s

    def step(self) -> None:
        """A step has ended that only decoded."""
        now = perf_counter()
        self.step_s.append(now - self._last)
        self._last = now

    def stop(self) -> None:
        """The last token of the last sequence is there."""
        self.wall_s = perf_counter() - self._start
        available_s = self.wall_s * (os.cpu_count() or 1)
        # The system counts in steps of 10 ms: in a shorter time there may be a step of more than there was.
        self.others_share = min(max(0.0, _others_s() - self._others_s) / available_s, 1.0)

    @property
    def step_quartiles_s(self) -> list[float] | None:
        """Quartiles of the decode steps; None for fewer than two."""
        return quantiles(self.step_s, n=4, method="inclusive") if len(self.step_s) > 1 else None


def finish(
    job: EngineJob,
    clock: Clock,
    *,
    packages: Sequence[str],
    num_output: int,
    notes: Sequence[str],
    details: Mapping[str, Any] | None = None,
) -> None:
    """The result of a measured run is the last line of standard output.

    Args:
        job: what was asked.
        clock: what was measured.
        packages: distributions whose versions belong to the result.
        num_output: tokens that the engine really produced; another number than was asked is an error.
        notes: settings that differ from the engine's defaults, and what else a reader must know.
        details: further figures that only this engine has.
    """
    asked = len(job.prompts) * job.output_len
    if num_output != asked:
        raise RuntimeError(f"{num_output} tokens came where {asked} were asked for.")
    result = {
        "status": "ran",
        "wall_s": clock.wall_s,
        "first_token_s": clock.first_token_s,
        "prompts_first": clock.prompts_first,
        "step_quartiles_s": clock.step_quartiles_s,
        "num_steps": len(clock.step_s),
        "peak_rss_bytes": _peak_rss_bytes(),
        "others_share": clock.others_share,
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "notes": list(notes),
        "details": dict(details or {}),
    }
    _print(result)


def unavailable(reason: str) -> None:
    """The last line of standard output says why the engine cannot do this work here."""
    _print({"status": "unavailable", "reason": reason})


def _print(result: Mapping[str, Any]) -> None:
    sys.stderr.flush()
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def _peak_rss_bytes() -> int:
    """Most memory that this process held at once, plus the same of every process below it that still lives."""
    return sum(_high_water_bytes(pid) for pid in (os.getpid(), *_descendants(os.getpid())))


def _others_s() -> float:
    """Processor time so far of everything but this process, its children that have ended, and all below it that live.

    Asked while the engine's own processes live: what becomes of their time when they are killed is up to their parents.
    """
    # user, nice, system, idle, iowait, irq, softirq, steal; a guest's time is in user already.
    total = [int(ticks) for ticks in Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[1:9]]
    busy = sum(total) - total[3] - total[4]
    own = sum(_ticks(pid) for pid in (os.getpid(), *_descendants(os.getpid())))
    return (busy - own) / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> int:
    """Processor time of a process and of its children that have ended."""
    # The program's name, in brackets, may hold blanks.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:15]))


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text(encoding="ascii").split()):
            children += [child, *_descendants(child)]
    return children


def _high_water_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
