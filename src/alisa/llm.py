"""`LLM`: a model directory and prompts go in, text and a report come out. The offline face of the package."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

from alisa import __version__
from alisa.config import EngineConfig, SamplingParams, per_request, with_options
from alisa.engine.builder import build_engine
from alisa.engine.loaded import LoadedModel, kv_codec, layer_budgets, load_model
from alisa.engine.report import RunReport
from alisa.engine.shared import SharedEngine, Stream
from alisa.errors import InputError
from alisa.kernels.base import Codec
from alisa.model.decoder import Decoder
from alisa.model.own_sampling import with_own_sampling
from alisa.model.tokenizer import Tokenizer
from alisa.outputs import RequestOutput
from alisa.policy.base import SelectionPolicy
from alisa.policy.registry import make_policy
from alisa.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class RunOutput(Sequence[RequestOutput]):
    """What `generate` gives: the outputs in the order of the prompts, and the report of the run."""

    outputs: tuple[RequestOutput, ...]
    report: RunReport

    @overload
    def __getitem__(self, index: int) -> RequestOutput: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RequestOutput]: ...
    def __getitem__(self, index: int | slice) -> RequestOutput | Sequence[RequestOutput]:
        return self.outputs[index]

    def __len__(self) -> int:
        return len(self.outputs)


class LLM:
    """A loaded model and the engine that runs it, for any number of calls, one after the other or at the same time.

    Calls from several threads, and streams that are half read, share one engine and its memory caps, and get what each
    would get alone. The engine is built when it is first needed, and given back by `close`.

    Args:
        model: Hugging Face model directory or hub id, or a GGUF file; None for the small model inside the package.
        config: how to run it; or give its fields as options.
        loaded: the model, where it is in memory already.
        progress: called with (bytes read, bytes in all) while weights load.
        options: fields of `EngineConfig`, such as `policy`, `sparsity`, `kv_device_memory`.

    Raises:
        InputError: an option is unknown or out of range.
        ModelError: the model cannot be found, read or run.

    Example:
        >>> with LLM(sparsity=0.8) as llm:
        ...     [output] = llm.generate("It was a dark night", SamplingParams(max_tokens=20))
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        config: EngineConfig | None = None,
        loaded: LoadedModel | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,  # noqa: ANN401 - checked by EngineConfig, the one list of options
    ) -> None:
        named = {} if model is None else {"model": str(model)}
        self.config = with_options(config, {**options, **named})
        self._model = loaded or load_model(self.config, progress)
        reads = (self.config.reading_policy, self.config.sparsity, self.config.reading_coverage)
        layers = () if self.config.exact else layer_budgets(self._model, self.config)
        self.policy: SelectionPolicy = make_policy(*reads, layers)
        self.codec: Codec = kv_codec(self._model, self.config)
        self._lock = threading.Lock()
        self._engine: SharedEngine | None = None
        self._closed = False

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The model as it was asked for."""
        return self._model.name

    @property
    def model(self) -> LoadedModel:
        """The model in memory, for an engine of one's own (`alisa.engine.builder.build_engine`)."""
        return self._model

    @property
    def spec(self) -> ModelSpec:
        """Shape and wiring of the model."""
        return self._model.spec

    @property
    def decoder(self) -> Decoder:
        """The model itself."""
        return self._model.decoder

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        tokenizer = self._model.tokenizer
        assert tokenizer is not None, "a model that was loaded from files has one"
        return tokenizer

    @property
    def weight_dtype(self) -> str:
        """What the linear layers are held in, `auto` resolved."""
        return self._model.weight_dtype

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> RunOutput:
        """Continue every prompt; outputs in the order of the prompts, the `n` of one prompt one after the other.

        Raises what `stream` raises.
        """
        with self.stream(prompts, params) as stream:
            outputs = [event for event in stream if isinstance(event, RequestOutput)]
            return RunOutput(tuple(sorted(outputs, key=lambda output: (output.index, output.sample))), stream.report())

    def stream(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        continues: bool = False,
    ) -> Stream:
        """Continue every prompt, and give text as it comes; requests finish in any order.

        Args:
            prompts: texts, or token ids that are taken as they are; one text alone is one prompt.
            params: one for all (request i then draws with seed + i), or one for each; None: greedy, 128 tokens.
            continues: these are turns of conversations, whose outputs `read_answer` makes known to the prefix cache.

        Returns:
            An iterator of `TextDelta` and `RequestOutput`. Closing it, or dropping it half way, aborts the rest.

        Raises:
            InputError: a prompt is empty, longer than the model's positions, or no prompt; nothing has been run.
            CapacityError: a request can never fit under the cap; nothing has been run.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        rules = params or SamplingParams()
        each = (
            [per_request(rules, i) for i in range(len(prompts))] if isinstance(rules, SamplingParams) else list(rules)
        )
        if len(each) != len(prompts):
            raise InputError(f"{len(prompts)} prompts came with {len(each)} sampling parameters; give one or one each.")
        return self._shared().stream(prompts, each, continues=continues)

    def read_answer(self) -> bool:
        """While nothing else runs, read on in what was said in conversations (see `stream`); False: there is nothing.

        A step of it is short. The next turns find in the prefix cache what was read.
        """
        with self._lock:
            engine = self._engine
        return engine is not None and engine.read_answer()

    def own_sampling(self, params: SamplingParams | None = None) -> SamplingParams:
        """Sampling as the model's generation_config.json asks for it, where `params` are at their default.

        Raises:
            InputError: the file names a value that is out of range.
        """
        return with_own_sampling(params or SamplingParams(), self._model.sampling)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation in the model's own chat format, ready for the answer.

        Args:
            messages: each with `role` and `content`.
            tools: JSON schemas of functions that the model may call.
            chat_template_kwargs: what else the model's template knows, such as `enable_thinking`.

        Raises:
            InputError: the model has no chat template, or the template refuses the conversation.
        """
        return self.tokenizer.encode_chat(messages, tools=tools, template_kwargs=chat_template_kwargs)

    def free_engine(self) -> None:
        """The engine's memory is given back; the next request builds another engine.

        For whoever needs the caps for something else, such as `alisa.lab.verify`.

        Raises:
            InputError: requests are running.
        """
        with self._lock:
            if self._engine is not None and not self._engine.is_idle:
                raise InputError("Requests are still running; read their streams to the end, or close them.")
            self._drop_engine()

    def close(self) -> None:
        """Running requests are aborted, and the engine's memory, files and threads are given back."""
        with self._lock:
            self._closed = True
            self._drop_engine()

    def describe(self) -> dict[str, Any]:
        """Model, settings and machine, as plain values for a report."""
        return {
            **self.config.describe(),
            "model": self.name,
            "family": self.spec.family,
            "parameters": self.spec.num_parameters,
            "weight_bytes": self.decoder.weight_bytes,
            "dtype": self._model.dtype,
            "weight_dtype": self.weight_dtype,
            "kv_dtype": self.codec.format.dtype,
            "device": str(self.decoder.device),
            "attention": self._model.backend.name,
            "sparsity": self.config.sparsity if self.config.policy != "dense" else 0.0,
            "kv_token_bytes": self.spec.num_layers * self.codec.format.row_bytes,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "versions": {"alisa": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def _shared(self) -> SharedEngine:
        with self._lock:
            if self._closed:
                raise InputError("This LLM is closed; make another one.")
            if self._engine is None:
                self._engine = SharedEngine(*build_engine(self._model, self.config))
            return self._engine

    def _drop_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
