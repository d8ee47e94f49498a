"""Python calls of a decode step, for each layer of the embedded model: what the interpreter has to do.

    python benchmarks/calls.py
    python benchmarks/calls.py --policy dense --where 12      # and the functions that are called most

Calls are counted, not timed (`sys.setprofile`), so that the figure is the same on every machine with the same kernels.
A step is the difference between a longer and a shorter run of one prompt, divided by its steps: what is done once for a
prompt does not count. `call` is a function in Python, `c_call` one in C. `step` counts everything, `forward` what is
called below the decoder's forward pass; the engine around it has the same calls for a model of any depth, so that with
the few layers of the embedded model `step` shows more for each layer than with a large one. The last line of the output
is one JSON record.

Version 0.1: dense 84.0 in the forward pass, 133.8 in a step; sketch 129.0 and 183.5. With 24 layers (random weights in
the shape of LLaMA) 89 and 135 in a step. In C: 101.0 and 128.8; 186.0 and 216.8.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from recording import tell

from alisa import LLM, SamplingParams
from alisa.lab.bench.stamp import current_stamp
from alisa.model.decoder import Decoder

SHORT, LONG = 16, 80
"""Output tokens of the two runs."""
PROMPT = tuple(range(10, 138))
"""Token ids: long enough that a sparse policy chooses."""
TARGETS = {"dense": 40, "sketch": 60}
"""Calls in Python for each layer that the forward pass of a step may take."""

_FORWARD = inspect.unwrap(Decoder.forward).__code__


class CallCounter:
    """Counts the calls of this thread between `start` and `stop`."""

    def __init__(self) -> None:
        self.python: Counter[CodeType] = Counter()
        self.events: Counter[str] = Counter()
        """By event, and by event within the forward pass."""
        self._depth = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """What the interpreter tells: `call` and `c_call`, besides returns."""
        if event in ("call", "c_call"):
            self.events[f"step_{event}"] += 1
            self.events[f"forward_{event}"] += self._depth > 0
        if event == "call":
            self.python[frame.f_code] += 1
        if frame.f_code is _FORWARD and event in ("call", "return"):
            self._depth += 1 if event == "call" else -1

    def start(self) -> None:
        """Count from now on."""
        sys.setprofile(self)

    @staticmethod
    def stop() -> None:
        """Count no more."""
        sys.setprofile(None)


def count(llm: LLM, num_tokens: int) -> CallCounter:
    """The calls of a whole run."""
    counter = CallCounter()
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    counter.start()
    try:
        llm.generate([list(PROMPT)], params)
    finally:
        counter.stop()
    return counter


def measure(policy: str, num_layers: int, num_functions: int) -> dict[str, Any]:
    """Calls of one decode step for each layer, and the functions that are called most."""
    llm = LLM(policy=policy)
    count(llm, SHORT)  # what is done once in a process is done
    short, long = count(llm, SHORT), count(llm, LONG)
    steps = (LONG - SHORT) * num_layers
    python = long.python - short.python
    most = [
        (round(number / steps, 2), f"{Path(code.co_filename).name}:{code.co_qualname}")
        for code, number in python.most_common(num_functions)
    ]
    return {name: round((long.events[name] - short.events[name]) / steps, 1) for name in long.events} | {"most": most}


def main() -> None:
    """Every policy: one line, and one record of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", default=list(TARGETS))
    parser.add_argument("--where", type=int, default=0, metavar="N", help="show the N functions that are called most")
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    num_layers = LLM(policy="dense").spec.num_layers
    results = {}
    for policy in args.policy:
        found = measure(policy, num_layers, args.where)
        most = found.pop("most")
        results[policy] = found | {"target": TARGETS.get(policy)}
        print(
            f"{policy:8} for each layer: {found['forward_call']:6.1f} calls in Python in the forward pass, "
            f"{found['step_call']:6.1f} in the whole step; in C {found['forward_c_call']:6.1f} and "
            f"{found['step_c_call']:6.1f}"
        )
        for number, name in most:
            print(f"    {number:6.2f} {name}")
    record = {"benchmark": "calls", "num_layers": num_layers, "results": results, "stamp": asdict(current_stamp())}
    tell(record, args.record)


if __name__ == "__main__":
    main()
