"""Who should leave the hot cache first: rows fetched and hit rate for each rule, on a trained model and real text.

python benchmarks/eviction.py --text FILE --cap 0.25
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from alisa.config import SamplingParams
from alisa.engine.engine import Engine
from alisa.engine.kernels import choose_kernels
from alisa.engine.memory import Caps, make_memory
from alisa.engine.placement import Placement
from alisa.engine.recorder import Stopwatch
from alisa.engine.requests import Request
from alisa.engine.runner import Runner
from alisa.engine.threads import make_governor
from alisa.kv.codec import make_codec
from alisa.kv.residency import EVICTIONS
from alisa.llm import embedded_model
from alisa.model.loader import load_decoder
from alisa.model.tokenizer import Tokenizer
from alisa.policy.table import make_policy
from alisa.types import RowFormat, Traffic


def main() -> None:
    """Every rule for every policy, the same prompts and the same cap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=embedded_model())
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--cap", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--policy", nargs="*", default=["swa", "sketch"])
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    decoder = load_decoder(args.model, torch.float32, torch.device("cpu"))
    ids = Tokenizer.load(args.model).encode(args.text.read_text(encoding="utf-8")[:200_000])
    spec, length = decoder.spec, args.prompt_len + args.output_len - 1
    codec = make_codec(RowFormat("float32", spec.num_kv_heads, spec.head_dim))
    total = args.batch * length * spec.num_layers * codec.format.row_bytes
    results = []
    for name in args.policy:
        for eviction in EVICTIONS:
            policy, kernels = make_policy(name, args.sparsity), choose_kernels(decoder.device)
            caps = Caps(int(args.cap * total), 0, 2 * total, None, eviction)
            memory = make_memory(decoder, policy, codec, kernels, [length] * args.batch, caps, None, args.batch)
            state = policy.start(spec, args.batch, length, decoder.device, kernels.selection)
            runner = Runner(
                decoder, policy, memory.store, state, kernels.prefill, kernels.attend, Stopwatch(), looks_ahead=True
            )
            placement = Placement(memory.scheduler, memory.limits, memory.store, policy)
            engine = Engine(runner, placement, eos_ids=frozenset(), prefill_chunk=1024, governor=make_governor())
            for index in range(args.batch):
                prompt = tuple(ids[index * args.prompt_len : (index + 1) * args.prompt_len])
                params = SamplingParams(max_tokens=args.output_len, temperature=0.8, seed=index, ignore_eos=True)
                engine.submit(Request(index, prompt, params, args.output_len))
            traffic = Traffic()
            while (result := engine.step()) is not None:
                traffic += result.record.traffic
            memory.store.close()
            results.append(
                {
                    "policy": name,
                    "eviction": eviction,
                    "fetched_rows": traffic.fetched_rows,
                    "lookups": traffic.lookups,
                    "hit_rate": round(traffic.hit_rate, 4),
                }
            )
            print(f"{name:8} {eviction:5} fetched {traffic.fetched_rows:8} rows, hit rate {traffic.hit_rate:.2%}")
    record = {"benchmark": "eviction", **{k: v for k, v in vars(args).items() if k != "record"}, "results": results}
    record |= {"model": args.model.name, "text": args.text.name}
    print(json.dumps(record))
    if args.record:
        with args.record.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
