"""kvpress and alisa's policies on the same model in transformers, the same tasks and the same budgets.

    make peer-kvpress
    python benchmarks/presses.py --model DIR --data DATA --output benchmarks/results/accuracy/presses_smollm2.jsonl

DIR is a model as transformers reads it, DATA a directory with `wikitext2` and `prose/heldout`. alisa runs below
transformers' forward pass (`--engine hf`), kvpress in its own environment with its own transformers; each is compared
with dense attention in its own environment, unit by unit. Cells that the output has are not measured again.

A press drops tokens of the prompt once, when it has been read; a policy of alisa keeps all and chooses in every step
what it reads. At a sparsity of 0.8 a press keeps a fifth of the prompt and all that follows, and alisa reads a fifth of
the tokens so far: the record says what each read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from alisa import LLM
from alisa.config import EngineConfig
from alisa.hf.decoder import load_transformers
from alisa.lab.eval.measurement import Evaluation, fingerprint, measure_cell, measure_cells
from alisa.lab.eval.perplexity import Perplexity, perplexity_of
from alisa.lab.eval.recall import recalls_of
from alisa.lab.eval.record_file import RecordFile
from alisa.lab.eval.subject import BASELINE, Subject, variants
from alisa.lab.eval.wording import choose_wording
from alisa.lab.scoring import ScoredItem, ScoredOutput, Scorer
from alisa.records.schema import EvalStamp

PRESSES = ("SnapKVPress", "ExpectedAttentionPress", "TOVAPress", "KnormPress", "StreamingLLMPress")
NONE = "none"
"""No press: dense attention in kvpress's environment."""
DRIVER = Path(__file__).parent / "peers" / "kvpress_scores.py"


class Presses:
    """kvpress's environment with the model, which answers one job after the other."""

    def __init__(self, python: Path, model: str, dtype: str) -> None:
        self._process = subprocess.Popen(
            [str(python), str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._tell({"model": model, "dtype": dtype, "threads": torch.get_num_threads()})

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a job; see the driver."""
        self._tell(job)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("kvpress's environment ended; what it said stands above.")
        return json.loads(line)

    def close(self) -> None:
        """The process ends."""
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: Mapping[str, Any]) -> None:
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()


@dataclass(frozen=True, slots=True)
class PressScorer(Scorer):
    """Scores items with a press; policy and row format play no part."""

    presses: Presses
    press: str
    ratio: float
    seen: dict[str, Any] = field(default_factory=dict)
    """Packages, and tokens read a step."""

    @classmethod
    def beside(cls, scorer: Scorer, presses: Presses, press: str, ratio: float) -> PressScorer:
        """For the items of an evaluation that `scorer`'s model was asked for."""
        own = (scorer.decoder, scorer.kernels, scorer.kv_cap_bytes, scorer.max_batch, scorer.prefill_chunk)
        return cls(*own, presses, press, ratio)

    def score(self, policy: object, codec: object, items: Sequence[ScoredItem]) -> list[ScoredOutput]:
        """See `Scorer.score`."""
        pairs = [[list(item.prompt_ids), list(item.output_ids)] for item in items]
        said = self.presses.ask({"press": self.press, "ratio": self.ratio, "items": pairs})
        read = [count for output in said["outputs"] for count in output["read"]]
        self.seen.update(packages=said["packages"], tokens_read=sum(read) / max(len(read), 1))
        layers = self.decoder.spec.num_layers
        return [
            ScoredOutput(torch.tensor(o["log_likelihoods"]), torch.tensor(o["greedy"]), round(sum(o["read"]) * layers))
            for o in said["outputs"]
        ]


def press_records(
    subject: Subject, evaluation: Evaluation, presses: Presses, sparsities: Sequence[float], file: RecordFile
) -> None:
    """The cells of every press, into the file."""
    baseline: Sequence[float] = ()
    # Layer by layer is a way of running alisa's own attention.
    asked = replace(evaluation, mode="decode") if isinstance(evaluation, Perplexity) else evaluation
    for press, ratio in [(NONE, 0.0), *((press, ratio) for press in PRESSES for ratio in sparsities)]:
        settings = dict(evaluation.settings)
        cell = fingerprint([evaluation.kind, evaluation.task, settings, subject.name, press, ratio])
        record = file.get(cell)
        if record is None:
            scorer = PressScorer.beside(subject.scorer, presses, press, ratio)
            found = measure_cell(replace(subject, scorer=scorer), asked, BASELINE, cell, baseline)
            record = replace(
                found,
                policy=press,
                sparsity=ratio,
                details={**found.details, **scorer.seen},
                settings=settings,
                stamp=_stamp(scorer, found.stamp),
            )
            file.append(record)
        baseline = baseline or record.units or ()
        print(f"{evaluation.task} {press} {ratio:g}: {record.value:g}, {record.versus_dense:g}", file=sys.stderr)


def _stamp(scorer: PressScorer, ours: EvalStamp) -> EvalStamp:
    """Of a cell that kvpress's environment measured."""
    packages: Mapping[str, str] = scorer.seen["packages"]
    return replace(ours, torch=packages["torch"], attention="sdpa")


TASKS = ("ppl", "needle", "needle asked", "paragraphs", "paragraphs asked")
"""Perplexity of what follows a long prompt, and recall with the question after the prompt or at its end (`asked`)."""


def evaluations(subject: Subject, data: Path, args: argparse.Namespace) -> Iterator[Evaluation]:
    """Those of the tasks asked for."""
    for task in args.tasks:
        if task == "ppl":
            yield perplexity_of(
                subject,
                data / "wikitext2",
                context=2 * args.length,
                prefill=3 * args.length // 2,
                num_windows=args.windows,
                mode="layerwise",
            )
        else:
            yield from recalls_of(
                subject,
                ("needle" if task.startswith("needle") else "paragraphs",),
                lengths=[args.length],
                depths=[0, 0.25, 0.5, 0.75, 1],
                repeats=args.repeats,
                prefill=None,
                question="prompt" if task.endswith("asked") else "decoded",
                text=data / "prose" / "heldout",
                wording=choose_wording("auto", subject.name),
                seed=0,
            )


def main() -> None:
    """All cells that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory, as transformers reads it")
    parser.add_argument("--data", required=True, type=Path, help="directory with wikitext2 and prose/heldout")
    parser.add_argument("--python", type=Path, default=Path(".peers/kvpress/bin/python"), help="of kvpress")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--policies", default="sketch,swa")
    parser.add_argument("--sparsity", default="0.8,0.9")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a recall text; half of a window")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    sparsities = [float(word) for word in args.sparsity.split(",")]
    config = EngineConfig(model=args.model, dtype=args.dtype)
    subject = Subject.of(LLM(config=config, loaded=load_transformers(config)))
    chosen = variants(args.policies.split(","), sparsities, ["auto"])
    presses = Presses(args.python, args.model, args.dtype)
    with RecordFile(args.output) as file:
        for evaluation in evaluations(subject, args.data, args):
            for record in measure_cells(subject, evaluation, chosen, file):
                what = f"{record.task} {record.policy} {record.sparsity:g}"
                print(f"{what}: {record.value:g}, {record.versus_dense:g}", file=sys.stderr)
            press_records(subject, evaluation, presses, sparsities, file)
    presses.close()


if __name__ == "__main__":
    main()
