"""Real models in transformers say what they say in eager attention, and with a sparse policy what our engine says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate", reason="transformers needs it to read GGUF files")

import alisa.hf
from alisa import LLM, SamplingParams
from tests.real.conftest import Reference
from tests.real.texts import PROMPTS

pytestmark = [
    pytest.mark.real,
    # transformers holds the file open until it is collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
NUM_NEW = 24
OPTIONS = {"max_new_tokens": NUM_NEW, "do_sample": False}


def padded(reference: Reference) -> dict[str, torch.Tensor]:
    """Some prompts of several lengths, padded on the left."""
    ids = [reference.tokenizer(prompt).input_ids for prompt in PROMPTS[:4]]
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in ids]),
    }


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}])
def test_dense_says_what_eager_attention_says(reference: Reference, options: dict[str, int]) -> None:
    model, inputs = reference.model, padded(reference)
    former = model.config._attn_implementation
    model.set_attn_implementation("eager")
    expected = model.generate(**inputs, **OPTIONS, **options, pad_token_id=0)
    model.set_attn_implementation(former)
    with alisa.hf.attach(model, policy="dense", max_model_len=512):
        found = model.generate(**inputs, **OPTIONS, **options, pad_token_id=0)
    assert found.equal(expected)


@pytest.mark.parametrize("policy", ["sketch", "swa"])
def test_a_sparse_policy_says_what_it_says_in_the_engine(reference: Reference, policy: str) -> None:
    """With one `max_model_len`: a window that it does not exceed is none, and the policy chooses there too."""
    inputs, model = padded(reference), reference.model
    prompts = [
        row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    settings = {"policy": policy, "sparsity": 0.5, "max_model_len": 512}
    with LLM(str(reference.path), dtype="float32", weight_dtype="float", **settings) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=NUM_NEW, ignore_eos=True))
    with alisa.hf.attach(model, **settings):
        found = model.generate(**inputs, **OPTIONS, min_new_tokens=NUM_NEW, eos_token_id=None, pad_token_id=0)
    assert found[:, -NUM_NEW:].tolist() == [list(output.token_ids) for output in outputs]
