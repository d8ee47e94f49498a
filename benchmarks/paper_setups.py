"""The set-ups of ALISA's Figure 9 (arXiv 2403.17312) under this planner's model: ratios to FlexGen-like and vLLM-like.

Nothing is run: every figure comes from the presets in `alisa.planner.presets` and the assumptions in docs/planner.md.

    python benchmarks/paper_setups.py --output benchmarks/results/paper_setups.jsonl --plot docs/images/paper_setups.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from alisa.lab.plot.canvas import save
from alisa.lab.plot.ratios import draw_ratios
from alisa.planner.baselines import Baselines
from alisa.planner.footprint import row_bytes
from alisa.planner.load import RunConfig
from alisa.planner.presets import PRESETS
from alisa.planner.search import search
from alisa.planner.shapes import SHAPES
from alisa.planner.simulate import UniformWorkload

SETUPS = {
    "opt-6.7b": "v100-16gb",
    "llama-7b": "v100-16gb",
    "pythia-6.9b": "v100-16gb",
    "opt-13b": "v100-32gb",
    "llama-13b": "v100-32gb",
    "pythia-12b": "v100-32gb",
    "opt-30b": "h100-80gb",
    "llama-33b": "h100-80gb",
}
"""Model and card; the paper says only that the 30B class ran on the H100."""
BATCHES = (4, 8, 16, 32, 64)


def records() -> Iterator[dict[str, object]]:
    """One for each model and batch."""
    for name, card in SETUPS.items():
        spec, hardware = SHAPES[name], PRESETS[card]
        for batch in BATCHES:
            work = UniformWorkload(batch, 128, 512)
            ours = search(spec, work, hardware, [RunConfig("swa", 0.8, "float16", "int8")])
            paper = RunConfig("swa", 0.8, "float16", "int8", hit_rate=0.0)
            summed = search(spec, work, hardware, [paper], overlap=False)
            others = Baselines(spec, "float16", hardware, work)
            paging = [others.block_paging("recompute").seconds, others.block_paging("swap").seconds]
            seconds = {
                "static": others.static_split().seconds,
                "paging": min((value for value in paging if value is not None), default=None),
                "ours": ours.best.seconds(overlap=True) if ours else None,
                "paper_sum": summed.best.seconds(overlap=False) if summed else None,
                "literal": None,
            }
            if summed is not None:  # equation 3, read literally: all of theta_c = alpha (j + s) goes down in every step
                again = sum(
                    weight * spec.num_layers * hardware.write.seconds(load.below_tokens, row_bytes(spec, "int8"))
                    for load, weight in zip(summed.best.timeline.loads, summed.best.timeline.weights, strict=True)
                    if not load.prefill
                )
                seconds["literal"] = seconds["paper_sum"] + summed.best.waves * again
            yield {
                "kind": "ratios",
                "model": name,
                "hardware": card,
                "batch": batch,
                **{f"{key}_s": value for key, value in seconds.items()},
                **{
                    f"{way}_vs_{other}": seconds[other] / seconds[way] if seconds[other] and seconds[way] else None
                    for way in ("ours", "paper_sum", "literal")
                    for other in ("static", "paging")
                },
            }


def main() -> None:
    """Print the table, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    found = list(records())
    keys = [f"{way}_vs_{other}" for other in ("static", "paging") for way in ("ours", "paper_sum", "literal")]
    print("| model | card | batch | " + " | ".join(keys) + " |")
    for record in found:
        ratios = [f"{record[key]:.2f}" if record[key] else "-" for key in keys]
        print(f"| {record['model']} | {record['hardware']} | {record['batch']} | " + " | ".join(ratios) + " |")
    if args.output is not None:
        args.output.write_text("".join(json.dumps(record) + "\n" for record in found))
    if args.plot is not None:
        save(draw_ratios(found), args.plot)


if __name__ == "__main__":
    main()
