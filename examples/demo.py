"""Dense and sparse attention side by side, on the small model inside the package.

    python examples/demo.py [MODEL]

Eight prompts are continued twice: reading every earlier token in each step, and reading a fifth of them. The first
table says what that changed: how much of the KV cache was read, how fast it went, how often both would pick the same
next token. Then both run again with a quarter of the memory for K and V: that changes no word, only the speed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from alisa import LLM, SamplingParams
from alisa.config import format_bytes
from alisa.lab.bench.session import RunSpec, batch_config, device_cap_within
from alisa.lab.verify import verify_outputs
from alisa.llm import RunOutput

SPARSITY = 0.8
PARAMS = SamplingParams(max_tokens=80, temperature=0.7, top_p=0.9, ignore_eos=True)
PROMPTS = Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8").splitlines()


def with_a_quarter(llm: LLM, whole: RunOutput) -> RunOutput:
    """The same prompts, with room on the device for a quarter of K and V; the rest goes to disk, or waits its turn."""
    config = batch_config(llm.config, [len(output.prompt_ids) for output in whole], PARAMS.max_tokens)
    cap = device_cap_within(llm.decoder, RunSpec(config), whole.report.summary.kv_peak_bytes // 4)
    with LLM(config=replace(config, kv_device_memory=cap)) as small:
        return small.generate(PROMPTS, PARAMS)


def costs(llm: LLM, outputs: RunOutput) -> dict[str, str]:
    """What a decode step read and took, and how far it is from dense attention."""
    summary, verified = outputs.report.summary, verify_outputs(llm, outputs, num_samples=2)
    return {
        "KV cache read": f"{summary.tokens_attended / summary.tokens_dense:.0%}",
        "attention's share of the time": f"{summary.attention_s / summary.decode_s:.0%}",
        "decode speed, all prompts together": f"{summary.decode_tokens / summary.decode_s:.0f} tok/s",
        "same next token as dense": f"{verified.top1_agreement:.1%}",
        "attention weight on tokens not read": f"{verified.lost_mass:.1%}",
    }


def costs_of_a_quarter(whole: RunOutput, small: RunOutput) -> dict[str, str]:
    """What became of memory, speed and text."""
    summary, all_bytes = small.report.summary, whole.report.summary.kv_peak_bytes
    num_same = sum(a.text == b.text for a, b in zip(whole, small, strict=True))
    return {
        "most K and V in memory": f"{format_bytes(summary.kv_peak_bytes)} of {format_bytes(all_bytes)}",
        "decode speed, all prompts together": f"{summary.decode_tokens / summary.decode_s:.0f} tok/s",
        "same text as with all memory": f"{num_same} of {len(whole)}",
    }


def table(title: str, dense: dict[str, str], sparse: dict[str, str]) -> Table:
    """Both beside each other."""
    found = Table("", "dense", "sparse", title=title)
    for label, value in dense.items():
        found.add_row(label, value, sparse[label])
    return found


def main(model: str | None = None) -> None:
    """Run the comparison on `model`, by default the one inside the package, and print it."""
    console = Console(highlight=False)
    dense = LLM(model, policy="dense")
    sparse = LLM(model, policy="sketch", sparsity=SPARSITY)
    size = f"{dense.spec.num_parameters / 1e6:.1f} million parameters"
    what = f"The small model inside the package ({size}, trained on 19th-century prose)" if model is None else model
    console.print(f"{what} continues {len(PROMPTS)} prompts by {PARAMS.max_tokens} tokens each.")

    with console.status("generating, then comparing with dense attention"):
        dense_outputs, sparse_outputs = dense.generate(PROMPTS, PARAMS), sparse.generate(PROMPTS, PARAMS)
        found = table("what one decode step costs", costs(dense, dense_outputs), costs(sparse, sparse_outputs))
    console.print(found)
    with console.status("the same with a quarter of the memory"):
        found = table(
            "the same with a quarter of the memory for K and V",
            costs_of_a_quarter(dense_outputs, with_a_quarter(dense, dense_outputs)),
            costs_of_a_quarter(sparse_outputs, with_a_quarter(sparse, sparse_outputs)),
        )
    console.print(found)
    text = " ".join(sparse_outputs[0].text.split())
    console.print(Panel(Text(f"...{PROMPTS[0][-80:]} >>> {text} ..."), title="a continuation, sparse"))
    console.print(
        "A model this small spends its time on weights and bookkeeping, not on the KV cache: choosing what to read "
        "saves little here, or costs more than it saves. It pays where K and V are many: in batches of larger models "
        "with long texts (benchmarks/).\n"
        'Next: alisa generate "The ship had been at sea for" --verify'
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
