"""Whether layers that share the tokens of a step unequally lose less: `alisa tune`'s ways against each other.

    python benchmarks/layer_budgets.py --tune-text BOOK --text OTHER_BOOK
    python benchmarks/layer_budgets.py --model MODEL.gguf --tune-text BOOK --text DIR --sparsity 0.98 --steps 20 \
        --record benchmarks/results/layer_budgets.jsonl

What is found on one text is measured on another: the divergence from dense attention, KL(dense || policy) in nats a
token, of each window, and against that of equal budgets by pairs. It tells far smaller differences than perplexity.
The ways:

    equal    all layers read as many
    unread   water-filling by the share of the weight that is not read, by the sketch
    error    water-filling by the squared error of what attention gives (`alisa tune`)
    search   from equal budgets by zeroth-order steps (MeZO, 2305.17333; ZO-Bench, 2402.11592) on the divergence itself

The search is over the logits of a softmax, whose shares are the layers' parts of all tokens. A pair of opposite normal
steps gives a slope, several pairs a direction; the best that was seen is kept. With a normal distribution of budgets
and the other one of a pair as its baseline, the policy gradient (2406.10576) is the same estimate.

Prints one JSON record for each sparsity.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
from recording import tell
from torch import Tensor

from alisa.config import EngineConfig
from alisa.lab.bench.stamp import current_stamp
from alisa.lab.eval.divergence import Divergence
from alisa.lab.eval.documents import read_documents
from alisa.lab.eval.layer_losses import measure_layer_losses
from alisa.lab.eval.statistics import difference, mean
from alisa.lab.eval.subject import Subject
from alisa.lab.eval.windows import Window, cut_windows
from alisa.llm import LLM
from alisa.policy.layer_budgets import STEPS, share_out
from alisa.policy.registry import make_policy

POLICY = "sketch"
SPREAD = 0.3
"""Standard deviation of a step of a logit."""
PAIRS = 2
"""Pairs of opposite steps that a direction comes from."""
MOST = 4.0
"""A layer reads at most so many times what it would equally, and at least one part in as many."""


def divergence_of(windows: Divergence, layers: Sequence[float]) -> list[float]:
    """Under budgets of these sparsities."""
    return windows(make_policy(POLICY, 0.5, layers=tuple(layers)))


def budgets_of(logits: Tensor, sparsity: float) -> tuple[float, ...]:
    """The sparsities that logits Float64[L] stand for; their mean is `sparsity`, except for what the limits cut off."""
    parts = logits.softmax(0) * len(logits)
    for _ in range(20):
        parts = parts.clamp(1 / MOST, MOST)
        parts = parts / parts.mean()
    return tuple(round(min(max(1 - (1 - sparsity) * float(part), 0.0), 0.999), 4) for part in parts)


def search(loss: Divergence, num_layers: int, sparsity: float, steps: int) -> tuple[tuple[float, ...], int]:
    """The best budgets that were seen, and how many were tried."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(num_layers, dtype=torch.float64)
    best = budgets_of(logits, sparsity)
    least = mean(divergence_of(loss, best)).value
    for step in range(steps):
        direction = torch.zeros_like(logits)
        for _ in range(PAIRS):
            normal = torch.randn(num_layers, generator=generator, dtype=torch.float64)
            found = []
            for sign in (1, -1):
                budgets = budgets_of(logits + sign * SPREAD * normal, sparsity)
                found.append(mean(divergence_of(loss, budgets)).value)
                if found[-1] < least:
                    best, least = budgets, found[-1]
            direction -= (found[0] - found[1]) * normal
        logits += SPREAD * direction / direction.abs().max().clamp(min=1e-12)
        print(f"step {step}: {least:.6f} is the least", file=sys.stderr, flush=True)
    return best, 1 + 2 * PAIRS * steps


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="as for alisa generate; the model inside the package without it")
    parser.add_argument("--tune-text", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.98])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--tune-windows", type=int, default=2)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=0, help="of the search; 0: none")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--record", type=Path, help="append the records to this file")
    options = parser.parse_args()
    subject = Subject.of(LLM(config=EngineConfig(model=options.model, dtype=options.dtype, weight_dtype="float")))

    def windows(text: Path, count: int) -> list[Window]:
        documents = read_documents(text)
        return cut_windows(subject.tokenizer, documents, context=options.context, prefill=options.prefill, count=count)

    tuned_on = windows(options.tune_text, options.tune_windows)
    started = perf_counter()
    losses = measure_layer_losses(subject, POLICY, STEPS, tuned_on)
    measured_s = perf_counter() - started
    measured = Divergence(subject, windows(options.text, options.windows))
    reused = [layer[STEPS.index(0.95)].reused for layer in losses]
    for sparsity in options.sparsity:
        ways: dict[str, tuple[float, ...]] = {
            "equal": (sparsity,) * len(losses),
            "unread": share_out([[loss.unread for loss in layer] for layer in losses], STEPS, sparsity),
            "error": share_out([[loss.error for loss in layer] for layer in losses], STEPS, sparsity),
        }
        tried = 0
        if options.steps:
            loss = Divergence(subject, tuned_on)
            ways["search"], tried = search(loss, len(losses), sparsity, options.steps)
        units = {way: divergence_of(measured, budgets) for way, budgets in ways.items()}
        found = {}
        for way, of_windows in units.items():
            own, against = mean(of_windows), difference(of_windows, units["equal"])
            found[way] = {
                "layers": ways[way],
                "read": 1 - sum(ways[way]) / len(losses),
                "kl": own.value,
                "kl_error": own.standard_error,
                "against_equal": against.value,
                "against_equal_error": against.standard_error if way != "equal" else 0.0,
            }
        record = {
            "kind": "layer-budgets",
            "model": Path(subject.name).name,
            "sparsity": sparsity,
            "tune_text": options.tune_text.name,
            "text": options.text.name,
            "context": options.context,
            "prefill": options.prefill,
            "windows": len(units["equal"]),
            "measured_s": round(measured_s, 1),
            "tried": tried,
            "reused_at_0.95": reused,
            "ways": found,
            "stamp": asdict(current_stamp()),
        }
        tell(record, options.record)


if __name__ == "__main__":
    main()
