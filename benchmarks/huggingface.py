"""A model of transformers with its own cache and with alisa's, in one run: time of a step, and peak memory.

    python benchmarks/huggingface.py --model DIR --batch 8 --prompt-len 4096 --output-len 128
    python benchmarks/huggingface.py --model DIR --prompt-len 32 --output-len 64       # the overhead of short contexts

Every variant runs in a process of its own, so that its peak is its own; rounds are interleaved. Prompts are random
tokens, the same for all; what comes out is timed and thrown away. The cap of `capped` is a quarter of the rows that
transformers keeps; what `sketch` knows of all tokens would take most of it, so that its keys have 2 bits there. The
last line of the output is one JSON record.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
import transformers
from recording import tell

import alisa.hf
from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.stamp import current_stamp

VARIANTS: dict[str, dict[str, Any] | None] = {
    "transformers": None,
    "dense": {"policy": "dense"},
    "sketch": {"policy": "sketch"},
    "int8": {"policy": "sketch", "kv_dtype": "int8"},
    "capped": {"policy": "sketch-2bit", "kv_dtype": "int8"},
}
"""Options of `alisa.hf.attach`; None: transformers' own cache, with its default attention."""


class Clock(transformers.StoppingCriteria):
    """Takes the time after every token, and ends nothing."""

    def __init__(self) -> None:
        self.times = [perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """No sequence is done."""
        self.times.append(perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One variant, once: seconds of the first token and of each later one, and the peak of memory in bytes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    model.generation_config.eos_token_id = None
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(args.seed)
    prompt = torch.randint(10, config.vocab_size, (args.batch, args.prompt_len), generator=generator)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = VARIANTS[args.variant]
    context: AbstractContextManager[Any] = nullcontext()
    if options is not None:
        cap = None
        if args.variant == "capped":
            heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            row_bytes = 2 * heads * head_dim * model.dtype.itemsize * config.num_hidden_layers
            cap = args.batch * (args.prompt_len + args.output_len) * row_bytes // 4
        context = alisa.hf.attach(
            model,
            **options,
            sparsity=args.sparsity,
            kv_device_memory=cap,
            max_num_seqs=args.batch,
            max_model_len=args.prompt_len + args.output_len,
        )
    clock = Clock()
    with context:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=args.output_len,
            max_new_tokens=args.output_len,
            do_sample=False,
            stopping_criteria=[clock],
            pad_token_id=0,
        )
    steps = [after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False)]
    return {
        "prefill_s": clock.times[1] - clock.times[0],
        "step_s": median(steps[2:]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loaded_bytes": loaded * 1024,
    }


def main() -> None:
    """All variants, several rounds, in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id, as transformers takes it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=4096)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one here, once, and print it")
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    if args.variant is not None:
        print(json.dumps(measure(args)))
        return
    meter = OthersMeter()
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in args.variants}
    for number in range(args.rounds):
        for variant, rounds in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1} {variant}: {rounds[-1]}", file=sys.stderr)
    results = {
        variant: {name: _quartiles([r[name] for r in rounds]) for name in rounds[0]}
        for variant, rounds in found.items()
    }
    base = results.get("transformers")
    print(f"{'':14}{'first, s':>10}{'step, ms':>10}{'tokens/s':>10}{'peak, GiB':>11}{'step against transformers':>27}")
    for variant, result in results.items():
        step_s = result["step_s"][1]
        against = f"{base['step_s'][1] / step_s:.2f}x" if base else ""
        print(
            f"{variant:14}{result['prefill_s'][1]:10.2f}{step_s * 1e3:10.1f}{args.batch / step_s:10.1f}"
            f"{result['peak_bytes'][1] / 2**30:11.2f}{against:>27}"
        )
    options = {key: value for key, value in vars(args).items() if key not in ("record", "variant", "variants", "model")}
    record = {
        "benchmark": "huggingface",
        "model": Path(args.model).name,
        **options,
        "transformers": transformers.__version__,
        "stamp": asdict(current_stamp()),
        "others_share": round(meter.share(), 4),
        "results": results,
    }
    tell(record, args.record)


def _quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


if __name__ == "__main__":
    main()
