"""kvpress: transformers with a KV cache that a press shortens, at the end of the prompt and while tokens are generated.

    .peers/kvpress/bin/python benchmarks/peers/kvpress_engine.py --shape llama-1.1b --prompt-len 1024 --output-len 256

The cache is kept at a fifth of the final length, which is what a sparsity of 0.8 reads at the end; tokens are ranked by
the norm of their key, the cheapest of its presses, and the cache is cut every 32 steps. kvpress has no `generate` for a
batch of token ids, so the loop is here; dtype, attention and threads are those of the transformers driver.
"""

from __future__ import annotations

from time import perf_counter

import torch
from kvpress import DecodingPress, KnormPress, PrefillDecodingPress
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from workload import SHAPES, Run, Timing, Workload, finish, parser, run_of, unavailable

INTERVAL = 32
"""Decoding steps between two cuts of the cache."""


def make_press(workload: Workload, keep: float) -> PrefillDecodingPress:
    """A press that leaves `keep` of the final length, or the whole prompt if that is shorter."""
    target = round(keep * (workload.prompt_len + workload.output_len))
    ratio = max(0.0, 1 - target / workload.prompt_len)
    return PrefillDecodingPress(
        prefilling_press=KnormPress(compression_ratio=ratio),
        decoding_press=DecodingPress(KnormPress(), compression_interval=INTERVAL, target_size=target),
    )


def generate(model: PreTrainedModel, workload: Workload, press: PrefillDecodingPress) -> tuple[Timing, int]:
    """Run the workload; its timing and the number of tokens that came."""
    cache = DynamicCache()
    ids = torch.tensor(workload.prompts())
    start = perf_counter()
    with torch.inference_mode(), press(model):
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens = [token]
        prefill_s = perf_counter() - start
        for step in range(workload.output_len - 1):
            # The positions go on although the cache is shorter than the sequence.
            place = torch.tensor([workload.prompt_len + step])
            logits = model(
                input_ids=token,
                past_key_values=cache,
                position_ids=place.expand(workload.batch, 1),
                cache_position=place,
            ).logits
            token = logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens.append(token)
        output = torch.cat(tokens, dim=1)
    return Timing(perf_counter() - start, prefill_s), output.numel()


def measure(run: Run, keep: float) -> None:
    """Print the record."""
    family = SHAPES[run.workload.shape].family
    if family != "llama":
        unavailable("kvpress", run, f"kvpress finds no layers with rotary positions in a model of the family {family}")
        return
    torch.set_num_threads(run.threads)
    dtype = getattr(torch, run.workload.dtype)
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=dtype, attn_implementation="sdpa").eval()
    generate(model, run.workload.warm_up(), make_press(run.workload.warm_up(), keep))
    timing, num_output = generate(model, run.workload, make_press(run.workload, keep))
    notes = [f"KnormPress, cache cut to {keep:g} of the final length every {INTERVAL} steps", "sdpa", "bfloat16"]
    packages = ["kvpress", "transformers", "torch"]
    finish("kvpress", run, timing, packages=packages, num_output=num_output, notes=notes)


def main() -> None:
    """Measure."""
    options = parser(__doc__)
    options.add_argument("--keep", type=float, default=0.2, help="share of the final length that stays cached")
    args = options.parse_args()
    measure(run_of(args), args.keep)


if __name__ == "__main__":
    main()
