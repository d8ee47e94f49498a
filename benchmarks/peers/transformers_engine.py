"""Hugging Face transformers: `generate` on the whole batch at once.

Started by `alisa bench run` (src/alisa/lab/bench/remote/measured.py). Set up for its best here: bfloat16 weights,
scaled dot product attention of torch, as many threads as cores. Caches: `dynamic` (the default of transformers),
`static` (allocated at once), `quanto-int4` and `hqq-int4` (rows in 4 bits with the last 128 tokens in full), and
`offloaded`, which transformers can only do with a GPU. None of them has a cap: under a memory budget the batch is made
as small as the budget asks. Prompts of different lengths are padded on the left, and a batch ends before the next
begins. A GGUF file is read by transformers itself, which decodes it to 16 bits. A conversation keeps its dynamic cache,
and each turn adds what is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measured import Clock, EngineJob, NoRoom, finish, unavailable
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "quanto-int4": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}},
    "hqq-int4": {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", "nbits": 4}},
}


class Watch(BaseStreamer):
    """Tells the clock when each step of a batch has its tokens; the prompts come before them."""

    def __init__(self, clock: Clock, prompts: range) -> None:
        self._clock, self._prompts = clock, prompts
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompts and then with the tokens of each step."""
        self._calls += 1
        if self._calls == 2:
            for index in self._prompts:
                self._clock.first(index)
        elif self._calls > 2:
            self._clock.step()

    def end(self) -> None:
        """Called after the last step."""


def padded(prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask Int64[B, T], filled up on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def generate(model: PreTrainedModel, job: EngineJob, options: dict[str, Any]) -> tuple[Clock, int]:
    """Run the job; its times and the number of tokens that came."""
    groups = [(start, *(part.to(model.device) for part in padded(prompts))) for start, prompts in job.groups()]
    clock, num_output = Clock(len(job.prompts)), 0
    for start, ids, mask in groups:
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=job.output_len,
                min_new_tokens=job.output_len,
                do_sample=False,
                streamer=Watch(clock, range(start, start + len(ids))),
                **options,
            )
        num_output += output.numel() - ids.numel()
    clock.stop()
    return clock, num_output


def converse(model: PreTrainedModel, job: EngineJob, options: dict[str, Any]) -> tuple[Clock, int]:
    """Hold the conversation in one cache; its times and the number of tokens that came."""
    clock, cache = Clock(len(job.prompts)), DynamicCache(config=model.config)
    said = torch.empty(1, 0, dtype=torch.int64)
    num_output = 0
    for index, ids in enumerate(job.prompts):
        clock.turn()
        said = torch.cat((said, torch.tensor([ids])), dim=1)
        with torch.inference_mode():
            output = model.generate(
                said,
                attention_mask=torch.ones_like(said),
                max_new_tokens=job.output_len,
                min_new_tokens=job.output_len,
                do_sample=False,
                streamer=Watch(clock, range(index, index + 1)),
                past_key_values=cache,
                **options,
            )
        num_output += output.numel() - said.numel()
        said = output
    clock.stop()
    return clock, num_output


def load(job: EngineJob) -> PreTrainedModel:
    """The model of a directory or a GGUF file."""
    path = Path(job.model)
    place = {"gguf_file": path.name} if path.is_file() else {}
    directory = path.parent if path.is_file() else path
    dtype = getattr(torch, job.dtype)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa", **place).eval()


def measure(job: EngineJob) -> None:
    """Print the result of one cache."""
    cache = job.options.get("cache", "dynamic")
    if cache == "offloaded" and not torch.cuda.is_available():
        unavailable("the offloaded cache moves rows between a GPU and the host by CUDA streams; no GPU here")
        return
    if job.turns and cache != "dynamic":
        unavailable(f"a conversation is held in a dynamic cache here, not in a {cache} one")
        return
    torch.set_num_threads(job.threads)
    model = load(job)
    run = converse if job.turns else generate
    run(model, job.warm_up(), CACHES[cache])
    clock, num_output = run(model, job, CACHES[cache])
    notes = [f"{cache} cache", "sdpa", job.dtype]
    if job.kv_budget_bytes is not None:
        notes.append(f"batches of {max(len(prompts) for _, prompts in job.groups())} by the budget")
    finish(job, clock, packages=["transformers", "torch"], num_output=num_output, notes=notes)


def main() -> None:
    """Measure one cache."""
    try:
        measure(EngineJob.read())
    except NoRoom as error:
        unavailable(str(error))


if __name__ == "__main__":
    main()
