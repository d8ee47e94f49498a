"""Whole steps of two models of random weights, so that a profile's prices are those of steps and not of parts alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

import torch

from alisa.lab.bench.uniform_batch import UniformBatch, run_uniform_batch
from alisa.model.decoder import Decoder
from alisa.model.loader import random_decoder
from alisa.planner.cost import CostModel, StepCost
from alisa.planner.hardware import Hardware
from alisa.planner.load import RunConfig
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
BATCHES = (
    UniformBatch("dense", 1, _PROMPT, _OUTPUT),
    UniformBatch("dense", 4, _PROMPT, _OUTPUT),
    UniformBatch("dense", 16, _PROMPT, _OUTPUT),
    UniformBatch("swa", 1, _PROMPT, _OUTPUT),
    UniformBatch("swa", 16, _PROMPT, _OUTPUT, kv_dtype="int8"),
    UniformBatch("sketch", 1, _PROMPT, _OUTPUT),
    UniformBatch("sketch", 16, _PROMPT, _OUTPUT),
    UniformBatch("swa", 8, _PROMPT, _OUTPUT, cap=0.4),
    UniformBatch("sketch", 8, _PROMPT, _OUTPUT, cap=0.4),
    UniformBatch("dense", 2, _PROMPT, _OUTPUT, cap=0.7, scheduler=_STATIC),
    UniformBatch("dense", 8, _PROMPT, _OUTPUT, cap=0.7, scheduler=_STATIC),
    UniformBatch("swa", 4, _PROMPT, _OUTPUT, cap=0.5, scheduler=_DELETES),
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
        run_uniform_batch(UniformBatch("dense", 2, 16, 4), decoder, directory)
        for uniform in BATCHES:
            progress(f"whole steps of model {number + 1}: {uniform.policy}, {uniform.batch} sequences")
            observed.append(_observe(uniform, decoder, hardware, directory))
    return corrected(hardware, "bfloat16", observed)


def _observe(uniform: UniformBatch, decoder: Decoder, hardware: Hardware, directory: Path) -> Observation:
    """The median of the decode steps of a batch, part by part, and what was to be expected."""
    method = RunConfig(uniform.policy, uniform.sparsity, "bfloat16", uniform.kv_dtype)
    cost = CostModel(decoder.spec, method, hardware)
    run = run_uniform_batch(uniform, decoder, directory)
    prompts = [uniform.prompt_len] * uniform.batch
    timeline = simulate(cost, method, run.setup.placement, run.setup.limits, prompts, uniform.output_len)
    steps = [record for record in run.records if not record.prefill][_SKIPPED:]
    said = list(zip(timeline.loads, timeline.costs, strict=True))
    said = [(load, price) for load, price in said if not load.prefill][_SKIPPED:]
    return Observation(
        num_layers=decoder.spec.num_layers,
        batch=uniform.batch,
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
