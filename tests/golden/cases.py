"""A golden case, and how it is run: everything here goes through the public interface."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alisa import LLM, SamplingParams
from alisa.config import with_options
from alisa.lab.bench.session import RunSpec, device_cap_for
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
    texts = [prompts[number] for number in case.prompts]
    plain = LLM(model, dtype="float32", **case.options)
    # The last token of an output is never fed back, so it has no row.
    lengths = [len(plain.tokenizer.encode(text)) + case.sampling["max_tokens"] for text in texts]
    num_rows = sum(lengths) - len(lengths)
    # What else is under the cap (policy state, staging) depends on these.
    settings: dict[str, Any] = {"max_num_seqs": len(texts), "max_model_len": max(lengths)}
    if case.schedule is not None:
        settings["schedule"] = directory / "schedule.json"
        settings["schedule"].write_text(json.dumps(case.schedule))
    if case.disk_share is not None:
        settings["kv_disk_memory"] = int(case.disk_share * num_rows) * plain.describe()["kv_token_bytes"]
    if case.device_share is not None:
        spec = RunSpec(with_options(plain.config, settings))
        settings["kv_device_memory"] = device_cap_for(plain.decoder, spec, int(case.device_share * num_rows))
    llm = LLM(model, dtype="float32", **case.options, **settings)
    params = [SamplingParams(**case.sampling, seed=case.seed + i, ignore_eos=True) for i in range(len(texts))]
    outputs = llm.generate(texts, params)
    return [list(output.token_ids) for output in outputs], seen_in(outputs.report.summary)


def seen_in(summary: RunSummary) -> set[str]:
    """What a run did: `disk` held rows, rows were `deleted` or `rebuilt`, sequences were `preempted`."""
    happened = {
        "disk": summary.disk_peak_bytes > 0,
        "deleted": summary.traffic.deleted_rows > 0,
        "rebuilt": summary.traffic.rebuilt_rows > 0,
        "preempted": summary.num_preempted > 0,
    }
    return {name for name, yes in happened.items() if yes}
