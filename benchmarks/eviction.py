"""Who should leave the hot cache first: rows fetched and hit rate for each rule, on a trained model and real text.

python benchmarks/eviction.py --text FILE --cap 0.25
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from recording import tell

from alisa.cache.offload.residency import EVICTIONS, Eviction
from alisa.config import EngineConfig, PolicyName, SamplingParams
from alisa.engine.builder import CacheOptions, build_engine
from alisa.engine.loaded import LoadedModel, embedded_model, load_model
from alisa.lab.bench.session import RunSpec, batch_config, device_cap_within
from alisa.outputs import Traffic
from alisa.planner.footprint import kv_token_bytes


def run(
    model: LoadedModel, ids: Sequence[int], policy: PolicyName, eviction: Eviction, args: argparse.Namespace
) -> Traffic:
    """What moved while one batch was read and continued."""
    total = args.batch * (args.prompt_len + args.output_len - 1) * kv_token_bytes(model.spec, model.dtype)
    config = EngineConfig(
        policy=policy,
        sparsity=args.sparsity,
        kv_disk_memory=2 * total,
        max_num_seqs=args.batch,
    )
    config = batch_config(config, [args.prompt_len] * args.batch, args.output_len)
    options = CacheOptions(eviction=eviction)
    cap = device_cap_within(model.decoder, RunSpec(config, options), int(args.cap * total))
    engine, _ = build_engine(model, replace(config, kv_device_memory=cap), options)
    for index in range(args.batch):
        prompt = ids[index * args.prompt_len : (index + 1) * args.prompt_len]
        params = SamplingParams(max_tokens=args.output_len, temperature=0.8, seed=index, ignore_eos=True)
        engine.add_request(prompt, params)
    traffic = Traffic()
    while (record := engine.step().record) is not None:
        traffic += record.traffic
    engine.close()
    return traffic


def main() -> None:
    """Every rule for every policy, the same prompts and the same cap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=embedded_model())
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--cap", type=float, default=0.25, help="share of the KV cache that the device holds")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--policy", nargs="*", default=["swa", "sketch"])
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    model = load_model(EngineConfig(model=str(args.model), dtype="float32", device="cpu"))
    assert model.tokenizer is not None, "a model that was loaded from files has one"
    ids = model.tokenizer.encode(args.text.read_text(encoding="utf-8")[:200_000])
    results = []
    for name in args.policy:
        for eviction in EVICTIONS:
            traffic = run(model, ids, name, eviction, args)
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
    tell(record, args.record)


if __name__ == "__main__":
    main()
