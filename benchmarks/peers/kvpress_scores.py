"""kvpress: how likely given outputs are after prompts whose cache a press has shortened.

Started by benchmarks/presses.py, in kvpress's own environment. Standard input has one line for the model, and one for
each job; each job is answered by one line.

    {"model": DIR, "dtype": "bfloat16", "threads": 2}
    {"press": "SnapKVPress", "ratio": 0.8, "items": [[prompt, output], ...]}

A press drops the share `ratio` of the prompt's tokens, in every layer (and for every KV head) others, when the prompt
has been read; "none" drops nothing. What follows is not shortened, so that all of it can be scored in one forward pass,
which has the same logits as one token after the other. The answer has, of each item, the log likelihoods of its output
tokens, whether each was the likeliest, and the tokens read in each of the steps in which decoding would have fed them,
mean over the layers.
"""

from __future__ import annotations

import copy
import json
import sys
from contextlib import nullcontext
from importlib.metadata import version
from itertools import groupby
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

Scores = dict[str, list[float] | list[bool]]


def read_prompt(model: PreTrainedModel, prompt: list[int], press: str, ratio: float) -> tuple[DynamicCache, Any]:
    """The cache after a prompt, shortened, and the logits `[V]` of the token that follows it."""
    cache = DynamicCache()
    context = nullcontext() if press == "none" else getattr(kvpress, press)(compression_ratio=ratio)(model)
    with context:
        logits = model(input_ids=torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits
    return cache, logits[0, -1]


def score(model: PreTrainedModel, cache: DynamicCache, first: torch.Tensor, start: int, output: list[int]) -> Scores:
    """One item's results; the cache is used up, `start` is the position of the first output token."""
    kept = [cache.get_seq_length(layer) for layer in range(model.config.num_hidden_layers)]
    logits = first[None]
    if len(output) > 1:
        positions = torch.arange(start, start + len(output) - 1)[None]
        fed = torch.tensor([output[:-1]])
        logits = torch.cat((logits, model(input_ids=fed, past_key_values=cache, position_ids=positions).logits[0]))
    wanted = torch.tensor(output)
    likelihoods = logits.float().log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
    mean_kept = sum(kept) / len(kept)
    return {
        "log_likelihoods": likelihoods.tolist(),
        "greedy": (logits.argmax(dim=-1) == wanted).tolist(),
        "read": [mean_kept + step for step in range(1, len(output))],
    }


def answer(model: PreTrainedModel, job: dict[str, Any]) -> list[Scores]:
    """The results of all items of a job."""
    outputs = []
    for prompt, items in groupby(job["items"], key=lambda item: item[0]):  # choices of one question share theirs
        cache, first = read_prompt(model, prompt, job["press"], job["ratio"])
        for _, output in items:
            outputs.append(score(model, copy.deepcopy(cache), first, len(prompt), output))
    return outputs


def main() -> None:
    """Answer every job."""
    asked = json.loads(sys.stdin.readline())
    disable_progress_bar()
    torch.set_num_threads(asked["threads"])
    options = {"dtype": asked["dtype"], "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(asked["model"], **options).eval()
    packages = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    with torch.inference_mode():
        for line in sys.stdin:
            print(json.dumps({"outputs": answer(model, json.loads(line)), "packages": packages}), flush=True)


if __name__ == "__main__":
    main()
