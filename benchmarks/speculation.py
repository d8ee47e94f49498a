"""What drafts gain or lose: prompt lookup and `--exact`, against one token at a time, with a small real model.

    make models
    python benchmarks/speculation.py --record benchmarks/results/speculation.jsonl
    python benchmarks/speculation.py --case copy --rounds 5

Texts are this repository's documents. The ways to run a case take turns, in one process, and every one of them has to
give the tokens that its policy gives without drafts: the script checks all of them. The floor of dense attention is one
reading of weights and rows for each step of one token, at the memory's bandwidth as measured beside it. Each case
prints one JSON record.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from real_models import REAL_MODELS
from recording import tell

from alisa import LLM, SamplingParams
from alisa.config import EngineConfig
from alisa.engine.loaded import LoadedModel, load_model
from alisa.lab.bench.floor import read_bandwidth
from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.session import RunSpec, device_cap_for
from alisa.lab.bench.stamp import current_stamp

DOCUMENTS = ("architecture", "accuracy", "scheduling", "models", "prefix-cache", "server")

QUESTIONS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper in winter.",
    "Give me a recipe for pancakes, and say how to serve them.",
    "What should a visitor see in Rome in three days?",
)

COPIES = (
    "Repeat this text word for word:\n\n{}",
    "Write this text again and correct every mistake in it:\n\n{}",
    "Quote the first half of this text:\n\n{}",
    "Repeat the last paragraphs of this text:\n\n{}",
)


@dataclass(frozen=True)
class Case:
    """Prompts, and the ways to continue them: the first of each group is the one without drafts."""

    name: str
    groups: tuple[tuple[dict[str, object], ...], ...]
    batch: int
    prompt_len: int | None
    """Of cuts of the documents; None: questions to a chat model."""
    output_len: int
    copies: bool = False
    """Whether the questions ask for what the prompt holds."""
    own_len: int | None = None
    """Tokens that a prompt does not share with the others: the rest comes from the prefix cache, so that the case takes
    minutes, not hours. Every sequence has rows of its own all the same. None: all."""
    cap: float | None = None
    """Share of the rows that fit the memory cap; the others lie on disk. None: all."""


_LOOKUP = tuple(({"policy": policy}, {"policy": policy, "speculative": "lookup"}) for policy in ("dense", "sketch"))
_EXACT = (
    (
        {"policy": "dense"},
        {"policy": "sketch", "sparsity": 0.9, "exact": True},
        {"policy": "streaming", "sparsity": 0.9, "exact": True},
    ),
    ({"policy": "sketch", "sparsity": 0.9},),
)

CASES = (
    Case("plain", _LOOKUP, 1, None, 96),
    Case("copy", _LOOKUP, 1, None, 160, copies=True),
    Case("short", _EXACT, 1, None, 96),
    Case("batch 4 at 2000", _EXACT, 4, 2000, 48),
    Case("batch 16 at 4096", _EXACT, 16, 4096, 64, own_len=64),
    Case("a quarter and disk, batch 1", _EXACT, 1, 2000, 64, cap=0.25),
    Case("a quarter and disk, batch 4", _EXACT, 4, 2000, 24, cap=0.25),
)


def document_ids(llm: LLM) -> list[int]:
    """Token ids of the documents, one after the other."""
    folder = Path(__file__).parent.parent / "docs"
    return llm.tokenizer.encode("\n\n".join((folder / f"{name}.md").read_text("utf-8") for name in DOCUMENTS))


def prompts_of(case: Case, llm: LLM) -> list[list[list[int]]]:
    """Batches of prompts: one batch at a time runs."""
    documents = document_ids(llm)
    if case.prompt_len is not None:
        step = (len(documents) - case.prompt_len) // case.batch
        if case.own_len is not None:
            shared, own = documents[: case.prompt_len - case.own_len], case.own_len
            return [[shared + documents[first * step : first * step + own] for first in range(1, case.batch + 1)]]
        return [[documents[first * step : first * step + case.prompt_len] for first in range(case.batch)]]
    asked = list(QUESTIONS)
    if case.copies:
        cuts = [llm.tokenizer.decode(documents[first : first + 200]) for first in (0, 1500, 3000, 4500)]
        asked = [question.format(cut) for question, cut in zip(COPIES, cuts, strict=True)]
    messages = [[{"role": "user", "content": question}] for question in asked]
    return [[llm.chat_prompt(message)] for message in messages]


def config_of(case: Case, way: dict[str, object], model: LoadedModel, path: Path, longest: int) -> EngineConfig:
    """How a case runs in one way."""
    shares = case.own_len is not None
    config = EngineConfig(model=str(path), max_num_seqs=case.batch, max_model_len=longest, prefix_cache=shares, **way)
    if case.cap is None:
        return config
    rows = int(case.cap * case.batch * longest)
    cap = device_cap_for(model.decoder, RunSpec(config), rows)
    return replace(config, kv_device_memory=cap, kv_disk_path=Path(tempfile.gettempdir()))


def measure(llm: LLM, batches: Sequence[Sequence[Sequence[int]]], output_len: int) -> dict[str, object]:
    """Rate and drafts of one way to run all batches of a case."""
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    runs = [llm.generate(batch, params) for batch in batches]
    if errors := [output.error for run in runs for output in run if output.error]:
        raise SystemExit(f"a text ended in an error: {errors[0]}")
    sums = [run.report.summary for run in runs]
    tokens, seconds = sum(found.decode_tokens for found in sums), sum(found.decode_s for found in sums)
    return {
        "tokens_per_s": tokens / seconds,
        "tokens_per_step": tokens / sum(found.decode_sequences for found in sums),
        "drafted": sum(found.drafted_tokens for found in sums),
        "accepted": sum(found.accepted_tokens for found in sums),
        "fetched_rows": sum(found.traffic.fetched_rows for found in sums),
        "transfer_s": sum(found.transfer_s for found in sums),
        "token_ids": [output.token_ids for run in runs for output in run],
    }


def floor_rate(case: Case, llm: LLM, batches: Sequence[Sequence[Sequence[int]]]) -> float:
    """Tokens a second of dense steps that do nothing but read weights and rows from memory."""
    decoder, spec = llm.decoder, llm.spec
    weights = decoder.weight_bytes - spec.vocab_size * spec.token_embed_dim * decoder.dtype.itemsize
    length = sum(len(prompt) for batch in batches for prompt in batch) / len(batches) / case.batch
    rows = case.batch * (length + case.output_len / 2) * spec.num_layers * llm.codec.format.row_bytes
    return case.batch * read_bandwidth() / (weights + rows)


def run_case(case: Case, model: LoadedModel, path: Path, rounds: int) -> dict[str, object]:
    """All ways in turns; a record of their medians."""
    found: dict[str, list[dict[str, object]]] = {}
    meter = OthersMeter()
    floor = 0.0
    with LLM(config=EngineConfig(model=str(path)), loaded=model) as plain:
        batches = prompts_of(case, plain)
        longest = max(len(prompt) for batch in batches for prompt in batch) + case.output_len
    for number in range(rounds):
        for group in case.groups:
            expected: object = None
            for way in group if number % 2 == 0 else (group[0], *reversed(group[1:])):
                with LLM(config=config_of(case, way, model, path, longest), loaded=model) as llm:
                    result = measure(llm, batches, case.output_len)
                    floor = floor or floor_rate(case, llm, batches)
                token_ids = result.pop("token_ids")
                expected = token_ids if expected is None else expected
                assert token_ids == expected, f"{case.name}, {way}: a draft has changed a token"
                name = " ".join(f"{key}={value}" for key, value in way.items())
                found.setdefault(name, []).append(result)
                print(f"{case.name:28} {name:44} {result['tokens_per_s']:8.1f} tok/s", flush=True)
    return {
        "benchmark": "speculation",
        "case": case.name,
        "batch": case.batch,
        "prompt_len": case.prompt_len,
        "output_len": case.output_len,
        "cap": case.cap,
        "rounds": rounds,
        "model": path.name,
        "floor_tokens_per_s": round(floor, 1),
        "stamp": asdict(current_stamp()),
        "others_share": round(meter.share(), 4),
        "results": {
            name: {key: round(median(float(str(one[key])) for one in results), 4) for key in results[0]}
            | {"rates": [round(float(str(one["tokens_per_s"])), 2) for one in results]}
            for name, results in found.items()
        },
    }


def main() -> None:
    """Measure the cases, and append their records to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REAL_MODELS[0].path)
    parser.add_argument("--case", nargs="+", choices=[case.name for case in CASES], help="only these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="append the records to this file")
    args = parser.parse_args()
    model = load_model(EngineConfig(model=str(args.model), weight_dtype="float"))
    for case in CASES:
        if args.case is None or case.name in args.case:
            tell(run_case(case, model, args.model, args.rounds), args.record)


if __name__ == "__main__":
    main()
