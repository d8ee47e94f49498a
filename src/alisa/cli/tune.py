"""`alisa tune`: finds how the layers of a model should share the tokens that a step reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from tyro.conf import arg

from alisa import __version__
from alisa.cli.files import refuse_same_file, to_json, write_whole
from alisa.cli.options import DisplayOptions
from alisa.cli.screen import error_console, loading_bar, say
from alisa.cli.sweep import SweptEngine, cell_bar, numbers
from alisa.config import EngineConfig, PolicyName
from alisa.errors import InputError
from alisa.policy.layer_budgets import STEPS, BudgetedModel, LayerBudget, LayerBudgets, share_out
from alisa.policy.registry import POLICIES

if TYPE_CHECKING:
    from alisa.lab.eval.divergence import Divergence
    from alisa.lab.eval.layer_losses import LayerLoss
    from alisa.lab.eval.statistics import Estimate
    from alisa.spec import ModelSpec

_SHOWN = 0.95
"""The step at which what layers lose is shown."""


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Find how many tokens each layer should read, in one pass over a text; `--budgets FILE` then reads them.

    The layers together read as many tokens as before: those that lose most by reading little get more of them, by the
    error of what attention gives or by the weight that is not read. Other windows of the text then say which of the two
    is nearer to dense attention than equal budgets are; where neither is, equal ones are kept.

    For instance:
      alisa tune --model DIR --text book.txt
      alisa generate --model DIR --sparsity 0.95 --budgets DIR/alisa-budgets.json "Once upon a time"
    """

    text: Annotated[Path, arg(metavar="FILE|DIR")]
    """A .txt, .py, .jsonl or .json file, or a directory of them (its test split, if it has one)."""
    sparsity: Annotated[str, arg(metavar="SHARE[,SHARE...]")] = "0.8,0.9,0.95,0.98"
    """Sparsities to find budgets for; all from the same pass."""
    policy: PolicyName = EngineConfig().policy
    """Whose choices are measured: sketch, or one of its variants."""
    context: Annotated[int, arg(metavar="N")] = 1024
    """Tokens of a window of the text."""
    prefill: Annotated[int, arg(metavar="N")] = 512
    """Tokens of a window that are its prompt."""
    windows: Annotated[int, arg(metavar="N")] = 2
    """Windows to measure, spread evenly over the text, and as many between them to check with."""
    output: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: beside the model)")] = None
    """Write the budgets here; needed where the model is no directory or file of yours."""
    engine: SweptEngine = field(default_factory=SweptEngine)
    display: DisplayOptions = field(default_factory=DisplayOptions)

    def __post_init__(self) -> None:
        if wrong := [share for share in self.sparsities if not min(STEPS) <= share <= max(STEPS)]:
            raise InputError(f"--sparsity is {wrong[0]:g}, allowed is {min(STEPS):g} to {max(STEPS):g}.")
        if not POLICIES[self.policy].by_layer:
            raise InputError(
                f"--policy {self.policy} reads the same in all layers; choose "
                f"{', '.join(name for name, entry in POLICIES.items() if entry.by_layer)}."
            )
        if self.windows < 1 or not 1 <= self.prefill < self.context:
            raise InputError(
                f"--windows is {self.windows}, --prefill {self.prefill} and --context {self.context}; at least one "
                "window is needed, and a prompt of 1 token up to the context minus 1."
            )

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The sparsities asked for."""
        return numbers(self.sparsity, "sparsities")

    def run(self) -> int:
        """Do it; returns the exit status."""
        from alisa.lab.eval.divergence import Divergence
        from alisa.lab.eval.documents import read_documents
        from alisa.lab.eval.layer_losses import measure_layer_losses
        from alisa.lab.eval.measurement import fingerprint
        from alisa.lab.eval.subject import Subject
        from alisa.lab.eval.windows import cut_windows
        from alisa.llm import LLM

        output = self.output or beside(self.engine.model)
        refuse_same_file({"--text": self.text, "--output": output})
        show = sys.stderr.isatty() and not self.display.quiet
        with loading_bar(self.engine.model or "the embedded model", show=show) as progress:
            subject = Subject.of(LLM(config=self.engine, progress=progress))
        subject.check_length(self.context, "A window of --context")
        documents = read_documents(self.text)
        windows = cut_windows(
            subject.tokenizer, documents, context=self.context, prefill=self.prefill, count=2 * self.windows
        )
        if len(windows) < 2 * self.windows:
            raise InputError(
                f"The text has {len(windows)} windows of {self.context} tokens, and {2 * self.windows} are needed: "
                "give more text, fewer --windows or a smaller --context."
            )
        measured, checked = windows[::2], windows[1::2]
        with cell_bar(show=show) as bar:
            num_layers = subject.spec.attention.full_layers().num_layers
            task = bar.add_task("layers, checks", total=num_layers + 3 * len(self.sparsities))
            losses = measure_layer_losses(subject, self.policy, STEPS, measured, lambda: bar.advance(task))
            check = Divergence(subject, checked)
            choices = [self._choose(losses, check, sparsity, lambda: bar.advance(task)) for sparsity in self.sparsities]
        record = LayerBudgets(
            model=BudgetedModel.of(subject.spec),
            policy=self.policy,
            edition=POLICIES[self.policy].edition,
            budgets=tuple(choice.budget(subject.spec) for choice in choices),
            found={
                "model": Path(subject.name).name,
                "text": self.text.name,
                "windows": fingerprint([window.item for window in windows]),
                "num_windows": self.windows,
                "context": self.context,
                "prefill": self.prefill,
                "dtype": str(subject.scorer.decoder.dtype).removeprefix("torch."),
                "alisa": __version__,
                "date": datetime.now(UTC).date().isoformat(),
                "steps": STEPS,
                "errors": [[round(loss.error, 6) for loss in layer] for layer in losses],
                "unread": [[round(loss.unread, 4) for loss in layer] for layer in losses],
                "reused": [[loss.reused and round(loss.reused, 4) for loss in layer] for layer in losses],
                "choices": [asdict(choice) for choice in choices],
            },
        )
        write_whole(output, to_json(asdict(record)) + "\n")
        if not self.display.quiet:
            error_console().print(_drawn(record, losses))
            for choice in choices:
                say(str(choice))
            policy = f"--policy {self.policy} --sparsity {self.sparsities[0]:g}"
            say(f"use it with: alisa generate {policy} --budgets {output}")
        if self.display.json:
            sys.stdout.write(to_json({"command": "tune", "output": str(output), **asdict(record)}) + "\n")
        return 0

    def _choose(
        self, losses: Sequence[Sequence[LayerLoss]], check: Divergence, sparsity: float, done: Callable[[], None]
    ) -> Choice:
        """What is nearest to dense attention on the windows that were not measured."""
        from alisa.lab.eval.statistics import difference, mean
        from alisa.policy.registry import make_policy

        ways = {
            "equal": (sparsity,) * len(losses),
            "error": share_out([[loss.error for loss in layer] for layer in losses], STEPS, sparsity),
            "unread": share_out([[loss.unread for loss in layer] for layer in losses], STEPS, sparsity),
        }
        units: dict[str, list[float]] = {}
        for way, layers in ways.items():
            units[way] = check(make_policy(self.policy, sparsity, layers=layers))
            done()
        gains = {way: difference(units["equal"], of_windows) for way, of_windows in units.items()}
        best = max(("error", "unread"), key=lambda way: gains[way].value)
        chosen = best if _pays(gains[best]) else "equal"
        return Choice(sparsity, chosen, ways[chosen], {way: mean(each).value for way, each in units.items()})


@dataclass(frozen=True, slots=True)
class Choice:
    """Which way of sharing was kept for a sparsity."""

    sparsity: float
    way: str
    """equal, error or unread."""
    layers: tuple[float, ...]
    """Of each layer without a sliding window."""
    divergence: dict[str, float]
    """KL(dense || policy) of every way, nats a token."""

    def budget(self, spec: ModelSpec) -> LayerBudget:
        """For every layer of the model."""
        shared = iter(self.layers)
        windows = spec.attention.windows or (None,) * spec.num_layers
        layers = tuple(next(shared) if window is None else None for window in windows)
        return LayerBudget(sparsity=self.sparsity, layers=layers)

    def __str__(self) -> str:
        equal, own = self.divergence["equal"], self.divergence[self.way]
        if self.way == "equal":
            return f"sparsity {self.sparsity:g}: no way is better than equal budgets ({equal:.5f} nats a token)"
        return f"sparsity {self.sparsity:g}: shared out by {self.way}, {own:.5f} nats a token instead of {equal:.5f}"


def _pays(gain: Estimate) -> bool:
    """Whether a gain is more than what windows differ by; a single window has no error, and says nothing."""
    return gain.value > gain.standard_error


def beside(model: str | None) -> Path:
    """Where the budgets of a model lie when nothing else is said: in its directory, or next to its file.

    Raises:
        InputError: it is not a directory or a file of the user's.
    """
    path = None if model is None else Path(model)
    if path is not None and path.is_dir():
        return path / "alisa-budgets.json"
    if path is not None and path.is_file():
        return path.with_suffix(".alisa-budgets.json")
    raise InputError("The model is no directory or file of yours to put the budgets in; say where with --output FILE.")


def _drawn(record: LayerBudgets, losses: Sequence[Sequence[LayerLoss]]) -> Table:
    """A row for each layer: its share at each sparsity, and what it loses."""
    table = Table(box=None, pad_edge=False)
    for name in ("layer", *(f"at {budget.sparsity:g}" for budget in record.budgets), "error", "unread", "reused"):
        table.add_column(name, justify="right", no_wrap=True)
    measured = iter(losses)
    usual = STEPS.index(_SHOWN)
    for layer in range(record.model.num_layers):
        shares = [budget.layers[layer] for budget in record.budgets]
        if shares[0] is None:
            table.add_row(str(layer), *("window" for _ in shares))
            continue
        loss = next(measured)[usual]
        reused = "" if loss.reused is None else f"{loss.reused:.0%}"
        cells = [f"{share:g}" for share in shares if share is not None]
        table.add_row(str(layer), *cells, f"{loss.error:.2%}", f"{loss.unread:.0%}", reused)
    return table
