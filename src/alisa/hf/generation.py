"""`custom_generate`: alisa's own engine under the logits processors and stopping criteria of transformers.

A sequence that is done leaves at once, with its rows; waiting ones take its place. So processors and criteria are
called with those sequences that have as many new tokens as each other, padded on the left as transformers pads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from alisa.config import EngineConfig, SamplingParams
from alisa.engine.builder import EngineParts, build_parts
from alisa.engine.chooser import NOT_FINITE
from alisa.engine.report import step_record
from alisa.engine.sampler import uniform
from alisa.engine.threads import make_governor
from alisa.errors import AlisaError, InputError
from alisa.hf.loaded import load_from
from alisa.scheduler.plan import StepPlan
from alisa.scheduler.request import Request


class EngineGenerate:
    """What `model.generate(..., custom_generate=this)` calls: keeps our decoder of the model between calls.

    Args:
        model: of a family that alisa runs itself.
        engine_config: how to run it; `model` and `dtype` of it are those of the model.

    Raises:
        ModelError: the model is of another family.
    """

    def __init__(self, model: PreTrainedModel, engine_config: EngineConfig | None = None) -> None:
        self._config = engine_config or EngineConfig()
        self._loaded = load_from(model, self._config)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        token_streamer: BaseStreamer | None = None,
        **model_kwargs: Any,  # noqa: ANN401 - what transformers hands to every way of generating
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continue input_ids Int64[B, S]; returns Int64[B, S + new], padded after the end of those that ended early.

        Raises:
            InputError: this way of generating is not alisa's.
            CapacityError: a sequence does not fit the caps.
        """
        _refuse(logits_processor, generation_config, model_kwargs)
        parts = build_parts(self._loaded, self._config)
        try:
            run = _Run(parts, input_ids, logits_processor, stopping_criteria, generation_config, token_streamer)
            sequences = run.finish(model_kwargs.get("attention_mask"))
        finally:
            parts.runner.session.cache.close()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences))
        return sequences


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    engine_config: EngineConfig | None = None,
    token_streamer: BaseStreamer | None = None,
    **model_kwargs: Any,  # noqa: ANN401 - what transformers hands to every way of generating
) -> Tensor | GenerateDecoderOnlyOutput:
    """`EngineGenerate` for one call: our decoder of the model is made anew each time."""
    engine = EngineGenerate(model, engine_config)
    return engine(
        model, input_ids, logits_processor, stopping_criteria, generation_config, token_streamer, **model_kwargs
    )


