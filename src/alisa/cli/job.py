"""The work of one `alisa generate`: which prompts go to the model, and what becomes of every answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alisa.cli.files import to_json
from alisa.cli.prompts import Prompt
from alisa.cli.results import ResultFile, error_record, result_record
from alisa.cli.screen import LiveText, ResultList, Screen, say, waiting
from alisa.cli.signals import stop_status
from alisa.config import SamplingParams, per_request, sample_params
from alisa.errors import CapacityError, InputError, PromptError
from alisa.outputs import RequestOutput, RunSummary, TextDelta

if TYPE_CHECKING:
    from alisa.engine.report import RunReport
    from alisa.engine.shared import Stream
    from alisa.lab.verify import VerifyReport
    from alisa.llm import LLM


@dataclass(frozen=True)
class ChatFrame:
    """What the model's chat template gets in addition to the message."""

    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one call of the command has to do."""

    prompts: tuple[Prompt, ...]
    """One for each text that is wanted."""
    todo: tuple[int, ...]
    """Numbers in `prompts` of those that no earlier run has finished."""
    chat: ChatFrame | None
    """What frames each prompt as a message; None: it is a text to continue."""
    sampling: SamplingParams
    """Of every prompt that has no settings of its own."""
    skip_invalid: bool
    """A prompt that cannot be used is skipped; else it ends the run before anything is done."""
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

    def token_ids(self, llm: LLM, index: int) -> list[int]:
        """Prompt `index` as the model wants it.

        Raises:
            InputError: the model's chat template refuses it.
        """
        text = self.prompts[index].text
        if self.chat is None:
            return llm.tokenizer.encode(text)
        message = {"role": "user", "content": text}
        return llm.chat_prompt([message], tools=self.chat.tools, chat_template_kwargs=self.chat.template_kwargs)

    def params(self, index: int) -> SamplingParams:
        """Of prompt `index`, from that alone, so that a continued run draws what an uninterrupted one draws."""
        prompt = self.prompts[index]
        shared = self.sampling if "seed" in prompt.settings else per_request(self.sampling, prompt.index)
        return sample_params(replace(shared, **prompt.settings), prompt.sample or 0)

    def screen(self) -> Screen:
        """What to show while it runs."""
        # A continuation follows its prompt at once, an answer after a blank line.
        separator = "\n\n" if self.chat else ""
        if self.output is None and len(self.prompts) == 1:
            return LiveText(self.prompts[0].text, separator)
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
    skipped: dict[int, str] = field(default_factory=dict)
    """Prompts that cannot be used, and why."""
    report: RunReport | None = None
    """Steps and totals of the run; None: nothing was run."""
    verified: VerifyReport | None = None
    stopped: int = 0
    """Exit status when the run was interrupted, else 0."""


def _here(work: Callable[[], None]) -> None:
    """Call it in this thread."""
    work()


def run_job(
    llm: LLM, job: Job, results: ResultFile | None, read_in: Callable[[Callable[[], None]], None] = _here
) -> Answers:
    """Run the job to its end or to Ctrl-C; every finished request is in `results` before it is shown.

    Args:
        llm: the model.
        job: what is to be done.
        results: where to.
        read_in: calls what it is given, in the thread that makes the steps of the model.

    Raises:
        AlisaError: a prompt does not suit the model (nothing has been run), or `results` cannot be written.
    """
    answers = Answers()
    try:
        # Every prompt is checked here, before any of them is shown.
        order, stream = _submit(llm, job, answers.skipped)
        with job.screen() as screen:
            for index, problem in sorted(answers.skipped.items()):
                _keep(answers, results, index, error_record(job.prompts[index], problem, job.run))
                screen.skipped(index, problem)
            if stream is not None:
                read_in(partial(_read, job, answers, results, screen, order, stream))
        if job.verify:
            with waiting("comparing with dense attention", show=job.show_progress):
                answers.verified = _verified(llm, answers.outputs)
    except KeyboardInterrupt as stop:
        answers.stopped = stop_status(stop)
    return answers


def _read(
    job: Job, answers: Answers, results: ResultFile | None, screen: Screen, order: Sequence[int], stream: Stream
) -> None:
    """Read the stream to its end; request i of it is prompt `order[i]`."""
    with stream:
        try:
            for event in stream:
                _take(job, answers, results, screen, order[event.index], event)
        finally:
            answers.report = stream.report()


def _take(
    job: Job, answers: Answers, results: ResultFile | None, screen: Screen, index: int, event: TextDelta | RequestOutput
) -> None:
    """Show what prompt `index` has said, and keep it once it is finished."""
    if not isinstance(event, RequestOutput):
        screen.grew(index, event.text)
    elif event.finish_reason == "error":
        answers.failed[index] = event.error
    else:
        _keep(answers, results, index, result_record(job.prompts[index], event, job.run))
        answers.outputs.append(event)
        screen.finished(index, job.prompts[index].text, event)


def _submit(llm: LLM, job: Job, skipped: dict[int, str]) -> tuple[list[int], Stream | None]:
    """The prompts that run, by their number in the stream, and the stream; the others are put into `skipped`.

    Raises:
        InputError: a prompt cannot be used, and such are not to be skipped.
    """
    ids: dict[int, list[int]] = {}

    def skip(index: int, problem: str, error: Exception | None = None) -> None:
        if not job.skip_invalid:
            raise InputError(problem) from error
        skipped[index] = problem
        ids.pop(index, None)

    for index in job.todo:
        prompt = job.prompts[index]
        if prompt.problem is not None:
            skip(index, prompt.problem)
            continue
        try:
            ids[index] = job.token_ids(llm, index)
        except InputError as error:
            skip(index, f"{prompt.name} is refused: {error}", error)
    while ids:
        order = [*ids]
        try:
            return order, llm.stream([*ids.values()], [job.params(index) for index in order])
        except PromptError as error:
            skip(order[error.index], f"{job.prompts[order[error.index]].name} {error.problem}", error)
    return [], None


def _keep(answers: Answers, results: ResultFile | None, index: int, record: dict[str, object]) -> None:
    if results:
        results.append(index, record)
    answers.records[index] = record


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
        "complete": not answers.stopped,
        "num_prompts": len(job.prompts),
        "num_finished": job.num_finished(answers),
        "failed": {str(index): error for index, error in sorted(answers.failed.items())},
        "skipped": {str(index): problem for index, problem in sorted(answers.skipped.items())},
        "run": job.run,
        "engine": engine,
        "summary": asdict(summary) if summary else None,
        "verified": asdict(answers.verified) if answers.verified else None,
        "output": str(job.output) if job.output else None,
        "results": None if job.output else [answers.records[index] for index in sorted(answers.records)],
    }
    sys.stdout.write(to_json(record) + "\n")
    sys.stdout.flush()
