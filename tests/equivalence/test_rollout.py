"""The rollout is the engine: the same plans, step by step, for ragged batches, any caps, any schedule."""

import json

import pytest
import torch

import alisa.llm
from alisa import LLM, SamplingParams
from alisa.engine.placement import Placement
from alisa.engine.runner import ModelRunner
from alisa.policy.registry import reads_of
from alisa.scheduler.simulate import rollout

PROMPT_LENGTHS = (3, 41, 17, 60, 33, 25)
NEW_TOKENS = 30
THREE_PHASES = {
    "schedule": "three-phase",
    "offload_from": 8,
    "recompute_from": 24,
    "offload_ratio": 0.7,
    "recompute_ratio": 0.6,
}
STATIC = {"schedule": "static", "offload_ratio": 0.75}


def executed(monkeypatch, llm):
    """The plans that a run executed, and the memory it had."""
    plans, memories = [], []
    begin, build_kv_cache = ModelRunner.begin, alisa.llm.build_kv_cache
    monkeypatch.setattr(ModelRunner, "begin", lambda self, plan: (plans.append(plan), begin(self, plan))[1])
    monkeypatch.setattr(Placement, "keeps_rows", lambda self, sequence: True)

    def kept(*args, **options):
        memories.append(build_kv_cache(*args, **options))
        return memories[-1]

    monkeypatch.setattr(alisa.llm, "build_kv_cache", kept)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, llm.spec.vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    llm.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    return plans, memories[0]


@pytest.mark.parametrize("tokens", [None, 100, 40])
@pytest.mark.parametrize("policy", ["dense", "swa", "sketch"])
@pytest.mark.parametrize("schedule", [None, THREE_PHASES, STATIC])
def test_the_engine_does_what_the_rollout_says(schedule, policy, tokens, tiny_model, tmp_path, monkeypatch):
    if schedule is STATIC and tokens is not None:
        pytest.skip("a static split takes the device memory that it takes")
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(schedule))
    model = tiny_model("opt")
    cap = None if tokens is None else tokens * LLM(model, dtype="float32").describe()["kv_token_bytes"]
    llm = LLM(
        model,
        policy=policy,
        sparsity=0.6,
        dtype="float32",
        prefill_chunk=32,
        max_batch=4,
        kv_device_memory=cap,
        schedule=None if schedule is None else path,
    )
    plans, memory = executed(monkeypatch, llm)
    predicted = list(
        rollout(
            memory.scheduler,
            memory.limits,
            PROMPT_LENGTHS,
            NEW_TOKENS,
            reads_of(policy, 0.6),
            max_batch=4,
            prefill_chunk=32,
        )
    )
    assert predicted == plans


def test_sequences_that_lose_their_rows_are_read_again(tiny_model, monkeypatch):
    model = tiny_model("opt")
    token_bytes = LLM(model, dtype="float32").describe()["kv_token_bytes"]
    caps = {"kv_device_memory": 150 * token_bytes, "kv_disk_memory": 100 * token_bytes}
    llm = LLM(model, dtype="float32", **caps)
    plans, memory = executed(monkeypatch, llm)
    assert llm.summary().num_preempted > 0
    reads = reads_of("swa", 0.8)
    assert list(rollout(memory.scheduler, memory.limits, PROMPT_LENGTHS, NEW_TOKENS, reads)) == plans
