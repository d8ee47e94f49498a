"""Dense and sparse attention side by side, on the small model inside the package.

    python examples/demo.py [MODEL]

Eight prompts are continued twice: reading every earlier token in each step, and reading a fifth of them. The table says
what that changed: how much of the KV cache was read, how fast it went, how often both would pick the same next token.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from alisa import LLM, SamplingParams
from alisa.lab.verify import verify_outputs

SPARSITY = 0.8
PARAMS = SamplingParams(max_tokens=80, temperature=0.7, top_p=0.9, ignore_eos=True)
PROMPTS = Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8").splitlines()


def main(model: str | None = None) -> None:
    """Run the comparison on `model`, by default the one inside the package, and print it."""
    console = Console(highlight=False)
    dense = LLM(model, policy="dense")
    sparse = LLM(model, policy="sketch", sparsity=SPARSITY)
    size = f"{dense.spec.num_parameters / 1e6:.1f} million parameters"
    what = f"The small model inside the package ({size}, trained on 19th-century prose)" if model is None else model
    console.print(f"{what} continues {len(PROMPTS)} prompts by {PARAMS.max_tokens} tokens each.")

    table = Table("", "dense", "sparse", title="what one decode step costs")
    columns = []
    for llm in (dense, sparse):
        with console.status(f"{llm.config.policy}: generating, then comparing with dense attention"):
            outputs = llm.generate(PROMPTS, PARAMS)
            summary, verified = outputs.report.summary, verify_outputs(llm, outputs, num_samples=2)
        columns.append(
            (
                f"{summary.tokens_attended / summary.tokens_dense:.0%}",
                f"{summary.attention_s / summary.decode_s:.0%}",
                f"{summary.decode_tokens / summary.decode_s:.0f} tok/s",
                f"{verified.top1_agreement:.1%}",
                f"{verified.lost_mass:.1%}",
            )
        )
    labels = (
        "KV cache read",
        "attention's share of the time",
        "decode speed, all prompts together",
        "same next token as dense",
        "attention weight on tokens not read",
    )
    for label, values in zip(labels, zip(*columns, strict=True), strict=True):
        table.add_row(label, *values)
    console.print(table)
    text = " ".join(outputs[0].text.split())
    console.print(Panel(Text(f"...{PROMPTS[0][-80:]} >>> {text} ..."), title="a continuation, sparse"))
    console.print(
        "A model this small spends its time on weights and bookkeeping, not on the KV cache, so reading less of the "
        "cache hardly shows in its speed; it shows with larger models and longer texts (benchmarks/).\n"
        'Next: alisa generate "The ship had been at sea for" --verify'
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
