"""A model that needs no weights: `python -m tests.cli.fake generate ...` is `alisa generate ...` with it inside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from alisa.cli.generate import Generate, run_generate
from alisa.cli.main import run
from alisa.config import EngineConfig, SamplingParams
from alisa.engine.report import RunReport
from alisa.errors import InputError, PromptError
from alisa.model.own_sampling import with_own_sampling
from alisa.outputs import Phase, RequestOutput, RequestReport, RunSummary, StepRecord, TextDelta, Traffic


@dataclass(frozen=True)
class FakeVerifyReport:
    top1_agreement: float
    mean_kl: float
    lost_mass: float
    num_requests: int
    num_tokens: int


class FakeLLM:
    """Says a few words that depend on the prompt and the seed only; pairs of requests finish in reverse order."""

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None], word_s: float = 0.0) -> None:
        if config.model == "missing":
            raise InputError("There is no model 'missing'; give a directory or a hub id.")
        progress(1, 2)
        progress(2, 2)
        self.name = config.model or "fake"
        self.config = config
        self.tokenizer = SimpleNamespace(encode=lambda text: [ord(char) for char in text])
        self.records: list[StepRecord] = []
        self.num_verified = 0
        self._word_s = word_s
        self._outputs: list[RequestOutput] = []

    def own_sampling(self, params: SamplingParams) -> SamplingParams:
        return with_own_sampling(params, {"temperature": 0.6, "top_k": 20})

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        framed = [f"<{message['role']}>{message['content']}" for message in messages]
        framed += ["" if extra is None else str(extra) for extra in (tools, chat_template_kwargs)]
        return [ord(char) for text in framed for char in text]

    def describe(self) -> dict[str, Any]:
        return {**self.config.describe(), "model": self.name}

    def stream(self, prompts: Sequence[str | Sequence[int]], params: Sequence[SamplingParams]) -> FakeStream:
        texts = [prompt if isinstance(prompt, str) else "".join(map(chr, prompt)) for prompt in prompts]
        if too_long := [index for index, text in enumerate(texts) if len(text) > 1000]:
            raise PromptError(too_long[0], "is too long.")
        return FakeStream(self, self._run(texts, params))

    def _run(self, texts: Sequence[str], params: Sequence[SamplingParams]) -> Iterator[TextDelta | RequestOutput]:
        order = [index for pair in range(0, len(texts), 2) for index in (pair + 1, pair) if index < len(texts)]
        for index in order:
            words = [
                f" {texts[index].upper()}",
                *(f" w{params[index].seed}" for _ in range(params[index].max_tokens - 1)),
            ]
            for word in words:
                time.sleep(self._word_s)
                yield TextDelta(index, word)
            self.records.append(_step(len(self.records)))
            report = RequestReport(len(texts[index]), len(words), 0.0, 0.1, 0.1, 0.2, 20, 100)
            output = RequestOutput(
                index, texts[index], (1, 2), "".join(words), tuple(range(len(words))), "length", report
            )
            self._outputs.append(output)
            yield output

    def report(self) -> RunReport:
        num_output = sum(output.report.output_tokens for output in self._outputs)
        summary = RunSummary(
            num_requests=len(self._outputs),
            prompt_tokens=sum(output.report.prompt_tokens for output in self._outputs),
            output_tokens=num_output,
            wall_s=2.0,
            prefill_s=0.5,
            decode_s=1.0,
            linear_s=0.5,
            attention_s=0.2,
            selection_s=0.1,
            transfer_s=0.05,
            sampling_s=0.1,
            other_s=0.05,
            decode_tokens=num_output - len(self._outputs),
            kv_cap_bytes=2**21,
            kv_peak_bytes=2**20,
            host_cap_bytes=0,
            host_peak_bytes=0,
            disk_cap_bytes=2**22,
            disk_peak_bytes=2**21,
            phase_steps={Phase.DEVICE: len(self.records)},
            num_preempted=0,
            traffic=sum((record.traffic for record in self.records), Traffic()),
            policy_state_bytes=100,
            tokens_attended=20,
            tokens_dense=100,
            peak_rss_bytes=10**9,
        )
        return RunReport(None, summary, tuple(self.records), ())

    def verify(self, outputs: Sequence[RequestOutput], num_samples: int = 4) -> FakeVerifyReport:
        self.num_verified = len(outputs)
        return FakeVerifyReport(0.975, 0.0123, 0.04, min(num_samples, len(outputs)), 40)


class FakeStream:
    """As `alisa.engine.shared.Stream`."""

    def __init__(self, llm: FakeLLM, events: Iterator[TextDelta | RequestOutput]) -> None:
        self._llm, self._events = llm, events

    def __iter__(self) -> Iterator[TextDelta | RequestOutput]:
        return self._events

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def report(self) -> RunReport:
        return self._llm.report()


def _step(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        phase=Phase.DEVICE,
        prefill=False,
        num_sequences=1,
        num_tokens=1,
        tokens_attended=2,
        tokens_dense=10,
        kv_rows=10,
        kv_bytes=100,
        host_bytes=0,
        disk_bytes=50,
        deleted_tokens=0,
        num_preempted=0,
        traffic=Traffic(fetched_rows=2, stored_rows=4, moved_bytes=60, lookups=4, hits=2, wait_s=0.01, busy_s=0.02),
        linear_s=0.1,
        attention_s=0.1,
        selection_s=0.1,
        transfer_s=0.05,
        sampling_s=0.1,
        other_s=0.05,
        wall_s=0.5,
    )


class FakeGenerate(Generate):
    def run(self) -> int:
        word_s = float(os.environ.get("FAKE_WORD_S", "0"))
        return run_generate(self, make_llm=lambda config, progress: FakeLLM(config, progress, word_s))


if __name__ == "__main__":
    run({"generate": FakeGenerate})
