"""A golden case, and how it is run: everything here goes through the public interface."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alisa import LLM, SamplingParams
from alisa.outputs import RunSummary

FILE = Path(__file__).with_name("tokens.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of the model inside the package."""

    name: str
    slow: bool
    options: dict[str, Any]
    """Of `LLM`: policy, sparsity, kv_dtype, prefill_chunk."""
    device_share: float | None
    """Device cap as a share of what all rows of all requests need in the end; None: no cap."""
    disk_share: float | None
    """The same for the disk; None: no cap."""
    schedule: dict[str, Any] | None
    """Contents of the schedule file; None: none."""
    prompts: list[int]
    """Numbers of the prompts, in the order in which they are given."""
    sampling: dict[str, Any]
    """Of `SamplingParams`, but for the seed."""
    seed: int
    """Prompt i of the list has the seed `seed + i`."""
    seen: list[str]
    """What the run must show that it did, see `seen_in`: a case that no longer moves rows proves nothing."""
    tokens: list[list[int]]
    """Of each prompt, the first tokens of the output; as many as do not depend on the processor."""


@dataclass(frozen=True, slots=True)
class Golden:
    """What the file holds."""

    prompts: list[str]
    cases: list[Case]


def load() -> Golden:
    """The recorded cases."""
    values = json.loads(FILE.read_text(encoding="utf-8"))
    return Golden(values["prompts"], [Case(**case) for case in values["cases"]])


def save(golden: Golden) -> None:
    """Write the file, one line for each case, so that a change is seen where it is."""
    fields = Case.__dataclass_fields__
    lines = [json.dumps({name: getattr(case, name) for name in fields}) for case in golden.cases]
    prompts = json.dumps(golden.prompts, indent=1)
    FILE.write_text(f'{{"prompts": {prompts},\n"cases": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def run(case: Case, prompts: list[str], directory: Path, model: Path | None = None) -> tuple[list[list[int]], set[str]]:
    """The tokens of every prompt, and what was seen on the way.

    Args:
        case: what to run.
        prompts: all texts of the file.
        directory: takes the schedule file.
        model: another copy of the model; None: the one inside the package.
    """
    caps: dict[str, int] = {}
    texts = [prompts[number] for number in case.prompts]
    if case.device_share is not None:
        caps["kv_device_memory"] = cap_bytes(case, texts, case.device_share)
    if case.disk_share is not None:
        caps["kv_disk_memory"] = cap_bytes(case, texts, case.disk_share)
    schedule = None
    if case.schedule is not None:
        schedule = directory / "schedule.json"
        schedule.write_text(json.dumps(case.schedule))
    llm = LLM(model, dtype="float32", schedule=schedule, **case.options, **caps)
    params = [SamplingParams(**case.sampling, seed=case.seed + i, ignore_eos=True) for i in range(len(texts))]
    outputs = llm.generate(texts, params)
    return [list(output.token_ids) for output in outputs], seen_in(llm.summary())


def cap_bytes(case: Case, texts: list[str], share: float) -> int:
    """Bytes of this share of the rows that the requests need in the end.

    The one place to change when a cap comes to cover more than rows.
    """
    llm = LLM(dtype="float32", kv_dtype=case.options["kv_dtype"])
    # The last token of an output is never fed back, so it has no row.
    num_rows = sum(len(llm.tokenizer.encode(text)) + case.sampling["max_tokens"] - 1 for text in texts)
    return int(share * num_rows) * llm.describe()["kv_token_bytes"]


def seen_in(summary: RunSummary) -> set[str]:
    """What a run did: `disk` held rows, rows were `deleted` or `rebuilt`, sequences were `preempted`."""
    happened = {
        "disk": summary.disk_peak_bytes > 0,
        "deleted": summary.traffic.deleted_rows > 0,
        "rebuilt": summary.traffic.rebuilt_rows > 0,
        "preempted": summary.num_preempted > 0,
    }
    return {name for name, yes in happened.items() if yes}
