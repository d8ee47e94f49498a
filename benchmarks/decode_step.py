"""Time of one decode step against its floor, split into its parts, on random weights.

    python benchmarks/decode_step.py --shape opt-1.3b --dtype float32 --batch 16 --prompt-len 128 --output-len 64

The floor is what the matrix library itself needs: the same packed linear layers, run one after the other with nothing
in between. Beside it stands the time that reading the weights once would take at the measured memory bandwidth. Both
are measured in the same process, before the run. The last line of the output is one JSON record.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import get_args

import torch

from alisa.config import PolicyName, SamplingParams
from alisa.engine.engine import Engine
from alisa.engine.kernels import choose_kernels
from alisa.engine.placement import Placement
from alisa.engine.recorder import Stopwatch
from alisa.engine.requests import Request
from alisa.engine.runner import Runner
from alisa.kv.codec import FloatCodec
from alisa.kv.store import KVStore
from alisa.model.decoder import Decoder
from alisa.model.linear import make_linear
from alisa.model.loader import random_decoder
from alisa.policy.table import make_policy
from alisa.schedule.all_device import AllDevice
from alisa.schedule.base import Limits
from alisa.spec import ModelSpec, Rope
from alisa.types import RowFormat, StepRecord

SHAPES = {
    "opt-1.3b": ModelSpec(
        family="opt",
        num_layers=24,
        hidden_size=2048,
        num_heads=32,
        num_kv_heads=32,
        head_dim=64,
        ffn_size=8192,
        vocab_size=50272,
        max_positions=2048,
        norm="layernorm",
        norm_eps=1e-5,
        activation="relu",
        gated_mlp=False,
        rope=None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        position_offset=2,
    ),
    "llama-1.1b": ModelSpec(
        family="llama",
        num_layers=22,
        hidden_size=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        ffn_size=5632,
        vocab_size=32000,
        max_positions=2048,
        norm="rmsnorm",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        rope=Rope(10000.0, 64),
        tied_embeddings=False,
    ),
}


def read_bandwidth() -> float:
    """Bytes per second of summing a buffer much larger than any cache, median of five."""
    buffer = torch.ones(1 << 26, dtype=torch.int64)
    buffer.sum()
    return buffer.nbytes / median(timed(buffer.sum) for _ in range(5))


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = perf_counter()
    work()
    return perf_counter() - start


def gemm_floor(spec: ModelSpec, dtype: torch.dtype, batch: int) -> float:
    """Seconds that one step's linear layers take back to back; four layers are measured, more than a cache holds."""
    shapes = [
        (spec.q_size, spec.hidden_size),
        (2 * spec.kv_size, spec.hidden_size),
        (spec.hidden_size, spec.q_size),
        (spec.ffn_size * (2 if spec.gated_mlp else 1), spec.hidden_size),
        (spec.hidden_size, spec.ffn_size),
    ]
    device = torch.device("cpu")
    layers = [make_linear(torch.randn(shape, dtype=dtype), None, device) for _ in range(4) for shape in shapes]
    inputs = [torch.randn(batch, shape[1], dtype=dtype) for _ in range(4) for shape in shapes]
    output = make_linear(torch.randn(spec.vocab_size, spec.hidden_size, dtype=dtype), None, device)
    hidden = torch.randn(batch, spec.hidden_size, dtype=dtype)

    def all_layers() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)

    all_layers()
    per_layer = median(timed(all_layers) for _ in range(7)) / 4
    return per_layer * spec.num_layers + median(timed(lambda: output(hidden)) for _ in range(7))


def run(decoder: Decoder, policy_name: str, args: argparse.Namespace) -> list[StepRecord]:
    """All decode steps of one batch."""
    spec = decoder.spec
    length = args.prompt_len + args.output_len
    policy = make_policy(policy_name, args.sparsity)
    kv_dtype = str(decoder.dtype).removeprefix("torch.")
    kernels = choose_kernels(decoder.device)
    store = KVStore(
        num_layers=spec.num_layers,
        codec=FloatCodec(RowFormat(kv_dtype, spec.num_kv_heads, spec.head_dim)),
        num_rows=args.batch * length,
        num_lanes=args.batch,
        max_length=length,
        device=decoder.device,
        append=kernels.append,
    )
    state = policy.start(spec, args.batch, length, decoder.device, kernels.selection)
    runner = Runner(decoder, policy, store, state, kernels.attend, Stopwatch())
    placement = Placement(AllDevice(), Limits(args.batch * length), store, policy)
    engine = Engine(runner, placement, eos_ids=frozenset(), prefill_chunk=1024)
    generator = torch.Generator().manual_seed(args.seed)
    for index in range(args.batch):
        ids = torch.randint(10, spec.vocab_size, (args.prompt_len,), generator=generator).tolist()
        params = SamplingParams(max_tokens=args.output_len, ignore_eos=True)
        engine.submit(Request(index, tuple(ids), params, args.output_len))
    records = []
    while (result := engine.step()) is not None:
        records.append(result.record)
    return records


def main() -> None:
    """Measure the floor, then every policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-1.3b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--policy", nargs="+", choices=get_args(PolicyName), default=["dense", "swa"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    spec, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    bandwidth = read_bandwidth()
    floor_s = gemm_floor(spec, dtype, args.batch)
    read_s = spec.step_weight_bytes(args.dtype) / bandwidth
    decoder = random_decoder(spec, dtype, torch.device("cpu"), args.seed)
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s; weights {spec.step_weight_bytes(args.dtype) / 1e9:.2f} GB")
    print(f"floor of one step: GEMMs alone {floor_s * 1e3:.0f} ms, reading the weights {read_s * 1e3:.0f} ms")
    columns = ("step", "linear", "/floor", "attend", "select", "sample", "other")
    print(f"{'medians, ms':14}" + "".join(f"{column:>8}" for column in columns))
    results = {}
    for policy in args.policy:
        records = run(decoder, policy, args)
        steps = [record for record in records if not record.prefill][2:]
        parts = {
            part: median(getattr(record, part) for record in steps) * 1e3
            for part in ("wall_s", "linear_s", "attention_s", "selection_s", "sampling_s", "other_s")
        }
        results[policy] = {
            "step_ms": {name.removesuffix("_s"): round(value, 2) for name, value in parts.items()},
            "wall_ms_min_max": [round(f(record.wall_s for record in steps) * 1e3, 1) for f in (min, max)],
            "linear_over_floor": round(parts["linear_s"] / floor_s / 1e3, 3),
            "prefill_s": round(sum(record.wall_s for record in records if record.prefill), 2),
            "tokens_per_s": round(args.batch / median(record.wall_s for record in steps), 1),
        }
        print(
            f"{policy:14}{parts['wall_s']:8.0f}{parts['linear_s']:8.0f}{parts['linear_s'] / floor_s / 1e3:8.2f}"
            f"{parts['attention_s']:8.0f}{parts['selection_s']:8.1f}{parts['sampling_s']:8.1f}{parts['other_s']:8.2f}"
        )
    record = {
        "benchmark": "decode_step",
        **vars(args),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "floor_gemm_ms": round(floor_s * 1e3, 1),
        "floor_read_ms": round(read_s * 1e3, 1),
        "results": results,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
