"""`LLM`: a model directory and prompts go in, text and a report come out. The Python face of the package."""

from __future__ import annotations

import platform
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from alisa import __version__
from alisa.config import (
    DeviceName,
    DtypeName,
    EngineConfig,
    KvDtypeName,
    PolicyName,
    SamplingParams,
    WeightDtypeName,
    parse_bytes,
)
from alisa.engine.engine import Engine
from alisa.engine.kernels import choose_kernels
from alisa.engine.memory import Caps, Memory, default_kv_memory, make_memory
from alisa.engine.placement import Placement
from alisa.engine.recorder import Stopwatch
from alisa.engine.requests import Request
from alisa.engine.requests import Sequence as RunningSequence
from alisa.engine.runner import Runner
from alisa.engine.score import ScoredItem, Scorer
from alisa.engine.text import TextStream
from alisa.engine.threads import make_governor
from alisa.engine.verify import VerifyReport, verify
from alisa.engine.weights import choose_linear
from alisa.errors import InputError, PromptError
from alisa.kv.codec import make_codec
from alisa.model.hub import resolve_model
from alisa.model.loader import checkpoint_dtype, load_decoder, load_spec
from alisa.model.precision import resolve_device, resolve_dtype
from alisa.model.tokenizer import Tokenizer
from alisa.outputs import RequestOutput, RequestReport, RunSummary, TextDelta
from alisa.planner.cost import StepCost
from alisa.planner.hardware import Hardware
from alisa.planner.load import Method
from alisa.planner.simulate import price_run
from alisa.policy.dense import Dense
from alisa.policy.table import make_policy
from alisa.schedule.file import load_schedule
from alisa.types import RowFormat, StepPlan, StepRecord, Traffic


