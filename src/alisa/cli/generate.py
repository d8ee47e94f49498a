"""`alisa generate`: text for one prompt on the terminal, or for a file of prompts and results, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from tyro.conf import Positional, UseAppendAction, arg

from alisa.cli.cluster_options import FleetOptions
from alisa.cli.files import refuse_same_file
from alisa.cli.job import Answers, ChatFrame, Job, print_record, run_job
from alisa.cli.options import DisplayOptions, FileOptions
from alisa.cli.prompts import each_sample, gather_prompts, in_part
from alisa.cli.ray_job import run_fleet
from alisa.cli.report import ReportFile, prediction_line, summary_lines, summary_table
from alisa.cli.results import ResultFile, settings_digest
from alisa.cli.screen import error_console, loading_bar, say
from alisa.config import EngineConfig, SamplingParams
from alisa.errors import AlisaError, InputError
from alisa.planner.saved import load_profile
from alisa.policy.layer_budgets import load_layer_budgets
from alisa.records.document import read_json

if TYPE_CHECKING:
    from alisa.engine.report import RunReport
    from alisa.llm import LLM
    from alisa.planner.cost import StepCost
    from alisa.planner.hardware import Hardware

LLMFactory: TypeAlias = "Callable[[EngineConfig, Callable[[int, int], None]], LLM]"
"""Options and a progress callback to a model; tests pass a factory of their own."""

_CHANGE_NO_TOKEN = frozenset(
    (
        "quality",  # what it stands for is in the options that it sets
        "kv_device_memory",
        "kv_host_memory",
        "kv_disk_memory",
        "kv_disk_path",
        "schedule",
        "max_num_seqs",
        "prefill_chunk",
        "schedule_policy",
        "speculative",
        "num_speculative_tokens",
        "fair",
        "prefix_cache",
        "prefix_cache_memory",
        "prefix_cache_disk",
        "prefix_cache_disk_memory",
    )
)
"""Engine options that may differ between runs that share a file of results."""
_ALWAYS_IN_DIGEST = frozenset(
    (
        *("model", "policy", "sparsity", "dtype", "kv_dtype", "device"),
        *("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "stop_ids"),
        *("ignore_eos", "seed"),
    )
)
"""The others only where they are not the default, so that older files of results go on."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate text for one prompt, or for a file of prompts.

    For instance:
      alisa generate "The ship had been at sea for" --max-tokens 64
      alisa generate --input prompts.jsonl --output results.jsonl --temperature 0.8
      alisa generate "Once" --model DIR --sparsity 0.9 --kv-device-memory 2GiB --verify
      alisa generate --input prompts.jsonl --output DIR --ray auto
    """

    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="[PROMPT ...]", help_behavior_hint="")] = ()
    """Texts to continue; the text of one prompt appears while it is made."""
    chat: bool = False
    """Treat each prompt as a message to a chat model and let the model's template frame it."""
    tools: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """With --chat: a JSON list of functions that the model may call, each as its template wants it (a JSON schema)."""
    chat_template_kwargs: Annotated[str | None, arg(metavar="JSON", help_behavior_hint="")] = None
    """With --chat: a JSON object of what else the model's template knows, such as {"enable_thinking": false}."""
    sampling_from: Annotated[
        Literal["model", "greedy"] | None, arg(name="sampling", help_behavior_hint="(default: model with --chat)")
    ] = None
    """model: sampling options below that are at their default are taken from the model's generation_config.json.
    greedy: the most likely token, unless the options below say otherwise."""
    verify: bool = False
    """Compare a few of the finished texts with dense attention: same next tokens, divergence, attention mass lost."""
    files: FileOptions = field(default_factory=FileOptions)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: UseAppendAction[SamplingParams] = field(default_factory=SamplingParams)
    fleet: FleetOptions = field(default_factory=FleetOptions)
    display: DisplayOptions = field(default_factory=DisplayOptions)

    def run(self) -> int:
        """Do it; returns the exit status."""
        if self.fleet.ray is not None:
            return run_fleet(self, chat_frame(self))
        if self.fleet != FleetOptions():
            raise InputError("An option says how --ray is to work, and there is no --ray; give it, or leave that out.")
        return run_generate(self, make_llm=load_llm)

    def digest(self, frame: ChatFrame | None = None) -> str:
        """What must be equal for two runs to share a file of results: all that decides the tokens.

        Memory caps and batch size are left out, because they never change a token; settings of single prompts, because
        each result carries its own.

        Args:
            frame: from `chat_frame`.
        """
        default = EngineConfig()
        engine = {
            option.name: getattr(self.engine, option.name)
            for option in fields(EngineConfig)
            if option.name in _ALWAYS_IN_DIGEST
            or (
                option.name not in _CHANGE_NO_TOKEN
                and getattr(self.engine, option.name) != getattr(default, option.name)
            )
        }
        if self.engine.budgets is not None:
            # What is in the file, under whatever name.
            engine["budgets"] = [asdict(budget) for budget in load_layer_budgets(self.engine.budgets).budgets]
        # More texts for a prompt change none of those that are there.
        plain = asdict(SamplingParams())
        sampling = {
            name: value
            for name, value in asdict(self.sampling).items()
            if name in _ALWAYS_IN_DIGEST or (name != "n" and value != plain[name])
        }
        chat: dict[str, Any] = {} if frame is None else asdict(frame)
        if self.takes_own_sampling:
            chat["sampling_from"] = "model"
        chat = {name: value for name, value in chat.items() if value is not None}
        return settings_digest({**engine, **chat, "chat": self.chat, "sampling": sampling})

    @property
    def takes_own_sampling(self) -> bool:
        """Whether the model's files say how to sample, where no option does."""
        return self.sampling_from == "model" or (self.sampling_from is None and self.chat)


