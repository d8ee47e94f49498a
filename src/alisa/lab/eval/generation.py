"""Long generation: does a text that is written under a policy repeat itself, or end, where dense attention does not?

The engine writes on from prompts cut out of a text, as `alisa generate` does. What it wrote is then read by the same
model densely: a policy that loses its thread writes what dense attention finds unlikely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alisa.config import SamplingParams, per_request
from alisa.errors import InputError
from alisa.lab.eval.documents import read_documents
from alisa.lab.eval.layerwise import score_layerwise
from alisa.lab.eval.measurement import UnitResults, fingerprint
from alisa.lab.eval.statistics import Estimate, difference, mean
from alisa.lab.eval.subject import BASELINE, Subject, Variant
from alisa.lab.eval.windows import cut_windows
from alisa.lab.scoring import ScoredItem

NUM_GRAM = 4
"""Tokens of a sequence that counts as repeated when it occurred before."""


@dataclass(frozen=True)
class GenerationEvaluation:
    """Prompts to go on from; a unit is the share of a text's 4-grams of tokens that occurred before in it."""

    task: str
    """Name of the text that the prompts are from."""
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    settings: Mapping[str, object]
    kind = "generation"
    metric = "repeated"

    @property
    def length(self) -> int:
        """Tokens of the longest prompt with its text."""
        return max(map(len, self.prompts)) + self.params.max_tokens

    def measure(self, subject: Subject, variant: Variant) -> UnitResults:
        """Write every text under one variant, and read it densely."""
        each = [per_request(self.params, index) for index in range(len(self.prompts))]
        texts = subject.generate(variant, self.prompts, each)
        dense, codec = BASELINE.selection_policy(), subject.codec(BASELINE)
        nats = []
        for prompt, text in zip(self.prompts, texts, strict=True):
            [output] = score_layerwise(subject.scorer, dense, codec, [ScoredItem(prompt, text)])
            nats.append(-float(output.log_likelihoods.double().mean()))
        details: dict[str, object] = {
            "lengths": [len(text) for text in texts],
            "dense_nats": [round(n, 6) for n in nats],
        }
        return UnitResults([repeated_share(text) for text in texts], details)

    def value(self, units: Sequence[float]) -> Estimate:
        """Mean share of repeated 4-grams."""
        return mean(units)

    def versus(self, units: Sequence[float], baseline: Sequence[float]) -> Estimate:
        """Difference to the share of what dense attention wrote from the same prompts."""
        return difference(units, baseline)


def generation_of(
    subject: Subject, path: Path, *, prompt_len: int, max_tokens: int, num_texts: int, temperature: float, seed: int
) -> GenerationEvaluation:
    """The evaluation of prompts from one text.

    Args:
        subject: its tokenizer and positions decide what a prompt is.
        path: file or directory that the prompts are cut from, at even distances.
        prompt_len: tokens of a prompt.
        max_tokens: tokens to write, unless the model ends before.
        num_texts: how many.
        temperature: 0: the likeliest token always.
        seed: of the first text; the others count on.

    Raises:
        InputError: the text, or a length, is not usable.
    """
    if prompt_len < 1 or num_texts < 1:
        raise InputError(f"--prompt is {prompt_len} and --texts {num_texts}; both are at least 1.")
    subject.check_length(prompt_len + max_tokens, "A text of --prompt and --max-tokens")
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    windows = cut_windows(
        subject.tokenizer, read_documents(path), context=prompt_len + 1, prefill=prompt_len, count=num_texts
    )
    prompts = [tuple(window.item.prompt_ids) for window in windows]
    settings = {
        "prompt": prompt_len,
        "max_tokens": max_tokens,
        "texts": len(prompts),
        "temperature": temperature,
        "seed": seed,
        "prompts": fingerprint(prompts),
    }
    return GenerationEvaluation(path.name, prompts, params, settings)


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of the 4-grams that occurred before; 0 where there is not one."""
    grams = [tuple(tokens[start : start + NUM_GRAM]) for start in range(len(tokens) - NUM_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
