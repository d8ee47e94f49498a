"""Sequences that give way: they say the same, greedy or drawn, whether their rows wait for them or are made again."""

import json

import pytest
import torch

from alisa import LLM, SamplingParams
from alisa.engine.costs import MeasuredCosts
from tests.caps import device_cap

PROMPT_LENGTHS = (23, 41, 17, 38, 30, 25)
NEW_TOKENS = 23  # the longest sequence takes one block of policy state


def prompts_for(llm):
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, llm.spec.vocab_size, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


PARAMS = [
    SamplingParams(max_tokens=NEW_TOKENS, temperature=0.9 * (index % 2), top_p=0.95, seed=index, ignore_eos=True)
    for index in range(len(PROMPT_LENGTHS))
]


SIZES = {"max_num_seqs": len(PROMPT_LENGTHS), "max_model_len": max(PROMPT_LENGTHS) + NEW_TOKENS}


def run(llm):
    """Tokens of every prompt, and the report."""
    outputs = llm.generate(prompts_for(llm), PARAMS)
    assert all(output.finish_reason == "length" for output in outputs)
    return [output.token_ids for output in outputs], outputs.report


@pytest.mark.parametrize("policy", ["dense", "swa", "sketch"])
@pytest.mark.parametrize("keeps_rows", [True, False])
def test_a_sequence_that_gives_way_says_what_it_would_have_said(policy, keeps_rows, tiny_model, monkeypatch):
    """Swapped, its rows wait in lower tiers; preempted, prompt and output go through the model again."""
    options = {"policy": policy, "sparsity": 0.5, "dtype": "float32", **SIZES}
    everything = LLM(tiny_model("llama-gqa-tied"), **options)
    expected, _ = run(everything)
    monkeypatch.setattr(MeasuredCosts, "keeps_rows", lambda self, request: keeps_rows)
    disk = None if keeps_rows else 20 * everything.describe()["kv_token_bytes"]
    cap = device_cap(everything, 150)
    found, report = run(LLM(tiny_model("llama-gqa-tied"), **options, kv_device_memory=cap, kv_disk_memory=disk))
    assert found == expected
    assert report.summary.num_preempted > 0
    read = sum(record.num_tokens for record in report.records if record.prefill)
    assert (read == sum(PROMPT_LENGTHS)) == keeps_rows


def test_a_new_sequence_is_not_read_by_the_history_of_the_one_before_it(tiny_model, tmp_path):
    """Same req_idx, same length: what was chosen ahead for the old one must not be used for the new one."""
    schedule = tmp_path / "schedule.json"
    schedule.write_text(json.dumps({"schedule": "three-phase"}))
    generator = torch.Generator().manual_seed(5)
    lengths = (20, 20, 29, 38, 47, 56, 65)  # each as long as the one before it ends, plus one
    prompts = [torch.randint(3, 120, (length,), generator=generator).tolist() for length in lengths]
    params = [SamplingParams(max_tokens=100 if index == 0 else 10, ignore_eos=True) for index in range(len(lengths))]

    def run(**options):
        llm = LLM(tiny_model("opt"), dtype="float32", max_num_seqs=2, **options)
        return [output.token_ids for output in llm.generate(prompts, params)]

    assert run() == run(schedule=schedule)
