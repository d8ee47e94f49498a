"""How long a GGUF file takes to load, and how much memory: header, tokenizer and weights of the two real models.

    make models
    python benchmarks/loading.py --record benchmarks/results/loading.jsonl

Every run is a process of its own, on a file that is in the page cache. `rss` is before, at the most and after, in
bytes. `int4` takes the blocks of the file over where they have 4 bits, `int4 again` decodes and rounds them. The header
is also read by the `gguf` package, which is why it is not what reads it here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

from real_models import REAL_MODELS
from recording import tell

from alisa.lab.bench.stamp import current_stamp

WORKER = """
import json, sys
from pathlib import Path
from time import perf_counter
import jinja2, tokenizers, torch
from alisa.kernels.native.product import CpuProducts
from alisa.model.choose_linear import PanelLinears, choose_linear
from alisa.model.linear_int4 import int4_panels
from alisa.model.linear_int8 import int8_panels
from alisa.model.stored import open_model

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

path, weights = Path(sys.argv[1]), sys.argv[2]
cpu = torch.device("cpu")
linears = choose_linear(weights if weights in ("int8", "int4") else "float", torch.bfloat16, cpu)
if weights == "int4 again":
    linears = PanelLinears(int4_panels, int8_panels, CpuProducts(), linears)
# What torch brings with its first product belongs to the baseline, not to the weights.
linears.layer(torch.ones(64, 64, dtype=torch.bfloat16), None)(torch.ones(2, 64, dtype=torch.bfloat16))
path.read_bytes()
open("/proc/self/clear_refs", "w").write("5")
before, began = status("VmRSS"), perf_counter()
stored = open_model(path)
opened = perf_counter()
tokenizer = stored.tokenizer()
told = perf_counter()
decoder = stored.decoder(torch.bfloat16, cpu, linears=linears)
loaded = perf_counter()
print(json.dumps({
    "header_s": opened - began, "tokenizer_s": told - opened, "weights_s": loaded - told, "all_s": loaded - began,
    "weight_bytes": decoder.weight_bytes, "rss_before": before, "rss_peak": status("VmHWM"), "rss_after": status("VmRSS"),
}))
"""
PACKAGE = """
import json, sys
from time import perf_counter
import gguf
began = perf_counter()
gguf.GGUFReader(sys.argv[1])
print(json.dumps({"header_s": perf_counter() - began}))
"""


def medians(code: str, arguments: list[str], rounds: int) -> dict[str, float]:
    """The medians of what several processes print."""
    found = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return {name: median(one[name] for one in found) for name in found[0]}


def main() -> None:
    """Measure, print, and append the records to a file."""
    parser = argparse.ArgumentParser(description="How long a GGUF file takes to load, and how much memory.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path, help="append the records to this file")
    args = parser.parse_args()
    for model in REAL_MODELS:
        if not model.path.is_file():
            sys.exit(f"{model.path} is not there; `make models` fetches it.")
        package = medians(PACKAGE, [str(model.path)], args.rounds)
        for weights in ("bfloat16", "int8", "int4", "int4 again"):
            figures = medians(WORKER, [str(model.path), weights], args.rounds)
            tell(
                {
                    "benchmark": "loading",
                    "model": model.file_name,
                    "file_bytes": model.num_bytes,
                    "weights": weights,
                    "rounds": args.rounds,
                    **figures,
                    "gguf_package_header_s": package["header_s"],
                    "stamp": asdict(current_stamp()),
                },
                args.record,
            )


if __name__ == "__main__":
    main()