class LLM:
    """A loaded model, and how to run it.

    Args:
        model: Hugging Face model directory or hub id; None for the small model inside the package.
        policy: which cached tokens a decode step reads; `PolicyName` in alisa.config has all.
        sparsity: share of the earlier tokens that a step does not read; `dense` reads all.
        dtype: of the weights and the arithmetic; `auto` takes what is fastest on this machine.
        weight_dtype: `int8` keeps the linear layers in 8 bits (on a CPU): half the memory and the reading of 16 bits.
        kv_dtype: of the cached rows, also `int8` or `int4`; `auto` is the dtype of the arithmetic.
        device: `cpu`, `cuda` or `auto`.
        kv_device_memory: hard cap of the KV rows, in bytes or like "2GiB"; None for a share of the free memory.
        kv_host_memory: with a GPU, hard cap of the rows in main memory; None for half of what is free.
        kv_disk_memory: hard cap of the rows that go to disk because the device is full; 0 for none, None for what the
            work needs within the free room.
        kv_disk_path: directory whose disk is used; None for the system's directory for temporary files.
        schedule: file that says when rows move (docs/scheduling.md); None for when the caps demand it.
        max_batch: sequences decoded together at the most.
        prefill_chunk: prompt tokens in one pass at the most.
        progress: called with (bytes read, bytes in all) while weights load.

    Raises:
        InputError: an option is out of range.
        ModelError: the model cannot be found, read or run.

    Example:
        >>> llm = LLM(sparsity=0.8)
        >>> [output] = llm.generate(["It was a dark night"], SamplingParams(max_tokens=20))
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        policy: PolicyName = "sketch",
        sparsity: float = 0.8,
        dtype: DtypeName = "auto",
        weight_dtype: WeightDtypeName = "auto",
        kv_dtype: KvDtypeName = "auto",
        device: DeviceName = "auto",
        kv_device_memory: str | int | None = None,
        kv_host_memory: str | int | None = None,
        kv_disk_memory: str | int | None = None,
        kv_disk_path: str | Path | None = None,
        schedule: str | Path | None = None,
        max_batch: int = 32,
        prefill_chunk: int = 1024,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config = EngineConfig(
            policy=policy,
            sparsity=sparsity,
            dtype=dtype,
            weight_dtype=weight_dtype,
            kv_dtype=kv_dtype,
            device=device,
            kv_device_memory=None if kv_device_memory is None else parse_bytes(kv_device_memory),
            kv_host_memory=None if kv_host_memory is None else parse_bytes(kv_host_memory, least=0),
            kv_disk_memory=None if kv_disk_memory is None else parse_bytes(kv_disk_memory, least=0),
            kv_disk_path=None if kv_disk_path is None else Path(kv_disk_path),
            schedule=None if schedule is None else Path(schedule),
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
        )
        self._scheduler = None if schedule is None else load_schedule(Path(schedule))
        directory = embedded_model() if model is None else resolve_model(str(model))
        self.name = "embedded" if model is None else str(model)
        load_spec(directory)  # before anything else is read: a wrong directory or family is refused by its config
        self.tokenizer = Tokenizer.load(directory)
        torch_device = resolve_device(device)
        make_linear = choose_linear(weight_dtype, torch_device)
        torch_dtype = resolve_dtype(dtype, checkpoint_dtype(directory), torch_device)
        self._decoder = load_decoder(directory, torch_dtype, torch_device, progress, make_linear)
        self.spec = self._decoder.spec
        self._policy = make_policy(policy, sparsity)
        kv_dtype_name = str(self._decoder.dtype).removeprefix("torch.") if kv_dtype == "auto" else kv_dtype
        self._codec = make_codec(RowFormat(kv_dtype_name, self.spec.num_kv_heads, self.spec.head_dim))
        self._kernels = choose_kernels(self._decoder.device)
        self._governor = make_governor()
        self._records: list[StepRecord] = []
        self._plans: list[StepPlan] = []
        self._memory: Memory | None = None
        self._summary: RunSummary | None = None

    @property
    def weight_dtype(self) -> str:
        """What the linear layers are held in, `auto` resolved."""
        asked = self.config.weight_dtype
        return str(self._decoder.dtype).removeprefix("torch.") if asked == "auto" else asked

    @property
    def records(self) -> Sequence[StepRecord]:
        """Every step of the last run."""
        return tuple(self._records)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Continue every prompt; outputs in the order of the prompts. Raises what `stream` raises."""
        events = self.stream(prompts, params or SamplingParams())
        outputs = [event for event in events if isinstance(event, RequestOutput)]
        return sorted(outputs, key=lambda output: output.index)

    def stream(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> Iterator[TextDelta | RequestOutput]:
        """Continue every prompt and yield text as it comes; requests finish in any order.

        Args:
            prompts: texts, or token ids that are taken as they are.
            params: one for all, or one for each.

        Raises:
            InputError: a prompt is empty or longer than the model's positions; nothing has been run.
            CapacityError: a request can never fit under the cap; nothing has been run.
        """
        rules = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(rules) != len(prompts):
            raise InputError(
                f"{len(prompts)} prompts came with {len(rules)} sampling parameters; give one or one each."
            )
        requests = [self._request(i, prompt, rule) for i, (prompt, rule) in enumerate(zip(prompts, rules, strict=True))]
        return self._run(requests, prompts) if requests else iter(())

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's own chat format, ready for the answer.

        Args:
            messages: each with `role` and `content`.

        Raises:
            InputError: the model has no chat template, or the template refuses the conversation.
        """
        return self.tokenizer.encode_chat(messages)

    def summary(self) -> RunSummary:
        """Totals of the last run; of one that was interrupted, up to there."""
        if self._summary is None:
            raise InputError("There is no run to sum up yet; call generate() or stream() first.")
        return self._summary

    def predict(self, hardware: Hardware) -> StepCost | None:
        """What the decode steps of the last run should have cost on this machine, from the plans that were executed.

        None where the machine's figures say nothing about this dtype, of weights or of rows.
        """
        if self._memory is None:
            raise InputError("There is no run to predict yet; call generate() or stream() first.")
        dtype, kv_dtype = str(self._decoder.dtype).removeprefix("torch."), self._codec.format.dtype
        method = Method(
            self.config.policy, self.config.sparsity, dtype, kv_dtype, weight_dtype=self.config.weight_dtype
        )
        if method.products not in hardware.gemm or kv_dtype not in hardware.attention:
            return None
        memory = self._memory
        tiers = memory.scheduler.uses_tiers
        timeline = price_run(self.spec, method, hardware, self._plans, memory.limits, tiers=tiers)
        return timeline.total(prefill=False)

    def verify(self, outputs: Sequence[RequestOutput], num_samples: int = 4) -> VerifyReport:
        """Re-run a spread sample of outputs densely, on the same tokens, and compare the distributions.

        Only outputs whose rows fit the device cap are taken: scoring does not use the tiers.

        Raises:
            CapacityError: none of them fits.
        """
        num_rows = self._kv_cap() // (self.spec.num_layers * self._codec.format.row_bytes)
        fitting = [o for o in outputs if len(o.prompt_ids) + len(o.token_ids) <= num_rows] or list(outputs)
        stride = max(1, len(fitting) // num_samples)
        sample = [ScoredItem(o.prompt_ids, o.token_ids) for o in fitting[::stride][:num_samples]]
        return verify(self.scorer(), self._policy, Dense(), self._codec, sample)

    def scorer(self) -> Scorer:
        """This model made ready for teacher-forced scoring, under the same memory cap and with its own kernels."""
        return Scorer(
            decoder=self._decoder,
            kernels=choose_kernels(self._decoder.device),
            kv_cap_bytes=self._kv_cap(),
            max_batch=self.config.max_batch,
            prefill_chunk=self.config.prefill_chunk,
        )

    def describe(self) -> dict[str, Any]:
        """Model, settings and machine, as plain values for a report."""
        return {
            "model": self.name,
            "family": self.spec.family,
            "parameters": self.spec.num_parameters,
            "weight_bytes": self._decoder.weight_bytes,
            "dtype": str(self._decoder.dtype).removeprefix("torch."),
            "weight_dtype": self.weight_dtype,
            "kv_dtype": self._codec.format.dtype,
            "device": str(self._decoder.device),
            "attention": self._kernels.name,
            "policy": self.config.policy,
            "sparsity": self.config.sparsity if self.config.policy != "dense" else 0.0,
            "max_batch": self.config.max_batch,
            "kv_token_bytes": self.spec.num_layers * self._codec.format.row_bytes,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "versions": {"alisa": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def _request(self, index: int, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        ids = tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if not ids:
            raise PromptError(index, "is empty, and the model has no token to begin with; give it some text.")
        if bad := [i for i in ids if not 0 <= i < self.spec.vocab_size]:
            raise PromptError(index, f"has token id {bad[0]}; the model knows 0 to {self.spec.vocab_size - 1}.")
        room = self.spec.max_positions - len(ids)
        if room < 1:
            raise PromptError(
                index,
                f"has {len(ids)} tokens; the model has {self.spec.max_positions} positions, the output "
                f"included. Shorten it to at most {self.spec.max_positions - 1} tokens.",
            )
        return Request(index, ids, params, min(params.max_tokens, room))

    def _run(
        self, requests: Sequence[Request], prompts: Sequence[str | Sequence[int]]
    ) -> Iterator[TextDelta | RequestOutput]:
        """Submit everything, which may refuse it, and only then hand out the generator that does the work."""
        engine, memory, state_bytes = self._engine(requests)
        for request in requests:
            engine.submit(request)
        return self._events(engine, memory, state_bytes, requests, prompts)

    def _events(
        self,
        engine: Engine,
        memory: Memory,
        state_bytes: int,
        requests: Sequence[Request],
        prompts: Sequence[str | Sequence[int]],
    ) -> Iterator[TextDelta | RequestOutput]:
        self._records = []
        self._plans = []
        self._memory = memory
        started = perf_counter()
        texts = [TextStream(self.tokenizer.detokenizer(), request.params.stop) for request in requests]
        num_output = 0
        try:
            while (result := engine.step()) is not None:
                self._records.append(result.record)
                self._plans.append(result.plan)
                for sequence in result.advanced:
                    index = sequence.request.request_id
                    failed = sequence.finish_reason == "error"
                    num_output += not failed
                    new = texts[index].flush() if failed else _new_text(engine, sequence, texts[index])
                    if new:
                        yield TextDelta(index, new)
                    if sequence.finish_reason is not None:
                        yield _output(sequence, prompts[index], texts[index].text)
        finally:  # an interrupted run has totals too
            self._summary = self._summarise(requests, num_output, memory, state_bytes, perf_counter() - started)
            memory.store.close()
            self._governor.restore()

    def _engine(self, requests: Sequence[Request]) -> tuple[Engine, Memory, int]:
        """An engine with room for this work and no more: rows and state are sized by the largest requests that meet."""
        sizes = [request.num_rows for request in requests]
        num_lanes = min(self.config.max_batch, len(sizes))
        memory = make_memory(
            self._decoder,
            self._policy,
            self._codec,
            self._kernels,
            sizes,
            Caps(self._kv_cap(), self._host_cap(), self.config.kv_disk_memory, self.config.kv_disk_path),
            self._scheduler,
            num_lanes,
        )
        state = self._policy.start(self.spec, num_lanes, max(sizes), self._decoder.device, self._kernels.selection)
        runner = Runner(
            self._decoder,
            self._policy,
            memory.store,
            state,
            self._kernels.prefill,
            self._kernels.attend,
            Stopwatch(),
            looks_ahead=memory.scheduler.uses_tiers,
        )
        placement = Placement(memory.scheduler, memory.limits, memory.store, self._policy)
        engine = Engine(
            runner,
            placement,
            eos_ids=self.tokenizer.eos_ids,
            prefill_chunk=self.config.prefill_chunk,
            governor=self._governor,
        )
        return engine, memory, state.nbytes

    def _kv_cap(self) -> int:
        if self.config.kv_device_memory is not None:
            return self.config.kv_device_memory
        return default_kv_memory(self._decoder.device)

    def _host_cap(self) -> int:
        """Main memory for rows below a GPU."""
        if self._decoder.device.type == "cpu":
            return 0
        if self.config.kv_host_memory is not None:
            return self.config.kv_host_memory
        return default_kv_memory(torch.device("cpu"))

    def _summarise(
        self, requests: Sequence[Request], num_output: int, memory: Memory, state_bytes: int, wall_s: float
    ) -> RunSummary:
        prefill = [record for record in self._records if record.prefill]
        decode = [record for record in self._records if not record.prefill]
        return RunSummary(
            num_requests=len(requests),
            prompt_tokens=sum(len(request.prompt_ids) for request in requests),
            output_tokens=num_output,
            wall_s=wall_s,
            prefill_s=sum(record.wall_s for record in prefill),
            decode_s=sum(record.wall_s for record in decode),
            linear_s=sum(record.linear_s for record in decode),
            attention_s=sum(record.attention_s for record in decode),
            selection_s=sum(record.selection_s for record in decode),
            transfer_s=sum(record.transfer_s for record in decode),
            sampling_s=sum(record.sampling_s for record in decode),
            other_s=sum(record.other_s for record in decode),
            decode_tokens=sum(record.num_tokens for record in decode),
            kv_cap_bytes=self._kv_cap(),
            kv_peak_bytes=max((record.kv_bytes for record in self._records), default=0),
            host_cap_bytes=memory.host_bytes,
            host_peak_bytes=max((record.host_bytes for record in self._records), default=0),
            disk_cap_bytes=memory.disk_bytes,
            disk_peak_bytes=max((record.disk_bytes for record in self._records), default=0),
            phase_steps=dict(Counter(str(record.phase) for record in decode)),
            num_preempted=sum(record.num_preempted for record in self._records),
            traffic=sum((record.traffic for record in self._records), Traffic()),
            policy_state_bytes=state_bytes,
            tokens_attended=sum(record.tokens_attended for record in decode),
            tokens_dense=sum(record.tokens_dense for record in decode),
            peak_rss_bytes=_peak_rss_bytes(),
        )


def embedded_model() -> Path:
    """Directory of the small trained model inside the package."""
    return Path(__file__).with_name("embedded")


def _new_text(engine: Engine, sequence: RunningSequence, text: TextStream) -> str:
    """Text that the sequence's newest token made certain; ends the sequence when a stop string is complete."""
    # The model's own end token is an output token, but not text.
    new = text.feed(sequence.output_ids[-1]) if sequence.finish_reason != "eos" else ""
    if text.stopped:
        engine.finish(sequence, "stop")
    return new + text.flush() if sequence.finish_reason is not None else new


def _output(sequence: RunningSequence, prompt: str | Sequence[int], text: str) -> RequestOutput:
    """The finished request as the caller sees it."""
    reason = sequence.finish_reason
    assert reason is not None, "only finished sequences are shown"
    return RequestOutput(
        index=sequence.request.request_id,
        prompt=prompt if isinstance(prompt, str) else "",
        prompt_ids=sequence.request.prompt_ids,
        text=text,
        token_ids=tuple(sequence.output_ids),
        finish_reason=reason,
        report=RequestReport(
            prompt_tokens=sequence.prompt_len,
            output_tokens=len(sequence.output_ids),
            queue_s=sequence.admitted_s - sequence.submitted_s,
            prefill_s=sequence.first_token_s - sequence.admitted_s,
            first_token_s=sequence.first_token_s - sequence.submitted_s,
            decode_s=sequence.finished_s - sequence.first_token_s,
            tokens_attended=sequence.tokens_attended,
            tokens_dense=sequence.tokens_dense,
        ),
        error=sequence.error,
    )


def _peak_rss_bytes() -> int:
    """Most memory this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
