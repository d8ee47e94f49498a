"""Recompute or fetch: what one row costs to get back, by each way, for a multi-head and a grouped-query shape.

fetch      the row comes from the tier file; once with the file in the system's page cache, once with the cache emptied
rebuild    its remnant (the layer input, half a multi-head row) comes from the same file, then one product per layer
token id   the prefix is read again through all layers; per row of the whole prefix, as a floor from the prefill rate

    python benchmarks/restore.py --rows 256
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from recording import tell

from alisa.cache.codec import make_codec
from alisa.cache.offload.hidden import HiddenStateCache, hidden_format
from alisa.cache.offload.tiers import DiskTier
from alisa.cache.offload.transfer import Transfers
from alisa.kernels.choose import choose_backend
from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.stamp import current_stamp
from alisa.model.loader import random_decoder
from alisa.planner.shapes import SHAPES
from alisa.spec import RowFormat

NUM_TOKENS = 4096
LAYERS = 4


def microseconds(work, prepare, rounds: int) -> float:  # noqa: ANN001 - two small closures
    """Median time of `work`, after `prepare` each time."""
    times = []
    for index in range(rounds):
        prepare()
        start = perf_counter()
        work(index)
        times.append(perf_counter() - start)
    return median(times) * 1e6


def measure(shape: str, dtype: str, rows: int, rounds: int, directory: Path) -> dict[str, object]:
    """Microseconds for one row, by every way."""
    spec = SHAPES[shape]
    torch_dtype = getattr(torch, dtype)
    decoder = random_decoder(
        type(spec)(**{**{f: getattr(spec, f) for f in spec.__dataclass_fields__}, "num_layers": LAYERS}),
        torch_dtype,
        torch.device("cpu"),
    )
    codec = make_codec(RowFormat(dtype, spec.num_kv_heads, spec.head_dim))
    hidden_codec = make_codec(hidden_format(dtype, spec.hidden_size))
    move = choose_backend(decoder.device).move_rows
    transfers = Transfers()
    generator = np.random.default_rng(0)
    result: dict[str, object] = {
        "shape": shape,
        "dtype": dtype,
        "row_bytes": codec.format.row_bytes,
        "remnant_bytes": hidden_codec.format.row_bytes,
    }
    for what, row_bytes in (("fetch", codec.format.row_bytes), ("rebuild", hidden_codec.format.row_bytes)):
        tier = DiskTier(directory, LAYERS, NUM_TOKENS, row_bytes, move)
        content = np.zeros((NUM_TOKENS, row_bytes), np.uint8)
        for layer in range(LAYERS):
            tier.write(layer, np.arange(NUM_TOKENS), content, np.arange(NUM_TOKENS))
        os.fsync(tier._file)
        hidden_states = HiddenStateCache(tier, hidden_codec, decoder.project_kv, torch_dtype)
        buffer = np.empty((rows, row_bytes), np.uint8)

        def get(index: int, tier=tier, buffer=buffer, what=what, hidden_states=hidden_states) -> None:  # noqa: ANN001
            layer = index % LAYERS
            slots = np.sort(generator.choice(NUM_TOKENS, rows, replace=False))
            parts = [
                transfers.start(
                    lambda some, s=slots[i : i + 64], i=i: tier.read(layer, s, buffer, np.arange(i, i + len(s))),
                    np.zeros(len(slots[i : i + 64]), np.int64),
                )
                for i in range(0, rows, 64)
            ]
            for handle in parts:
                transfers.wait(handle)
            if what == "rebuild":
                hidden_states.rows(layer, torch.from_numpy(buffer), np.arange(rows), codec)

        def forget(tier=tier) -> None:  # noqa: ANN001
            os.posix_fadvise(tier._file, 0, 0, os.POSIX_FADV_DONTNEED)

        get(0)
        result[f"{what}_cached_us"] = round(microseconds(get, lambda: None, rounds) / rows, 2)
        result[f"{what}_cold_us"] = round(microseconds(get, forget, rounds) / rows, 2)
        tier.close()
    hidden = torch.randn(rows, spec.hidden_size, dtype=torch_dtype)
    positions = torch.arange(rows)
    project = microseconds(lambda index: decoder.project_kv(index % LAYERS, hidden, positions), lambda: None, rounds)
    result["product_us"] = round(project / rows, 2)
    # Reading a token again takes every weight of the layer, not only those of K and V.
    kv_weights = 2 * spec.kv_size * spec.hidden_size
    result["token_id_us_at_least"] = round(project / rows * spec.layer_weights / kv_weights, 2)
    transfers.close()
    return result


def main() -> None:
    """Both shapes, 16-bit and 8-bit rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="rows that one layer wants at once")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--disk-path", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    meter = OthersMeter()
    results = []
    for shape in ("opt-1.3b", "llama-1.1b"):
        result = measure(shape, "bfloat16", args.rows, args.rounds, args.disk_path)
        results.append(result)
        print(result)
    record = {
        "benchmark": "restore",
        "rows": args.rows,
        "rounds": args.rounds,
        "stamp": asdict(current_stamp()),
        "others_share": round(meter.share(), 4),
        "results": results,
    }
    tell(record, args.record)


if __name__ == "__main__":
    main()
