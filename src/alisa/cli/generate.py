"""`alisa generate`: text for one prompt on the terminal, or for a file of prompts and results, resumable."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, TypeAlias

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from alisa.cli.job import Answers, Job, print_record, run_job
from alisa.cli.options import DisplayOptions, EngineOptions, FileOptions
from alisa.cli.prompts import gather_prompts
from alisa.cli.report import ReportFile, prediction_line, summary_lines, summary_table
from alisa.cli.results import ResultFile, settings_digest
from alisa.cli.screen import error_console, loading_bar, say
from alisa.config import SamplingParams
from alisa.errors import InputError
from alisa.planner.saved import load_profile

if TYPE_CHECKING:
    from alisa.llm import LLM

LLMFactory: TypeAlias = "Callable[[EngineOptions, Callable[[int, int], None]], LLM]"
"""Options and a progress callback to a model; tests pass a factory of their own."""

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells count."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate text for one prompt, or for a file of prompts.

    For instance:
      alisa generate "The ship had been at sea for" --max-tokens 64
      alisa generate --input prompts.jsonl --output results.jsonl --temperature 0.8
      alisa generate "Once" --model DIR --sparsity 0.9 --kv-device-memory 2GiB --verify
    """

    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="[PROMPT ...]", help_behavior_hint="")] = ()
    """Texts to continue; the text of one prompt appears while it is made."""
    chat: bool = False
    """Treat each prompt as a message to a chat model and let the model's template frame it."""
    verify: bool = False
    """Compare a few of the finished texts with dense attention: same next tokens, divergence, attention mass lost."""
    files: OmitArgPrefixes[FileOptions] = field(default_factory=FileOptions)
    engine: OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)
    sampling: OmitArgPrefixes[UseAppendAction[SamplingParams]] = field(default_factory=SamplingParams)
    display: OmitArgPrefixes[DisplayOptions] = field(default_factory=DisplayOptions)

    def run(self) -> int:
        """Do it; returns the exit status."""
        return run_generate(self, make_llm=load_llm)

    def digest(self) -> str:
        """What must be equal for two runs to share a file of results: all that decides the tokens.

        Memory caps and batch size are left out, because they never change a token.
        """
        engine = self.engine
        settings = {
            "model": engine.model,
            "policy": engine.policy,
            "sparsity": engine.sparsity,
            "dtype": engine.dtype,
            # Left out where it is as before, so that older files of results go on.
            **({} if engine.weight_dtype == "auto" else {"weight_dtype": engine.weight_dtype}),
            "kv_dtype": engine.kv_dtype,
            "device": engine.device,
            "chat": self.chat,
            "sampling": asdict(self.sampling),
        }
        return settings_digest(settings)


def load_llm(options: EngineOptions, progress: Callable[[int, int], None]) -> LLM:
    """The model that `options` ask for; the first place where torch is imported."""
    from alisa.llm import LLM

    return LLM(
        options.model,
        policy=options.policy,
        sparsity=options.sparsity,
        dtype=options.dtype,
        weight_dtype=options.weight_dtype,
        kv_dtype=options.kv_dtype,
        device=options.device,
        kv_device_memory=options.kv_device_memory,
        kv_host_memory=options.kv_host_memory,
        kv_disk_memory=options.kv_disk_memory,
        kv_disk_path=options.kv_disk_path,
        schedule=options.schedule,
        max_batch=options.max_batch,
        progress=progress,
    )


def run_generate(args: Generate, make_llm: LLMFactory) -> int:
    """Answer every prompt that its output file does not hold yet; returns the exit status.

    Raises:
        AlisaError: something the caller can mend; results finished until then are kept.
    """
    prompts = gather_prompts(args.prompts, args.files.input, args.files.limit)
    run = args.digest()
    with ExitStack() as stack:
        results = stack.enter_context(ResultFile(args.files.output, prompts, run)) if args.files.output else None
        report = stack.enter_context(ReportFile(args.files.report)) if args.files.report else None
        finished = results.finished if results else frozenset()
        todo = tuple(index for index in range(len(prompts)) if index not in finished)
        job = Job(
            prompts=prompts,
            todo=todo,
            chat=args.chat,
            sampling=args.sampling,
            verify=args.verify,
            run=run,
            output=args.files.output,
            quiet=args.display.quiet,
        )
        if not todo:
            say(f"All {len(prompts)} prompts are already in {args.files.output}; nothing was left to do.")
            if args.display.json:
                print_record(job, Answers())
            return 0
        with loading_bar(args.engine.model or "the embedded model", show=job.show_progress) as progress:
            llm = make_llm(args.engine, progress)
        answers = run_job(llm, job, results)
        summary = None if answers.interrupted else llm.summary()
        if report:
            report.write(llm, summary)
        if summary and not args.display.quiet:
            lines = [*summary_lines(llm.name, llm.config, summary, answers.verified)]
            if llm.config.device != "cuda":
                hardware = load_profile()
                predicted = None if hardware is None else llm.predict(hardware)
                lines.append(prediction_line(summary, predicted))
            error_console().print(summary_table(iter(lines)))
        if args.display.json:
            print_record(job, answers, engine=llm.describe(), summary=summary)
        if answers.failed:
            index, error = min(answers.failed.items())
            raise InputError(
                f"{len(answers.failed)} of {len(prompts)} prompts lost their KV rows (prompt {index + 1}: {error}); "
                "the others are finished. Use another --kv-disk-path or --kv-disk-memory 0 and run them again."
            )
        if not answers.interrupted:
            return 0
        num_done = job.num_finished(answers)
        kept = f"are in {args.files.output}; run the same command again to go on" if results else "were finished"
        say(f"interrupted: {num_done} of {len(prompts)} prompts {kept}.")
        return INTERRUPTED
