"""The work of one `alisa generate`: which prompts go to the model, and what becomes of every answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from alisa.cli.results import ResultFile, result_record
from alisa.cli.screen import LiveText, ResultList, Screen, say, waiting
from alisa.config import SamplingParams
from alisa.errors import CapacityError, PromptError
from alisa.outputs import RequestOutput, RunSummary

if TYPE_CHECKING:
    from alisa.lab.verify import VerifyReport
    from alisa.llm import LLM


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one call of the command has to do."""

    prompts: tuple[str, ...]
    todo: tuple[int, ...]
    """Indices of the prompts that no earlier run has finished."""
    chat: bool
    sampling: SamplingParams
    verify: bool
    run: str
    """Digest of the settings that decide the tokens."""
    output: Path | None
    """File of results; None: standard output."""
    quiet: bool

    @property
    def show_progress(self) -> bool:
        """True when a person watches standard error."""
        return sys.stderr.isatty() and not self.quiet

    def num_finished(self, answers: Answers) -> int:
        """Prompts answered by this run and those before it."""
        return len(self.prompts) - len(self.todo) + len(answers.records)

    def requests(self, llm: LLM) -> list[str | list[int]]:
        """The prompts as the model wants them."""
        texts = [self.prompts[index] for index in self.todo]
        if not self.chat:
            return list(texts)
        return [llm.chat_prompt([{"role": "user", "content": text}]) for text in texts]

    def params(self) -> list[SamplingParams]:
        """A seed for each prompt from its own index, so that a continued run draws what an uninterrupted one draws."""
        return [replace(self.sampling, seed=self.sampling.seed + index) for index in self.todo]

    def screen(self) -> Screen:
        """What to show while it runs."""
        # A continuation follows its prompt at once, an answer after a blank line.
        separator = "\n\n" if self.chat else ""
        if self.output is None and len(self.prompts) == 1:
            return LiveText(self.prompts[0], separator)
        return ResultList(
            total=len(self.prompts),
            already=len(self.prompts) - len(self.todo),
            show_bar=self.show_progress,
            print_results=self.output is None,
            separator=separator,
        )


@dataclass(kw_only=True)
class Answers:
    """What came out of the model so far."""

    outputs: list[RequestOutput] = field(default_factory=list)
    records: dict[int, dict[str, object]] = field(default_factory=dict)
    """By the index of the prompt."""
    failed: dict[int, str] = field(default_factory=dict)
    """Prompts that ended in an error, and which; they are not in the results, so that a later run does them again."""
    verified: VerifyReport | None = None
    interrupted: bool = False


def run_job(llm: LLM, job: Job, results: ResultFile | None) -> Answers:
    """Run the job to its end or to Ctrl-C; every finished request is in `results` before it is shown.

    Raises:
        AlisaError: a prompt does not suit the model (nothing has been run), or `results` cannot be written.
    """
    answers = Answers()
    try:
        # Every prompt is checked here, before any of them is shown.
        try:
            events = llm.stream(job.requests(llm), job.params())
        except PromptError as error:  # a resumed run gives the model only the rest of the prompts
            raise PromptError(job.todo[error.index], error.problem) from error
        with job.screen() as screen:
            for event in events:
                index = job.todo[event.index]
                if not isinstance(event, RequestOutput):
                    screen.grew(index, event.text)
                    continue
                if event.finish_reason == "error":
                    answers.failed[index] = event.error
                    continue
                record = result_record(index, job.prompts[index], event, job.run)
                if results:
                    results.append(index, record)
                answers.outputs.append(event)
                answers.records[index] = record
                screen.finished(index, job.prompts[index], event)
        if job.verify:
            with waiting("comparing with dense attention", show=job.show_progress):
                answers.verified = _verified(llm, answers.outputs)
    except KeyboardInterrupt:
        answers.interrupted = True
    return answers


def _verified(llm: LLM, outputs: list[RequestOutput]) -> VerifyReport | None:
    """The comparison with dense attention; None, with the reason on the screen, where it cannot be made."""
    if not outputs:
        return None
    try:
        # Here and not above: the command line is read without torch.
        from alisa.lab.verify import verify_outputs

        return verify_outputs(llm, outputs)
    except CapacityError as error:  # the results are there all the same
        say(f"not verified: {error}")
        return None


def print_record(
    job: Job, answers: Answers, *, engine: Mapping[str, object] | None = None, summary: RunSummary | None = None
) -> None:
    """End standard output with the whole run as one JSON record on one line."""
    record = {
        "command": "generate",
        "complete": not answers.interrupted,
        "num_prompts": len(job.prompts),
        "num_finished": job.num_finished(answers),
        "failed": {str(index): error for index, error in sorted(answers.failed.items())},
        "run": job.run,
        "engine": engine,
        "summary": asdict(summary) if summary else None,
        "verified": asdict(answers.verified) if answers.verified else None,
        "output": str(job.output) if job.output else None,
        "results": None if job.output else [answers.records[index] for index in sorted(answers.records)],
    }
    sys.stdout.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()