def load_llm(config: EngineConfig, progress: Callable[[int, int], None]) -> LLM:
    """The model that `config` asks for; the first place where torch is imported."""
    from alisa.llm import LLM

    return LLM(config=config, progress=progress)


def run_generate(args: Generate, make_llm: LLMFactory) -> int:
    """Answer every prompt that its output file does not hold yet; returns the exit status.

    Raises:
        AlisaError: something the caller can mend; results finished until then are kept.
    """
    files = args.files
    frame = chat_frame(args)
    own = {"--input": files.input, "--output": files.output, "--report": files.report}
    refuse_same_file({**own, "--schedule": args.engine.schedule})
    given = gather_prompts(args.prompts, files.input, files.limit, keep_invalid=files.skip_invalid)
    prompts = in_part(each_sample(given, args.sampling.n), files.shard)
    run = args.digest(frame)
    with ExitStack() as stack:
        results = stack.enter_context(ResultFile(files.output, prompts, run)) if files.output else None
        report = stack.enter_context(ReportFile(files.report)) if files.report else None
        finished = results.finished if results else frozenset()
        todo = tuple(index for index in range(len(prompts)) if index not in finished)
        job = Job(
            prompts=prompts,
            todo=todo,
            chat=frame,
            sampling=args.sampling,
            skip_invalid=files.skip_invalid,
            verify=args.verify,
            run=run,
            output=files.output,
            quiet=args.display.quiet,
        )
        if not todo:
            say(f"All {len(prompts)} prompts are already in {files.output}; nothing was left to do.")
            if args.display.json:
                print_record(job, Answers())
            return 0
        with loading_bar(args.engine.model or "the embedded model", show=job.show_progress) as progress:
            llm = make_llm(args.engine, progress)
        if args.takes_own_sampling:
            job = replace(job, sampling=llm.own_sampling(args.sampling))
        try:
            answers = run_job(llm, job, results)
        except AlisaError:
            if report:
                with suppress(InputError):  # the first error is the one to tell
                    report.write(llm, args.sampling, None, complete=False)
            raise
        summary = None if answers.report is None or answers.stopped else answers.report.summary
        if report:
            report.write(llm, args.sampling, answers.report, complete=not answers.stopped)
        if summary and not args.display.quiet:
            lines = [*summary_lines(llm.name, llm.config, summary, answers.verified)]
            if llm.config.device != "cuda" and not llm.config.exact:  # whose plans do not show what drafts read
                hardware = load_profile()
                predicted = None if hardware is None else predicted_cost(answers.report, hardware)
                lines.append(prediction_line(summary, predicted))
            error_console().print(summary_table(iter(lines)))
        if args.display.json:
            print_record(job, answers, engine=llm.describe(), summary=summary)
        return _status(job, answers)


def chat_frame(args: Generate) -> ChatFrame | None:
    """What goes to the model's template beside the prompts; None without --chat.

    Raises:
        InputError: an option needs --chat, or its JSON is not of its kind.
    """
    if not args.chat:
        for flag, value in (("--tools", args.tools), ("--chat-template-kwargs", args.chat_template_kwargs)):
            if value is not None:
                raise InputError(f"{flag} is for a chat model's template; add --chat.")
        return None
    return ChatFrame(_tools(args.tools), _template_kwargs(args.chat_template_kwargs))


def _tools(path: Path | None) -> list[dict[str, Any]] | None:
    if path is None:
        return None
    tools = read_json(path)
    if not isinstance(tools, list):
        raise InputError(f"--tools {path} holds a JSON {type(tools).__name__}, a JSON list is needed.")
    return tools


def _template_kwargs(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--chat-template-kwargs is not readable JSON ({error}).") from error
    if not isinstance(value, dict):
        raise InputError(f"--chat-template-kwargs holds a JSON {type(value).__name__}, a JSON object is needed.")
    return value


def predicted_cost(report: RunReport | None, hardware: Hardware) -> StepCost | None:
    """What the decode steps should have cost on this machine; None where nothing is known."""
    # Here and not above: the command line is read without torch.
    from alisa.lab.predict import predict

    return None if report is None else predict(report, hardware)


def _status(job: Job, answers: Answers) -> int:
    """The exit status, after a line about what was not done.

    Raises:
        InputError: prompts ended in an error in the middle of the work.
    """
    total = len(job.prompts)
    if answers.skipped:
        say(f"skipped {len(answers.skipped)} of {total} prompts; first: {answers.skipped[min(answers.skipped)]}")
    if answers.stopped:
        kept = f"are in {job.output}; run the same command again to go on" if job.output else "were finished"
        say(f"interrupted: {job.num_finished(answers)} of {total} prompts {kept}.")
        return answers.stopped
    if answers.failed:
        index, error = min(answers.failed.items())
        raise InputError(
            f"{len(answers.failed)} of {total} prompts ended in an error (prompt {index + 1}: {error}); the others are "
            "finished. Where rows on disk were lost, run it again with another --kv-disk-path or --kv-disk-memory 0."
        )
    return 0
