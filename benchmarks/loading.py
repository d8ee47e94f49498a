"""How long a GGUF file takes to load, and how much memory: header, tokenizer and weights of the two real models.

    make models peer-llamacpp
    python benchmarks/loading.py --record benchmarks/results/loading.jsonl

Every run is a process of its own, on a file that is in the page cache. `rss` is before, at the most and after, in
bytes. `int4` takes the blocks of the file over where they have 4 bits, `int4 again` decodes and rounds them. The header
is also read by the `gguf` package, which is why it is not what reads it here. llama.cpp (`.peers/llamacpp`; left out
where that is not there) maps the file and reads it when it is needed: its time and memory are those until the first
token of a prompt of one, its `rss` counts what is mapped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from recording import tell
from weight_makers import FORMATS, fetched_models

from alisa.lab.bench.stamp import current_stamp
from alisa.machine import num_cpus

STATUS = """
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
"""
WORKER = (
    STATUS
    + """
import json, sys
from pathlib import Path
from time import perf_counter
import jinja2, tokenizers, torch
from alisa.model.stored import open_model
from weight_makers import CPU, maker

path = Path(sys.argv[1])
linears = maker(sys.argv[2])
# What torch brings with its first product belongs to the baseline, not to the weights.
linears.layer(torch.ones(64, 64, dtype=torch.bfloat16), None)(torch.ones(2, 64, dtype=torch.bfloat16))
path.read_bytes()
open("/proc/self/clear_refs", "w").write("5")
before, began = status("VmRSS"), perf_counter()
stored = open_model(path)
opened = perf_counter()
tokenizer = stored.tokenizer()
told = perf_counter()
decoder = stored.decoder(torch.bfloat16, CPU, linears=linears)
loaded = perf_counter()
print(json.dumps({
    "header_s": opened - began, "tokenizer_s": told - opened, "weights_s": loaded - told, "all_s": loaded - began,
    "weight_bytes": decoder.weight_bytes, "rss_before": before, "rss_peak": status("VmHWM"),
    "rss_after": status("VmRSS"),
}))
"""
)
LLAMACPP = (
    STATUS
    + """
import json, sys
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
import llama_cpp as api

api.llama_backend_init()
path = sys.argv[1]
Path(path).read_bytes()
open("/proc/self/clear_refs", "w").write("5")
before, began = status("VmRSS"), perf_counter()
model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
loaded = perf_counter()
params = api.llama_context_default_params()
params.n_ctx, params.n_threads, params.n_threads_batch = 512, int(sys.argv[2]), int(sys.argv[2])
context = api.llama_init_from_model(model, params)
batch = api.llama_batch_get_one((api.llama_token * 1)(1), 1)
assert api.llama_decode(context, batch) == 0
done = perf_counter()
print(json.dumps({
    "load_s": loaded - began, "all_s": done - began, "weight_bytes": api.llama_model_size(model),
    "rss_before": before, "rss_peak": status("VmHWM"), "rss_after": status("VmRSS"),
    "version": version("llama-cpp-python"),
}))
"""
)
PACKAGE = """
import json, sys
from time import perf_counter
import gguf
began = perf_counter()
gguf.GGUFReader(sys.argv[1])
print(json.dumps({"header_s": perf_counter() - began}))
"""


def medians(code: str, arguments: list[str], rounds: int, python: str = sys.executable) -> dict[str, Any]:
    """The medians of what several processes print; of what is no number, the first."""
    found = []
    for _ in range(rounds):
        command = [python, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return {
        name: value if isinstance(value, str) else median(one[name] for one in found)
        for name, value in found[0].items()
    }


def main() -> None:
    """Measure, print, and append the records to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=(*FORMATS, "llama.cpp"), nargs="+", default=[*FORMATS, "llama.cpp"])
    parser.add_argument("--environments", type=Path, default=Path(__file__).parents[1] / ".peers")
    parser.add_argument("--record", type=Path, help="append the records to this file")
    args = parser.parse_args()
    llamacpp = (args.environments / "llamacpp" / "bin" / "python").absolute()
    if "llama.cpp" in args.only and not llamacpp.exists():
        print(f"{llamacpp} is not there, so that llama.cpp is left out; make peer-llamacpp", file=sys.stderr)
    for model in fetched_models():
        path = str(model.path.absolute())
        same = {"benchmark": "loading", "model": model.file_name, "file_bytes": model.num_bytes, "rounds": args.rounds}
        ours = [name for name in FORMATS if name in args.only]
        package = medians(PACKAGE, [path], args.rounds) if ours else {}
        for weights in ours:
            figures = medians(WORKER, [path, weights], args.rounds)
            header_s = package["header_s"]
            record = same | figures | {"weights": weights, "gguf_package_header_s": header_s}
            tell(record | {"stamp": asdict(current_stamp())}, args.record)
        if "llama.cpp" in args.only and llamacpp.exists():
            threads = max(1, int(num_cpus()))
            figures = medians(LLAMACPP, [path, str(threads)], args.rounds, str(llamacpp))
            record = same | figures | {"weights": "llama.cpp", "threads": threads}
            tell(record | {"stamp": asdict(current_stamp())}, args.record)


if __name__ == "__main__":
    main()
