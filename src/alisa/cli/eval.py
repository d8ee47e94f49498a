"""`alisa eval ...`: what reading less of the cache costs in perplexity, answers, recall and attention.

Every evaluation runs dense attention first and compares each policy with it on the same units, so that the standard
errors are those of the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from alisa.cli.files import refuse_same_file
from alisa.cli.options import DisplayOptions
from alisa.cli.sweep import SweepOptions, known_names, numbers, run_sweep

if TYPE_CHECKING:
    from alisa.lab.eval.measurement import Evaluation
    from alisa.lab.eval.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Ppl:
    """Perplexity of a text, and its ratio to that of dense attention.

    The text is cut into windows; the first tokens of each are read densely, the rest is decoded under every policy.
    WikiText-2, PTB, Alpaca files, sources and directories are read as they are.

    For instance:
      alisa eval ppl --text wikitext2/ --policy swa,sketch --sparsity 0,0.5,0.8,0.9 --output cells.jsonl
      alisa eval ppl --text book.txt --model DIR --policy all --kv-dtype auto,int8 --context 2048 --mode layerwise
      alisa eval ppl --text /usr/lib/python3.11 --policy sketch     # Python's own sources: code
    """

    text: Annotated[Path, arg(metavar="FILE|DIR")]
    """A .txt, .py, .jsonl or .json file, or a directory of them (its test split, if it has one)."""
    context: Annotated[int, arg(metavar="N")] = 512
    """Tokens of a window."""
    prefill: Annotated[int, arg(metavar="N")] = 128
    """Tokens of a window that are read densely, as a prompt is."""
    windows: Annotated[int, arg(metavar="N")] = 16
    """Windows, spread evenly over the text; 0: all there are."""
    mode: Literal["decode", "layerwise"] = "decode"
    """decode: token by token, as generation works. layerwise: all tokens of a window through one layer after the other,
    with the same selections and kernels; much faster where the weights are large."""
    sweep: SweepOptions = field(default_factory=SweepOptions)
    display: DisplayOptions = field(default_factory=DisplayOptions)

    def evaluations(self, subject: Subject) -> Sequence[Evaluation]:
        """One text."""
        from alisa.lab.eval.perplexity import perplexity_of

        return [
            perplexity_of(
                subject,
                self.text,
                context=self.context,
                prefill=self.prefill,
                num_windows=self.windows or None,
                mode=self.mode,
            )
        ]

    def run(self) -> int:
        """Do it; returns the exit status."""
        refuse_same_file({"--text": self.text, "--output": self.sweep.output})
        return run_sweep("ppl", self.sweep, self.display, self.evaluations)


@dataclass(frozen=True, kw_only=True)
class Qa:
    """Multiple choice: which choice is likeliest for its length, and how often that is right.

    Questions, with the examples in front of them, are read densely, as prompts are, and the choices are decoded under
    every policy. Without examples there is little that a policy could leave out.

    For instance:
      alisa eval qa --task piqa,copa,openbookqa,winogrande --data DIR --shots 16 --limit 100
      alisa eval qa --task questions.jsonl --policy sketch --sparsity 0.8
    """

    task: Annotated[str, arg(metavar="NAME|FILE[,...]")]
    """piqa, copa, openbookqa, winogrande, or a .jsonl file with "question", "choices" and "answer" on each line."""
    data: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Where the named sets are: each in a folder of its name."""
    shots: Annotated[int, arg(metavar="N")] = 0
    """Solved examples in front of each question, from the training split where there is one."""
    limit: Annotated[int, arg(metavar="N")] = 0
    """Questions, spread evenly over the set; 0: all there are."""
    prefill: Annotated[int, arg(metavar="N")] = 0
    """Tokens of each question, with its examples, that are read densely; 0: all."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Draws the examples."""
    sweep: SweepOptions = field(default_factory=SweepOptions)
    display: DisplayOptions = field(default_factory=DisplayOptions)

    def evaluations(self, subject: Subject) -> Sequence[Evaluation]:
        """One for each task."""
        from alisa.lab.eval.multiple_choice import multiple_choice_of

        return [
            multiple_choice_of(
                subject,
                task,
                data=self.data,
                num_shots=self.shots,
                prefill=self.prefill or None,
                limit=self.limit or None,
                seed=self.seed,
            )
            for task in self.task.split(",")
        ]

    def run(self) -> int:
        """Do it; returns the exit status."""
        for task in self.task.split(","):
            refuse_same_file({"--task": Path(task), "--output": self.sweep.output})
        return run_sweep("qa", self.sweep, self.display, self.evaluations)


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Finding what was said far before: facts to look up, a passage to copy.

    needle: one fact at a depth of running text. multi: four facts anywhere. lookup: a block of facts in front, all
    asked in random order. copy: a passage again. variables: facts that lead to each other, followed step by step.
    common: the commonest word of a list. paragraphs: questions about the people in them. The prompt is read densely,
    and everything after it is decoded under every policy.

    For instance:
      alisa eval recall --text book.txt --length 256,512,1024,2048 --output cells.jsonl
      alisa eval recall --task needle --policy swa --sparsity 0.8 --length 1024 --prefill 256
    """

    task: Annotated[str, arg(metavar="NAME[,NAME...]")] = "needle,multi,lookup,copy"
    """Tasks, separated by commas; variables, common and paragraphs too."""
    length: Annotated[str, arg(metavar="N[,N...]")] = "256,512,1024"
    """Tokens of a text."""
    depth: Annotated[str, arg(metavar="SHARE[,SHARE...]")] = "0,0.25,0.5,0.75,1"
    """Where in the text the thing to recall stands: 0 first, 1 just before the question."""
    repeats: Annotated[int, arg(metavar="N")] = 8
    """Texts for each depth."""
    prefill: Annotated[int, arg(metavar="N")] = 0
    """Tokens that are read densely; 0: the whole prompt."""
    question: Literal["decoded", "prompt"] = "decoded"
    """decoded: the prompt ends before the first question, which is asked under the policy, as the next turn of a
    conversation is. prompt: the first question ends the prompt."""
    text: Annotated[Path | None, arg(metavar="FILE|DIR", help_behavior_hint="(default: a short text of our own)")] = (
        None
    )
    """Prose between the facts."""
    wording: Literal["auto", "words", "numbers"] = "auto"
    """words: as the model inside the package was trained to be asked. numbers: five-digit numbers of cities, for any
    model. auto: whichever suits the model."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Draws facts and places."""
    sweep: SweepOptions = field(default_factory=SweepOptions)
    display: DisplayOptions = field(default_factory=DisplayOptions)

    def evaluations(self, subject: Subject) -> Sequence[Evaluation]:
        """One for each task and length."""
        from alisa.lab.eval.recall import recalls_of
        from alisa.lab.eval.recall_tasks import TASKS
        from alisa.lab.eval.wording import choose_wording

        return recalls_of(
            subject,
            known_names(self.task, tuple(TASKS), "recall task"),
            lengths=[int(length) for length in numbers(self.length, "lengths")],
            depths=numbers(self.depth, "depths"),
            repeats=self.repeats,
            prefill=self.prefill or None,
            question=self.question,
            text=self.text,
            wording=choose_wording(self.wording, subject.name),
            seed=self.seed,
        )

    def run(self) -> int:
        """Do it; returns the exit status."""
        refuse_same_file({"--text": self.text, "--output": self.sweep.output})
        return run_sweep("recall", self.sweep, self.display, self.evaluations)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Long texts: how much of them repeats itself, how long they become, and how likely dense attention finds them.

    The engine goes on from prompts that are cut out of a text, once under every policy.

    For instance:
      alisa eval generation --text book.txt --policy sketch,swa --sparsity 0.8,0.95 --output cells.jsonl
    """

    text: Annotated[Path, arg(metavar="FILE|DIR")]
    """A .txt, .py, .jsonl or .json file, or a directory of them (its test split, if it has one)."""
    prompt: Annotated[int, arg(metavar="N")] = 512
    """Tokens of a prompt."""
    max_tokens: Annotated[int, arg(metavar="N")] = 512
    """Tokens to write, unless the model ends before."""
    texts: Annotated[int, arg(metavar="N")] = 8
    """Texts to write, from prompts that are spread evenly over the text."""
    temperature: Annotated[float, arg(metavar="T")] = 0.0
    """0 picks the most likely token."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Of the first text; the others count on."""
    sweep: SweepOptions = field(default_factory=SweepOptions)
    display: DisplayOptions = field(default_factory=DisplayOptions)

    def evaluations(self, subject: Subject) -> Sequence[Evaluation]:
        """One text."""
        from alisa.lab.eval.generation import generation_of

        return [
            generation_of(
                subject,
                self.text,
                prompt_len=self.prompt,
                max_tokens=self.max_tokens,
                num_texts=self.texts,
                temperature=self.temperature,
                seed=self.seed,
            )
        ]

    def run(self) -> int:
        """Do it; returns the exit status."""
        refuse_same_file({"--text": self.text, "--output": self.sweep.output})
        return run_sweep("generation", self.sweep, self.display, self.evaluations)


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How sparse dense attention is, and how much of it each policy reads.

    The model runs densely and every policy looks on: share of the attention weight it captures, rank correlation with
    dense attention, overlap of what consecutive steps read, and whether forgotten tokens return. By layer and step with
    --output and alisa plot.

    For instance:
      alisa eval sparsity --text book.txt --policy swa,sketch --sparsity 0.8 --output cells.jsonl
    """

    text: Annotated[Path, arg(metavar="FILE|DIR")]
    """A .txt, .py, .jsonl or .json file, or a directory of them (its test split, if it has one)."""
    context: Annotated[int, arg(metavar="N")] = 512
    """Tokens of a window."""
    prefill: Annotated[int, arg(metavar="N")] = 128
    """Tokens of a window that are its prompt."""
    windows: Annotated[int, arg(metavar="N")] = 4
    """Windows, spread evenly over the text."""
    sweep: SweepOptions = field(default_factory=SweepOptions)
    display: DisplayOptions = field(default_factory=DisplayOptions)

    def evaluations(self, subject: Subject) -> Sequence[Evaluation]:
        """One text."""
        from alisa.lab.eval.attention_study import attention_study_of

        return [
            attention_study_of(
                subject, self.text, context=self.context, prefill=self.prefill, num_windows=max(1, self.windows)
            )
        ]

    def run(self) -> int:
        """Do it; returns the exit status."""
        refuse_same_file({"--text": self.text, "--output": self.sweep.output})
        return run_sweep("sparsity", self.sweep, self.display, self.evaluations)
