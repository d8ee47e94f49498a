"""The figures in README.md and in docs/, from the records in benchmarks/results and nothing else.

    python benchmarks/tables.py --write
    python benchmarks/tables.py --check      # exit status 1 where a document is not what the records say

A document says where a block goes:

    <!-- benchmarks: NAME -->
    ... whatever stands here is replaced ...
    <!-- end -->

`all` is every section that has records, with its heading. A block without records is empty.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fleet_tables
import hint_tables
import huggingface_tables
import queue_tables
import real_tables
import server_tables
from table_blocks import (
    Results,
    accuracy,
    decode_step,
    engines,
    eviction,
    gpu,
    kernels,
    loading,
    machine,
    one_user,
    pace,
    prediction,
    prefix,
    prompts,
    recall,
    restore,
    schedules,
    speculation,
    tiers,
)

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "docs/accuracy.md",
    "docs/benchmarks.md",
    "docs/huggingface.md",
    "docs/models.md",
    "docs/planner.md",
    "docs/prefix-cache.md",
    "docs/scaling.md",
    "docs/scheduling.md",
    "docs/server.md",
    "docs/speculation.md",
)
_BLOCK = re.compile(r"(<!-- benchmarks: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Block = Callable[[Results], str]

SECTIONS: dict[str, tuple[Block, ...]] = {
    "The paper's workload": (engines("paper"),),
    "Long prompts, shared KV heads": (engines("llama"),),
    "Long generation": (engines("long-generation"),),
    "Prompts of many lengths": (engines("ragged"),),
    "A small real model": (engines("real"),),
    "A conversation": (engines("chat"),),
    "A quarter of the memory": (engines("capped"), tiers),
    "What each part contributes": (engines("ablation"),),
    "Getting a row back": (restore,),
    "Who leaves the hot cache first": (eviction,),
    "A decode step and its parts": (decode_step,),
    "Kernels": (kernels, prompts),
    "One user": (one_user,),
    "Drafts": (speculation,),
    "A long prompt beside a reader": (pace,),
    "GPU": (gpu,),
    "Predicted and measured": (prediction, schedules),
    "What reading less costs": (accuracy, recall),
}
"""Of docs/benchmarks.md, in order."""


def everything(results: Results) -> str:
    """Every section that has records."""
    parts = []
    for title, blocks in SECTIONS.items():
        texts = [text for block in blocks if (text := block(results))]
        if texts:
            parts += [f"## {title}", *texts]
    return "\n\n".join(parts)


BLOCKS: dict[str, Block] = {
    "all": everything,
    "machine": machine,
    "peers": engines("paper", "OPT-1.3B, batch 16"),
    "llama": engines("llama"),
    "capped": engines("capped"),
    "ablation": engines("ablation"),
    "real": engines("real"),
    "chat": engines("chat"),
    "tiers": tiers,
    "restore": restore,
    "kernels": kernels,
    "gpu": gpu,
    "prediction": prediction,
    "schedules": schedules,
    "loading": loading,
    "one-user": one_user,
    "speculation": speculation,
    "pace": pace,
    "server-overhead": server_tables.overhead,
    "serving": server_tables.serving,
    "queue-orders": queue_tables.orders,
    "prefix": prefix,
    "accuracy": accuracy,
    "accuracy-real": real_tables.perplexity,
    "accuracy-real-first": partial(real_tables.perplexity, context=2048),
    "accuracy-real-policies": real_tables.policies,
    "accuracy-rows": real_tables.rows,
    "weight-formats": real_tables.weight_formats,
    "accuracy-coverage": real_tables.coverage,
    "accuracy-layers": real_tables.layer_budgets,
    "accuracy-sparse-prefill": real_tables.sparse_prefill,
    "accuracy-sparse-prompts-time": real_tables.sparse_prompts_time,
    "accuracy-sparse-prompts-loss": real_tables.sparse_prompts_loss,
    "accuracy-quality": real_tables.quality,
    "recall-real": partial(real_tables.by_task, "recall"),
    "qa-real": partial(real_tables.by_task, "qa"),
    "generation-real": real_tables.generation,
    "recall": recall,
    "fleet-driver": fleet_tables.driver,
    "fleet-overhead": fleet_tables.overhead,
    "fleet-saturation": fleet_tables.saturation,
    "prefetch-waiting": hint_tables.waiting,
    "prefetch-hint": hint_tables.hint,
    "sketch-forms": hint_tables.forms,
    "huggingface": huggingface_tables.steps,
    "presses": huggingface_tables.presses,
}
"""By the name in a document."""


def filled(text: str, results: Results) -> str:
    """The document with every block as the records say.

    Raises:
        KeyError: a block has a name that is not there.
    """

    def block(match: re.Match[str]) -> str:
        content = BLOCKS[match[2]](results)
        return match[1] + (f"\n{content}\n\n" if content else "") + match[3]

    return _BLOCK.sub(block, text)


def main() -> int:
    """Write the documents, or say which of them are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("documents", nargs="*", type=Path, default=[ROOT / name for name in DOCUMENTS])
    args = parser.parse_args()
    stale = 0
    for path in args.documents:
        text = path.read_text(encoding="utf-8")
        wanted = filled(text, args.results)
        if wanted == text:
            continue
        if args.write:
            path.write_text(wanted, encoding="utf-8")
        else:
            print(f"{path} is not what the records say; python benchmarks/tables.py --write", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
