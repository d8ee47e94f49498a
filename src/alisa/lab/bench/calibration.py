"""Whole steps of two models of random weights, so that a profile's prices are those of steps and not of parts alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

import torch

from alisa.lab.bench.trial import Trial, run_trial
from alisa.model.decoder import Decoder
from alisa.model.loader import random_decoder
from alisa.planner.cost import CostModel, StepCost
from alisa.planner.hardware import Hardware
from alisa.planner.load import Method
from alisa.planner.profile.correction import Observation, corrected
from alisa.planner.shapes import llama_shape, opt_shape
from alisa.planner.simulate import simulate
from alisa.scheduler.placement.static import StaticSplit
from alisa.scheduler.placement.three_phase import Schedule, ThreePhase

_MODELS = (
    opt_shape(10, 1024, 16, vocab_size=8192),
    llama_shape(8, 1280, 20, num_kv_heads=5, ffn_size=3456, vocab_size=8192),
)
"""Both have 0.25 GB of weights in 16 bits: no cache holds them, and their random numbers are drawn in a second."""

_DELETES = ThreePhase(Schedule(offload_from=0, recompute_from=4, offload_ratio=0.7, recompute_ratio=0.5))
_STATIC = StaticSplit(0.5)
_PROMPT, _OUTPUT = 96, 14
TRIALS = (
    Trial("dense", 1, _PROMPT, _OUTPUT),
    Trial("dense", 4, _PROMPT, _OUTPUT),
    Trial("dense", 16, _PROMPT, _OUTPUT),
    Trial("swa", 1, _PROMPT, _OUTPUT),
    Trial("swa", 16, _PROMPT, _OUTPUT, kv_dtype="int8"),
    Trial("sketch", 1, _PROMPT, _OUTPUT),
    Trial("sketch", 16, _PROMPT, _OUTPUT),
    Trial("swa", 8, _PROMPT, _OUTPUT, cap=0.4),
    Trial("sketch", 8, _PROMPT, _OUTPUT, cap=0.4),
    Trial("dense", 2, _PROMPT, _OUTPUT, cap=0.7, scheduler=_STATIC),
    Trial("dense", 8, _PROMPT, _OUTPUT, cap=0.7, scheduler=_STATIC),
    Trial("swa", 4, _PROMPT, _OUTPUT, cap=0.5, scheduler=_DELETES),
)
_SKIPPED = 4
"""First decode steps, which allocate what later ones use again."""


def calibrate(hardware: Hardware, directory: Path, progress: Callable[[str], None]) -> Hardware:
    """The machine with prices that whole steps in bfloat16 confirm; takes about fifteen seconds.

    Args:
        hardware: what the parts cost alone.
        directory: whose disk takes the rows below.
        progress: told what is measured next.
    """
    observed = []
    for number, spec in enumerate(_MODELS):
        decoder = random_decoder(spec, torch.bfloat16, torch.device("cpu"), 0)
        run_trial(Trial("dense", 2, 16, 4), decoder, directory)
        for trial in TRIALS:
            progress(f"whole steps of model {number + 1}: {trial.policy}, {trial.batch} sequences")
            observed.append(_observe(trial, decoder, hardware, directory))
    return corrected(hardware, "bfloat16", observed)


def _observe(trial: Trial, decoder: Decoder, hardware: Hardware, directory: Path) -> Observation:
    """The median of the decode steps of a trial, part by part, and what was to be expected."""
    method = Method(trial.policy, trial.sparsity, "bfloat16", trial.kv_dtype)
    cost = CostModel(decoder.spec, method, hardware)
    run = run_trial(trial, decoder, directory)
    prompts = [trial.prompt_len] * trial.batch
    timeline = simulate(cost, method, run.setup.placement, run.setup.limits, prompts, trial.output_len)
    steps = [record for record in run.records if not record.prefill][_SKIPPED:]
    said = list(zip(timeline.loads, timeline.costs, strict=True))
    said = [(load, price) for load, price in said if not load.prefill][_SKIPPED:]
    return Observation(
        num_layers=decoder.spec.num_layers,
        batch=trial.batch,
        chooser=cost.chooser,
        tiers=run.setup.placement.uses_tiers,
        waits=fmean(cost.waits(load) for load, _ in said),
        predicted=sum((price for _, price in said), StepCost()).times(1 / len(said)),
        linear_s=median(step.linear_s for step in steps),
        attention_s=median(step.attention_s for step in steps),
        selection_s=median(step.selection_s for step in steps),
        transfer_s=median(step.transfer_s for step in steps),
        other_s=median(step.other_s for step in steps),
    )
