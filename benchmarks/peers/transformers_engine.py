"""Hugging Face transformers: `generate` on the whole batch at once.

    .peers/transformers/bin/python benchmarks/peers/transformers_engine.py --cache dynamic

Set up for its best here: bfloat16 weights, scaled dot product attention of torch, as many threads as cores. Caches:
`dynamic` (the default of transformers), `static` (allocated at once), `quanto-int4` and `hqq-int4` (rows in 4 bits with
the last 128 tokens in full), and `offloaded`, which transformers can only do with a GPU.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from workload import Run, Timing, Workload, finish, parser, run_of, unavailable

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "quanto-int4": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}},
    "hqq-int4": {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", "nbits": 4}},
}


class FirstToken(BaseStreamer):
    """Remembers when the first new token of the batch was there; the prompt comes before it."""

    def __init__(self) -> None:
        self.calls = 0
        self.time = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt and then with the tokens of each step."""
        self.calls += 1
        if self.calls == 2:
            self.time = perf_counter()

    def end(self) -> None:
        """Called after the last step."""


def generate(model: PreTrainedModel, workload: Workload, options: dict[str, Any]) -> tuple[Timing, int]:
    """Run the workload; its timing and the number of tokens that came."""
    ids = torch.tensor(workload.prompts())
    first = FirstToken()
    start = perf_counter()
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=workload.output_len,
            min_new_tokens=workload.output_len,
            do_sample=False,
            streamer=first,
            **options,
        )
    end = perf_counter()
    return Timing(end - start, first.time - start), output.numel() - ids.numel()


def measure(run: Run, cache: str) -> None:
    """Print the record of one cache."""
    name = f"transformers-{cache}"
    if cache == "offloaded" and not torch.cuda.is_available():
        unavailable(name, run, "the offloaded cache moves rows between a GPU and the host by CUDA streams; no GPU here")
        return
    torch.set_num_threads(run.threads)
    dtype = getattr(torch, run.workload.dtype)
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=dtype, attn_implementation="sdpa").eval()
    generate(model, run.workload.warm_up(), CACHES[cache])
    timing, num_output = generate(model, run.workload, CACHES[cache])
    notes = [f"{cache} cache", "sdpa", "bfloat16"]
    finish(name, run, timing, packages=["transformers", "torch"], num_output=num_output, notes=notes)


def main() -> None:
    """Measure one cache."""
    options = parser(__doc__)
    options.add_argument("--cache", choices=CACHES, default="dynamic")
    args = options.parse_args()
    measure(run_of(args), args.cache)


if __name__ == "__main__":
    main()
