"""Python calls of a decode step, for each layer of the embedded model: what the interpreter has to do.

    python benchmarks/calls.py
    python benchmarks/calls.py --policy dense --where 12      # and the functions that are called most

Calls are counted, not timed (`sys.setprofile`), so that the figure is the same on every machine with the same kernels.
A step is the difference between a longer and a shorter run of one prompt, divided by its steps: what is done once for a
prompt does not count. `call` is a function in Python, `c_call` one in C. "In layers" are the calls below the decoder's
forward pass, the rest is the engine around it. The last line of the output is one JSON record.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from alisa import LLM, SamplingParams
from alisa.lab.bench.stamp import current_stamp

SHORT, LONG = 16, 80
"""Output tokens of the two runs."""
PROMPT = tuple(range(10, 138))
"""Token ids: long enough that a sparse policy chooses."""
TARGETS = {"dense": 40, "sketch": 60}
"""Calls in Python for each layer that a step may take."""


class CallCounter:
    """Counts the calls of this thread between `start` and `stop`."""

    def __init__(self) -> None:
        self.python: Counter[CodeType] = Counter()
        self.num_native = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """What the interpreter tells: `call` and `c_call`, besides returns."""
        if event == "call":
            self.python[frame.f_code] += 1
        elif event == "c_call":
            self.num_native += 1

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
    return {
        "call": round(sum(python.values()) / steps, 1),
        "c_call": round((long.num_native - short.num_native) / steps, 1),
        "most": most,
    }


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
            f"{policy:8} {found['call']:6.1f} calls in Python and {found['c_call']:6.1f} in C for each layer of a step"
        )
        for number, name in most:
            print(f"    {number:6.2f} {name}")
    record = {"benchmark": "calls", "num_layers": num_layers, "results": results, "stamp": asdict(current_stamp())}
    print(json.dumps(record))
    if args.record:
        with args.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
