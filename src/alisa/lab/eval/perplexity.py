"""Perplexity of a text whose windows are read densely up to a point and decoded under a policy from there on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Literal

from alisa.errors import InputError
from alisa.lab.eval.documents import read_documents
from alisa.lab.eval.layerwise import score_layerwise
from alisa.lab.eval.measurement import UnitResults, fingerprint
from alisa.lab.eval.statistics import Estimate, difference, exponential, mean
from alisa.lab.eval.subject import Subject, Variant
from alisa.lab.eval.windows import Window, cut_windows

Mode = Literal["decode", "layerwise"]


@dataclass(frozen=True)
class Perplexity:
    """Windows of one text; a unit is the mean negative log likelihood of a window's scored tokens, in nats."""

    task: str
    """Name of the text in tables."""
    windows: Sequence[Window]
    mode: Mode
    settings: Mapping[str, object]
    kind = "ppl"
    metric = "perplexity"

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.windows[0].item.num_tokens

    def measure(self, subject: Subject, variant: Variant) -> UnitResults:
        """Score every window under one variant."""
        policy, codec = variant.selection_policy(), subject.codec(variant)
        items = [window.item for window in self.windows]
        if self.mode == "decode":
            outputs = subject.scorer.score(policy, codec, items)
        else:
            outputs = score_layerwise(subject.scorer, policy, codec, items)
        units = [-float(output.log_likelihoods.double().mean()) for output in outputs]
        nats = sum(unit * len(item.output_ids) for unit, item in zip(units, items, strict=True))
        num_bytes = sum(window.scored_bytes for window in self.windows)
        top1 = sum(int(output.greedy.sum()) for output in outputs) / sum(len(item.output_ids) for item in items)
        # Layer by layer the last token is fed as well; decoding only asks for it.
        fed = 1 if self.mode == "layerwise" else 0
        ranges = (range(len(item.prompt_ids) + 1, item.num_tokens + fed) for item in items)
        dense = sum(sum(map(subject.spec.attention.dense_reads, lengths)) for lengths in ranges)
        details: dict[str, object] = {
            "bits_per_byte": nats / log(2) / num_bytes,
            "top1_accuracy": top1,
            "read_share": sum(output.tokens_read for output in outputs) / dense,
        }
        return UnitResults(units, details)

    def value(self, units: Sequence[float]) -> Estimate:
        """Perplexity per token."""
        return exponential(mean(units))

    def versus(self, units: Sequence[float], baseline: Sequence[float]) -> Estimate:
        """Ratio to the baseline's perplexity, paired by window."""
        return exponential(difference(units, baseline))


def perplexity_of(
    subject: Subject, path: Path, *, context: int, prefill: int, num_windows: int | None, mode: Mode
) -> Perplexity:
    """The evaluation of one text.

    Args:
        subject: its tokenizer and positions decide what a window is.
        path: file or directory.
        context: tokens of a window.
        prefill: how many of them are read densely before decoding starts.
        num_windows: how many windows, spread over the text; None for all.
        mode: `decode` through the engine step by step, or `layerwise`.

    Raises:
        InputError: the text, or a length, is not usable.
    """
    subject.check_length(context, "A window of --context")
    if not 1 <= prefill < context:
        raise InputError(f"--prefill is {prefill}; allowed is 1 up to --context minus 1, {context - 1}.")
    windows = cut_windows(subject.tokenizer, read_documents(path), context=context, prefill=prefill, count=num_windows)
    settings = {
        "context": context,
        "prefill": prefill,
        "windows": len(windows),
        "mode": mode,
        "text": fingerprint([window.item for window in windows]),
    }
    return Perplexity(path.name, windows, mode, settings)
