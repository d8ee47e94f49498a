"""Time to the first token with and without a prefix cache: a shared system prompt, and a conversation.

Token ids are random, which changes no time; both engines have to give the same tokens. `burst`: all requests at once,
the cache empty. `one by one`: each after the one before it has ended. `from files`: the same in a new engine, whose
blocks lie in files. `conversation`: each turn is all that was said before, and new tokens; `answers read`: between two
turns, in time that is not counted, the answer is read. `texts`: several texts of one prompt, whose rows are copies.

    python benchmarks/prefix_cache.py --model FILE.gguf --record benchmarks/results/prefix_cache.jsonl
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from time import perf_counter

from recording import tell

from alisa import LLM, SamplingParams
from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.stamp import current_stamp
from alisa.outputs import RequestOutput

Outputs = Sequence[RequestOutput]


def burst(llm: LLM, prompts: Sequence[Sequence[int]], rules: SamplingParams) -> Outputs:
    """All at once."""
    return llm.generate(prompts, rules)


def one_by_one(llm: LLM, prompts: Sequence[Sequence[int]], rules: SamplingParams) -> Outputs:
    """Each alone."""
    return [llm.generate([prompt], rules)[0] for prompt in prompts]


def conversation(llm: LLM, prompts: Sequence[Sequence[int]], rules: SamplingParams) -> Outputs:
    """The prompts are what the user says in turn."""
    said: list[int] = []
    outputs = []
    for prompt in prompts:
        said += prompt
        outputs += llm.generate([said], rules)
        said += outputs[-1].token_ids
    return outputs


def conversation_with_pauses(llm: LLM, prompts: Sequence[Sequence[int]], rules: SamplingParams) -> Outputs:
    """The same, and what was said is read before the user goes on."""
    said: list[int] = []
    outputs = []
    for prompt in prompts:
        said += prompt
        with llm.stream([said], rules, continues=True) as stream:
            outputs += [event for event in stream if isinstance(event, RequestOutput)]
        said += outputs[-1].token_ids
        while llm.read_answer():
            pass
    return outputs


def several_texts(llm: LLM, prompts: Sequence[Sequence[int]], rules: SamplingParams) -> Outputs:
    """As many texts of the first prompt as there are prompts."""
    return llm.generate(prompts[:1], replace(rules, n=len(prompts)))


def measure(run: Callable[[], Outputs]) -> dict[str, object]:
    """Seconds to the first token of each request, and what was known."""
    started = perf_counter()
    outputs = run()
    first = [output.report.first_token_s for output in outputs]
    return {
        "wall_s": round(perf_counter() - started, 3),
        "mean_first_token_s": round(mean(first), 4),
        "first_token_s": [round(seconds, 4) for seconds in first],
        "cached_tokens": [output.report.cached_tokens for output in outputs],
        "prompt_tokens": [output.report.prompt_tokens for output in outputs],
        "token_ids": [output.token_ids for output in outputs],
    }


def main() -> None:
    """Every case without and with the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as `alisa generate` takes it")
    parser.add_argument("--policy", default="sketch")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--system", type=int, default=2000, help="tokens that all prompts begin with")
    parser.add_argument("--own", type=int, default=30, help="tokens of each prompt after them, and of each turn")
    parser.add_argument("--output-len", type=int, default=100)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rules = SamplingParams(max_tokens=args.output_len, ignore_eos=True)

    def draw(count: int) -> list[int]:
        return [rng.randrange(10, 2000) for _ in range(count)]

    system = draw(args.system)
    prompts = [system + draw(args.own) for _ in range(args.requests)]
    turns = [system, *(draw(args.own) for _ in range(args.turns))]
    cases = {
        "burst": (burst, prompts),
        "one by one": (one_by_one, prompts),
        "one text": (several_texts, prompts[:1]),
        "texts": (several_texts, prompts),
        "conversation": (conversation, turns),
        "answers read": (conversation_with_pauses, turns),
    }
    found: dict[str, dict[str, object]] = {}
    meter = OthersMeter()

    def take(llm: LLM, name: str, case: str) -> None:
        """One case in a new engine, whose first step is not measured."""
        run, given = cases[case]
        llm.free_engine()
        llm.generate([draw(20)], rules)
        found[name] = measure(lambda: run(llm, given, rules))
        print(f"{name:22} mean time to first token {found[name]['mean_first_token_s']:8.3f} s", flush=True)

    with LLM(args.model, policy=args.policy, weight_dtype="float") as llm:
        for case in cases:
            if case != "answers read":  # nobody keeps them
                take(llm, case, case)
    with LLM(args.model, policy=args.policy, weight_dtype="float", prefix_cache=True) as llm:
        for case in cases:
            take(llm, f"{case}, cache", case)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        with LLM(
            args.model, policy=args.policy, weight_dtype="float", prefix_cache=True, prefix_cache_disk=path
        ) as llm:
            take(llm, "burst, filling files", "burst")
            take(llm, "one by one, from files", "one by one")
    same = {f"{case}, cache": case for case in cases} | {"one by one, from files": "one by one"}
    same["answers read, cache"] = "conversation"
    for name, case in same.items():
        assert found[name]["token_ids"] == found[case]["token_ids"], f"{name}: the cache has changed a token"
    record = {
        "benchmark": "prefix_cache",
        **{name: value for name, value in vars(args).items() if name not in ("record", "model")},
        "model": None if args.model is None else Path(args.model).name,
        "stamp": asdict(current_stamp()),
        "others_share": round(meter.share(), 4),
        "results": {name: {k: v for k, v in result.items() if k != "token_ids"} for name, result in found.items()},
    }
    tell(record, args.record)


if __name__ == "__main__":
    main()