def _refuse(processors: LogitsProcessorList, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise InputError for what the engine does not do."""
    by_batch = (PrefixConstrainedLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
    wrong = [
        text
        for bad, text in (
            ((config.num_beams or 1) > 1, "beams"),
            (any(isinstance(each, by_batch) for each in processors), "processors that know the place in the batch"),
            (config.output_attentions or config.output_hidden_states, "attention weights and hidden states"),
            (config.output_scores or config.output_logits, "scores"),
            (model_kwargs.get("inputs_embeds") is not None, "embeddings instead of ids"),
            (config.prompt_lookup_num_tokens is not None, "prompt lookup"),
            (_has_tokens(model_kwargs.get("past_key_values")), "a cache of earlier tokens"),
        )
        if bad
    ]
    if wrong:
        raise InputError(
            f"alisa's engine does not take {' or '.join(wrong)}; leave them out, or use alisa.hf.attach instead of "
            "custom_generate."
        )


def _has_tokens(cache: Any) -> bool:  # noqa: ANN401 - any cache of transformers
    return cache is not None and cache.get_seq_length() > 0


class _Run:
    """One batch: every row is a request."""

    def __init__(
        self,
        parts: EngineParts,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> None:
        self._parts = parts
        self._session = parts.runner.session
        self._input_ids = input_ids
        self._prompts: list[list[int]] = input_ids.tolist()
        self._processors = processors
        self._criteria = criteria
        self._config = config
        self._streamer = streamer
        # Drawn from torch's generator, so that torch.manual_seed decides; each row has numbers of its own.
        self._seed = int(torch.randint(2**62, ())) if config.do_sample else 0
        self._said: dict[int, list[int]] = {}

    def finish(self, mask: Tensor | None) -> Tensor:
        """All sequences, to their end."""
        governor = make_governor()
        self._add(mask)
        if self._streamer is not None:
            self._streamer.put(self._input_ids.cpu())
        try:
            while self._parts.scheduler.has_requests:
                governor.before_step()
                self._step()
        finally:
            governor.restore()
        if self._streamer is not None:
            self._streamer.end()
        return self._sequences()

    def _add(self, mask: Tensor | None) -> None:
        """Every prompt waits, without its padding."""
        width = self._input_ids.shape[1]
        max_len = self._parts.cache_config.max_model_len
        num_new = self._config.max_length - width
        pads = [0] * len(self._prompts) if mask is None else (mask == 0).sum(dim=1).tolist()
        for row, (ids, num_pads) in enumerate(zip(self._prompts, pads, strict=True)):
            if mask is not None and bool((mask[row, num_pads:] == 0).any()):
                raise InputError(
                    "the attention mask has padding after or inside a sequence; pad on the left "
                    "(tokenizer.padding_side = 'left')."
                )
            if num_pads == width:
                raise InputError(f"sequence {row + 1} of the batch is all padding; give it a token, or leave it out.")
            if width - num_pads + num_new > max_len:
                raise InputError(
                    f"{width - num_pads} tokens of prompt and {num_new} new ones are more than {max_len} positions; "
                    "lower max_new_tokens, or raise max_model_len as far as the model goes."
                )
            params = SamplingParams(max_tokens=num_new, ignore_eos=True)
            self._parts.scheduler.add(Request(str(row), ids[num_pads:], params, num_new))

    def _step(self) -> None:
        """As `Engine.step`, with transformers' choice of tokens and of ends."""
        scheduler, runner = self._parts.scheduler, self._parts.runner
        runner.timer.reset()
        plan = scheduler.schedule(self._session.cache)
        assert plan is not None, "a request that fits alone has a next step"
        running = {request.req_idx: request for request in scheduler.running}
        requests = [running[chunk.req_idx] for chunk in plan.chunks]
        tokens = [r.token_ids[c.start : c.end] for r, c in zip(requests, plan.chunks, strict=True)]
        wanted = [len(r.token_ids) == c.end for r, c in zip(requests, plan.chunks, strict=True)]
        result = runner.run(plan, tokens, wanted)
        if failed := result.traffic.failed:
            raise AlisaError(f"rows of the KV cache were lost: {'; '.join(sorted(set(failed.values())))}.")
        ready = [request for request, is_wanted in zip(requests, wanted, strict=True) if is_wanted]
        finished = self._grow(ready, result.logits)
        self._parts.costs.learn(step_record(plan, result.traffic, runner))
        self._leave(plan, finished)

    def _grow(self, ready: Sequence[Request], logits: Tensor) -> list[Request]:
        """Each of them has one token more; returns those that are done."""
        finished: list[Request] = []
        order = sorted(range(len(ready)), key=lambda row: len(ready[row].output_ids))
        for _, same in groupby(order, key=lambda row: len(ready[row].output_ids)):
            rows = list(same)
            group = [ready[row] for row in rows]
            finished += self._choose(group, logits[torch.tensor(rows, device=logits.device)].float())
        return finished

    def _choose(self, group: Sequence[Request], logits: Tensor) -> list[Request]:
        """The next token of requests with as many tokens as each other; returns those that are done."""
        so_far = [[*self._prompts[_row(request)], *request.output_ids] for request in group]
        ids = torch.tensor(so_far, device=logits.device)
        scores = self._processors(cast(torch.LongTensor, ids), cast(torch.FloatTensor, logits))
        if bool(torch.isnan(scores).any()):
            raise AlisaError(f"{NOT_FINITE}.")
        chosen = self._draw(group, scores) if self._config.do_sample else scores.argmax(dim=-1)
        for request, token_id in zip(group, chosen.tolist(), strict=True):
            request.append(token_id)
        if self._streamer is not None:
            self._streamer.put(chosen.cpu())
        done = self._criteria(torch.cat((ids, chosen[:, None]), dim=1), None).tolist()
        finished = [
            request
            for request, is_done in zip(group, done, strict=True)
            if is_done or len(request.output_ids) == request.max_new_tokens
        ]
        for request in finished:
            request.finish_reason = "stop"
        return finished

    def _draw(self, group: Sequence[Request], scores: Tensor) -> Tensor:
        """A token of each row by its probability, with the row's own random numbers: company changes nothing."""
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
        seeds = [(self._seed + _row(request)) % 2**64 for request in group]
        drawn = [uniform(seed, len(request.output_ids)) for seed, request in zip(seeds, group, strict=True)]
        wanted = torch.tensor(drawn, dtype=torch.float64, device=scores.device)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp_(max=scores.shape[1] - 1)

    def _leave(self, plan: StepPlan, finished: Sequence[Request]) -> None:
        """Those that are done have left, and their rows are free."""
        self._parts.scheduler.update(plan, finished, {})
        for request in finished:
            assert request.req_idx is not None, "a request that was in a step has an index"
            self._session.close(request.req_idx)
            self._said[_row(request)] = request.output_ids

    def _sequences(self) -> Tensor:
        """Int64[B, S + new]."""
        longest = max(map(len, self._said.values()))
        pad = self._config.pad_token_id or 0
        new = [[*said, *[pad] * (longest - len(said))] for _, said in sorted(self._said.items())]
        return torch.cat((self._input_ids, torch.tensor(new, device=self._input_ids.device)), dim=1)


def _row(request: Request) -> int:
    """Place in the batch."""
    return int(request.request_id)
