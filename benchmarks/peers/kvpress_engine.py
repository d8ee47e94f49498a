"""kvpress: transformers with a KV cache that a press shortens, at the end of the prompt and while tokens are generated.

Started by `alisa bench run` (src/alisa/lab/bench/remote/measured.py). The cache is kept at a fifth of the final length
(the option `keep`), which is what a sparsity of 0.8 reads at the end; tokens are ranked by the norm of their key, the
cheapest of its presses, and the cache is cut every 32 steps. kvpress has no `generate` for a batch of token ids, so the
loop is here; dtype, attention and threads are those of the transformers driver.
"""

from __future__ import annotations

import torch
from kvpress import DecodingPress, KnormPress, PrefillDecodingPress
from measured import Clock, EngineJob, NoRoom, finish, unavailable
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

INTERVAL = 32
"""Decoding steps between two cuts of the cache."""
KEEP = 0.2


def make_press(job: EngineJob, prompt_len: int, keep: float) -> PrefillDecodingPress:
    """A press that leaves `keep` of the final length, or the whole prompt if that is shorter."""
    target = round(keep * (prompt_len + job.output_len))
    return PrefillDecodingPress(
        prefilling_press=KnormPress(compression_ratio=max(0.0, 1 - target / prompt_len)),
        decoding_press=DecodingPress(KnormPress(), compression_interval=INTERVAL, target_size=target),
    )


def generate(model: PreTrainedModel, job: EngineJob, keep: float) -> tuple[Clock, int]:
    """Run the job; its times and the number of tokens that came."""
    clock, num_output = Clock(len(job.prompts)), 0
    for start, prompts in job.groups():
        ids = torch.tensor(prompts)
        prompt_len = ids.shape[1]
        cache, tokens = DynamicCache(), []
        with torch.inference_mode(), make_press(job, prompt_len, keep)(model):
            logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
            tokens.append(logits[:, -1].argmax(dim=-1, keepdim=True))
            for index in range(start, start + len(prompts)):
                clock.first(index)
            for step in range(job.output_len - 1):
                # The positions go on although the cache is shorter than the sequence.
                place = torch.tensor([prompt_len + step])
                logits = model(
                    input_ids=tokens[-1],
                    past_key_values=cache,
                    position_ids=place.expand(len(prompts), 1),
                    cache_position=place,
                ).logits
                tokens.append(logits[:, -1].argmax(dim=-1, keepdim=True))
                clock.step()
        num_output += torch.cat(tokens, dim=1).numel()
    clock.stop()
    return clock, num_output


def measure(job: EngineJob) -> None:
    """Print the result."""
    family, keep = job.shape["family"], job.options.get("keep", KEEP)
    if family != "llama":
        unavailable(f"kvpress finds no layers with rotary positions in a model of the family {family}")
        return
    if len(set(map(len, job.prompts))) > 1:
        unavailable("kvpress presses a batch as one, which prompts of different lengths are not")
        return
    torch.set_num_threads(job.threads)
    dtype = getattr(torch, job.dtype)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation="sdpa").eval()
    generate(model, job.warm_up(), keep)
    clock, num_output = generate(model, job, keep)
    notes = [f"KnormPress, cache cut to {keep:g} of the final length every {INTERVAL} steps", "sdpa", job.dtype]
    finish(job, clock, packages=["kvpress", "transformers", "torch"], num_output=num_output, notes=notes)


def main() -> None:
    """Measure."""
    try:
        measure(EngineJob.read())
    except NoRoom as error:
        unavailable(str(error))


if __name__ == "__main__":
    main()
