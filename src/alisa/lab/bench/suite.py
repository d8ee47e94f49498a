"""`alisa bench run` without the terminal: measurements in, one record each out, every engine in its own process."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from alisa.config import WeightFormat
from alisa.engine.loaded import embedded_model
from alisa.errors import InputError
from alisa.lab.bench import remote
from alisa.lab.bench.checkpoint import is_written, write_checkpoint
from alisa.lab.bench.engines import OWN, PEERS, reading_of
from alisa.lab.bench.experiment import Measurement, Workload
from alisa.lab.bench.floor import Speeds, floor_of, pass_rows
from alisa.lab.bench.remote.measured import EngineJob
from alisa.lab.bench.shapes import SHAPES
from alisa.lab.bench.stamp import current_stamp
from alisa.machine import ASK_FOR_HUGE_PAGES
from alisa.model.stored import open_model
from alisa.model.tokenizer import Tokenizer
from alisa.planner.footprint import kv_token_bytes
from alisa.records.schema import RunFigures, RunRecord, WorkloadRecord
from alisa.records.structure import structure
from alisa.spec import ModelSpec

FIRST_ORDINARY_ID = 10
"""Token ids below are left to the models' special tokens."""

Told = dict[str, Any]
"""What a driver printed."""

_HUGE_PAGES = {ASK_FOR_HUGE_PAGES: "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Every engine asks for them, as this one does by itself: by torch, or by malloc."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where things lie.

    Args:
        drivers: scripts of the other engines.
        environments: their virtual environments, one folder each.
        models: checkpoints with random weights, written when they are first needed.
    """

    drivers: Path
    environments: Path
    models: Path

    def python(self, environment: str) -> Path:
        """The interpreter of an environment."""
        return self.environments / environment / "bin" / "python"


@dataclass(frozen=True, slots=True)
class PreparedWorkload:
    """A workload with everything that all engines get alike."""

    workload: Workload
    spec: ModelSpec
    model: Path
    prompts: tuple[tuple[int, ...], ...]
    """Token ids; of a conversation what is new in each turn."""
    threads: int
    scratch: Path
    """Where an engine may leave the model in a form of its own."""
    stored: WeightFormat
    """What the model's file has its layers in."""

    @property
    def prompt_lens(self) -> list[int]:
        """Tokens of every prompt; in a conversation with all that was said before."""
        lengths = [len(ids) for ids in self.prompts]
        if self.workload.turns is None:
            return lengths
        return [length + turn * self.workload.output_len for turn, length in enumerate(accumulate(lengths))]

    @property
    def known(self) -> int:
        """Tokens of all prompts that were said before."""
        return sum(self.prompt_lens) - sum(map(len, self.prompts))

    @property
    def kv_need_bytes(self) -> int:
        """K and V of all sequences that run together, at their ends, the longest counted."""
        longest = sorted(self.prompt_lens, reverse=True)[: self.workload.batch]
        rows = sum(length + self.workload.output_len - 1 for length in longest)
        return rows * kv_token_bytes(self.spec, self.workload.dtype)

    @property
    def kv_budget_bytes(self) -> int | None:
        """The cap; None: none."""
        share = self.workload.kv_share
        return None if share is None else int(share * self.kv_need_bytes)

    def job(self, options: Mapping[str, Any]) -> EngineJob:
        """What a driver is asked to do."""
        return EngineJob(
            model=str(self.model),
            shape=asdict(self.spec),
            prompts=[list(ids) for ids in self.prompts],
            output_len=self.workload.output_len,
            batch=self.workload.batch,
            dtype=self.workload.dtype,
            threads=self.threads,
            seed=self.workload.seed,
            kv_token_bytes=kv_token_bytes(self.spec, self.workload.dtype),
            kv_budget_bytes=self.kv_budget_bytes,
            options=dict(options),
            turns=self.workload.turns is not None,
            scratch=str(self.scratch),
        )


def prepare_workload(workload: Workload, texts: Sequence[str] | None, places: Places, threads: int) -> PreparedWorkload:
    """The workload with its model, which is written if it is a shape that nobody has asked for yet, and its prompts.

    Args:
        workload: from the experiment.
        texts: of its file of prompts; None where it has none.
        places: where the model goes.
        threads: that every engine may use.

    Raises:
        AlisaError: there is no such model, or the prompts do not suit it.
    """
    if workload.model in SHAPES:
        spec, stored = SHAPES[workload.model], "float"
        model = places.models / workload.model
        if not is_written(model):
            write_checkpoint(spec, model)
    else:
        model = Path(os.path.expandvars(workload.model)).expanduser()
        if not model.exists():
            raise InputError(
                f"workload {workload.name!r} is of {model}, which is not there; `make models` fetches the real ones."
            )
        opened = open_model(model)
        spec, stored = opened.spec, opened.weight_format
    if texts is None:
        assert workload.prompt_len is not None, "a workload has prompts or their length"
        lengths = [workload.prompt_len] * (workload.turns or workload.batch)
        prompts = _random_prompts(workload, spec, lengths)
    elif workload.model in SHAPES:
        # Random weights do not care what a prompt says; its length is what a tokenizer of prose makes of it.
        tokenizer = Tokenizer.load(embedded_model())
        prompts = _random_prompts(workload, spec, [len(tokenizer.encode(text)) for text in texts])
    else:
        tokenizer = open_model(model).tokenizer()
        prompts = [tokenizer.encode(text) for text in texts]
    work = PreparedWorkload(workload, spec, model, tuple(map(tuple, prompts)), threads, places.models, stored)
    longest = max(work.prompt_lens) + workload.output_len
    if longest > spec.max_positions:
        raise InputError(
            f"workload {workload.name!r} has a sequence of {longest} tokens, {workload.model} has "
            f"{spec.max_positions} positions; take fewer output tokens or shorter prompts."
        )
    return work


def _random_prompts(workload: Workload, spec: ModelSpec, lengths: Sequence[int]) -> list[list[int]]:
    """Token ids, the same on every machine."""
    rng = random.Random(f"{workload.seed} {workload.model} {workload.batch} {workload.prompt_len}")
    return [[rng.randrange(FIRST_ORDINARY_ID, spec.vocab_size) for _ in range(length)] for length in lengths]


def measure_floor(work: PreparedWorkload, weight_dtype: WeightFormat = "float") -> Speeds:
    """What the machine can do with such weights, measured in a process of its own whose memory is gone afterwards."""
    job = {
        "shape": asdict(work.spec),
        "dtype": work.workload.dtype,
        "batch": min(work.workload.batch, len(work.prompts)),
        "pass_rows": pass_rows(work.prompt_lens),
        "threads": work.threads,
        "weight_dtype": weight_dtype,
    }
    result = _last_line([sys.executable, "-m", "alisa.lab.bench.floor"], job, work, path=None)
    if result.get("status") == "failed":
        raise InputError(f"The floor cannot be measured: {result['reason']}.")
    return structure(Speeds, result)


def measure(
    measurement: Measurement, work: PreparedWorkload, before: Speeds, places: Places
) -> tuple[RunRecord, Speeds]:
    """The record of one measurement, and what the machine could do after it.

    An engine that fails, or is not there, has a record too.

    Args:
        measurement: what is done.
        work: its workload.
        before: what the machine could do just now.
        places: where things lie.
    """
    run = measurement.run
    told = _result(measurement, work, places)
    record = RunRecord(
        cell=measurement.cell,
        experiment=measurement.experiment,
        workload=WorkloadRecord(
            **asdict(work.workload), num_sequences=len(work.prompts), prompt_tokens=sum(map(len, work.prompts))
        ),
        run=run.name,
        engine=run.engine,
        options=dict(run.options),
        round=measurement.round,
        status=told["status"],
        reason=told.get("reason"),
        stamp=replace(current_stamp(), num_threads=work.threads),
        kv_need_bytes=work.kv_need_bytes,
        kv_budget_bytes=work.kv_budget_bytes,
    )
    if record.status != "ran":
        return record, before
    after = measure_floor(work)
    final_len = max(work.prompt_lens) + work.workload.output_len
    reading = reading_of(run.engine, run.options, work.workload.dtype, final_len, work.stored)
    speeds = before.fastest(after)
    if run.engine == OWN and reading.weights != "float":
        speeds = measure_floor(work, reading.weights).reading(speeds)
    floor = floor_of(
        work.spec,
        work.workload.dtype,
        reading,
        speeds,
        prompt_lens=work.prompt_lens,
        output_len=work.workload.output_len,
        batch=work.workload.batch,
        known=work.known,
    )
    ran = replace(
        record,
        figures=_figures(work, told),
        floor=floor,
        others_share=told["others_share"],
        versions=told["versions"],
        notes=tuple(told["notes"]),
        details=told["details"],
        step_quartiles_s=told["step_quartiles_s"] and tuple(told["step_quartiles_s"]),
        num_steps=told["num_steps"],
    )
    return ran, after


def _figures(work: PreparedWorkload, told: Told) -> RunFigures:
    """What a table shows."""
    firsts = sorted(told["first_token_s"])
    asked = len(work.prompts) * work.workload.output_len
    prefill_s, wall_s = firsts[-1], told["wall_s"]
    if work.workload.turns is not None:
        prefill_s = sum(firsts)
    # Where prompts are read between decode steps, the two cannot be told apart from outside.
    apart = (told["prompts_first"] or work.workload.turns is not None) and work.workload.output_len > 1
    return RunFigures(
        tokens_per_s=asked / wall_s,
        decode_tokens_per_s=(asked - len(work.prompts)) / (wall_s - prefill_s) if apart else None,
        wall_s=wall_s,
        first_token_median_s=firsts[len(firsts) // 2],
        first_token_last_s=firsts[-1],
        peak_rss_bytes=told["peak_rss_bytes"],
    )


def _result(measurement: Measurement, work: PreparedWorkload, places: Places) -> Told:
    """What the driver printed, or why it did not."""
    run = measurement.run
    job = asdict(work.job(run.options))
    if run.engine == OWN:
        return _last_line([sys.executable, "-m", "alisa.lab.bench.worker"], job, work, path=None)
    peer = PEERS[run.engine]
    if peer.needs_gpu is not None:
        return {"status": "unavailable", "reason": peer.needs_gpu}
    python, driver = places.python(peer.environment), places.drivers / peer.driver
    if work.model.is_file() and not peer.reads_gguf:
        return {"status": "unavailable", "reason": f"its driver {peer.driver} reads no GGUF files"}
    if work.workload.turns is not None and not peer.converses:
        return {"status": "unavailable", "reason": f"its driver {peer.driver} holds no conversations"}
    if not python.exists():
        return {"status": "missing", "reason": f"its environment {python} is not there; make peer-{peer.environment}"}
    if not driver.exists():
        return {
            "status": "missing",
            "reason": f"its driver {driver} is not there; run in the checkout or give --drivers",
        }
    return _last_line([str(python), str(driver)], job, work, path=Path(remote.__file__).parent)


def _last_line(command: Sequence[str], job: Mapping[str, Any], work: PreparedWorkload, *, path: Path | None) -> Told:
    """The JSON that the last line of standard output holds; a process that fails gives `failed` and its last words."""
    environment = dict(os.environ)
    # Most engines read the number of threads from here before their own options are looked at.
    environment |= {"OMP_NUM_THREADS": str(work.threads), "HF_HUB_OFFLINE": "1"} | _HUGE_PAGES
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    timeout_s = work.workload.timeout_s
    try:
        done = subprocess.run(
            command,
            input=json.dumps(job),
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"not done after {timeout_s} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return {"status": "failed", "reason": f"ended by {name}{hint}"}
    return {"status": "failed", "reason": f"exit status {done.returncode}: {_last_words(done.stderr, done.stdout)}"}


def _last_words(errors: str, output: str) -> str:
    """What most likely went wrong: the first error that is named, from which others follow, or the last line."""
    text = errors.strip() or output.strip() or "no output"
    found = re.search(r"\b\w*(Error|Exception): .*", text)
    return found.group(0) if found else text.splitlines()[-1]
