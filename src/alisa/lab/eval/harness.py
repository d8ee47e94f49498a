"""lm-evaluation-harness on this engine, with any policy (the extra `lm_eval`).

    import lm_eval
    from alisa import LLM
    from alisa.lab.eval.harness import HarnessModel

    llm = LLM("facebook/opt-1.3b", policy="sketch", sparsity=0.8)
    results = lm_eval.simple_evaluate(model=HarnessModel(llm), tasks=["piqa", "wikitext"])

Likelihoods are decoded token by token under the policy, context and continuation alike, after the first `prefill`
tokens: the harness is then what ALISA's accuracy figures are measured with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lm_eval.api.instance import Instance  # pyrefly: ignore[missing-import]
from lm_eval.api.model import LM  # pyrefly: ignore[missing-import]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyrefly: ignore[missing-import]

from alisa.config import SamplingParams
from alisa.errors import InputError
from alisa.lab.eval.subject import Subject, Variant
from alisa.lab.scoring import ScoredItem
from alisa.llm import LLM

DEFAULT_MAX_TOKENS = 256
"""Where a task does not say how much to generate; the harness's own default."""


@dataclass(frozen=True, slots=True)
class _Request:
    """Token ids, of which the last `num_scored` are asked for."""

    ids: Sequence[int]
    num_scored: int


class HarnessModel(LM):
    """An `LLM` as the harness wants it.

    Args:
        llm: its policy, sparsity and row format are those that are evaluated.
        prefill: tokens at the beginning of each request that are read densely.
    """

    def __init__(self, llm: LLM, prefill: int = 16) -> None:
        super().__init__()
        self._llm = llm
        self._subject = Subject.of(llm)
        self._variant = Variant(llm.config.policy, llm.config.sparsity, llm.config.kv_dtype)
        self._prefill = prefill

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches tokenised requests."""
        return self._llm.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's own template writes it."""
        return self._llm.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether greedy decoding would give it."""
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log probability of whole texts, in windows of the model's positions."""
        totals = []
        lead = len(self._llm.tokenizer.encode(""))
        for request in requests:
            ids = self._llm.tokenizer.encode(request.args[0])[lead:]
            windows = get_rolling_token_windows(ids, self._first_id(), self._subject.spec.max_positions, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            found = self._score([_Request([*context, *scored], len(scored)) for context, scored in pairs])
            totals.append(sum(likelihood for likelihood, _ in found))
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Text up to the first of each request's stop strings."""
        prompts: list[Sequence[int]] = []
        params: list[SamplingParams] = []
        for request in requests:
            context, options = request.args
            rules = _sampling(options)
            room = self._subject.spec.max_positions - rules.max_tokens
            if room < 1:
                raise InputError(
                    f"The task asks for {rules.max_tokens} new tokens and the model has "
                    f"{self._subject.spec.max_positions} positions; lower max_gen_toks."
                )
            prompts.append(self._fitting(self._llm.tokenizer.encode(context) or [self._first_id()], room))
            params.append(rules)
        return [output.text for output in self._llm.generate(prompts, params)]

    def _pair(self, context: str, continuation: str) -> _Request:
        """A context and its continuation; spaces at the end of the context belong to the continuation."""
        kept = context.rstrip(" ")
        whole = self._llm.tokenizer.encode(context + continuation)
        before = self._llm.tokenizer.encode(kept)
        num_scored = len(whole) - len(before)
        if not before:
            whole = [self._first_id(), *whole]
        return _Request(whole, num_scored)

    def _score(self, requests: Sequence[_Request]) -> list[tuple[float, bool]]:
        items = []
        for request in requests:
            # The last token is scored, not read: it needs no position.
            ids = self._fitting(request.ids, self._subject.spec.max_positions + 1)
            prompt_len = max(1, min(self._prefill, len(ids) - request.num_scored))
            items.append(ScoredItem(ids[:prompt_len], ids[prompt_len:]))
        outputs = self._subject.scorer.score(
            self._variant.selection_policy(), self._subject.codec(self._variant), items
        )
        return [
            (float(output.log_likelihoods[-count:].double().sum()), bool(output.greedy[-count:].all()))
            for output, count in zip(outputs, (request.num_scored for request in requests), strict=True)
        ]

    def _fitting(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """The last `most` tokens, after the model's leading token if it has one."""
        if len(ids) <= most:
            return ids
        lead = self._llm.tokenizer.encode("")
        return [*lead, *ids[len(ids) - most + len(lead) :]]

    def _first_id(self) -> int:
        """The token before a text that has nothing before it."""
        lead = self._llm.tokenizer.encode("")
        ends = sorted(self._llm.tokenizer.eos_ids)
        if not lead and not ends:
            raise InputError(
                "This model has neither a leading nor an end token, so a text cannot be scored from its first token on."
            )
        return lead[0] if lead else ends[0]


def _sampling(options: Mapping[str, object]) -> SamplingParams:
    """The harness's generation options as ours."""
    until = options.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(str(text) for text in until)  # pyrefly: ignore[not-iterable]
    temperature = float(str(options.get("temperature") or 0.0)) if options.get("do_sample") else 0.0
    return SamplingParams(
        max_tokens=int(str(options.get("max_gen_toks") or DEFAULT_MAX_TOKENS)),
        temperature=temperature,
        top_p=float(str(options.get("top_p") or 1.0)),
        stop=tuple(text for text in stops if text),
    )
