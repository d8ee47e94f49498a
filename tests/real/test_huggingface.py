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


WAYS = {
    "greedy": {},
    "2 beams": {"num_beams": 2},
    "3 beams": {"num_beams": 3},
    "4 beams, 3 texts": {"num_beams": 4, "num_return_sequences": 3},
    "sampling, 2 texts": {"do_sample": True, "temperature": 0.8, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
}


def generate(reference: Reference, inputs: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    torch.manual_seed(5)
    return reference.model.generate(**inputs, **(OPTIONS | options), pad_token_id=0)


def eager(reference: Reference, inputs: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    former = reference.model.config._attn_implementation
    reference.model.set_attn_implementation("eager")
    said = generate(reference, inputs, **options)
    reference.model.set_attn_implementation(former)
    return said


@pytest.mark.parametrize("way", WAYS)
def test_dense_says_what_eager_attention_says(reference: Reference, way: str) -> None:
    inputs = padded(reference)
    expected = eager(reference, inputs, **WAYS[way])
    with alisa.hf.attach(reference.model, policy="dense", max_model_len=512):
        assert generate(reference, inputs, **WAYS[way]).equal(expected)


def test_a_prompt_that_is_longer_than_the_window_is_read_in_chunks(reference: Reference) -> None:
    """Gemma 3 has windows of 512 tokens."""
    ids = reference.tokenizer("\n".join(PROMPTS * 2)).input_ids
    assert 600 < len(ids) < 900
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    options = {"max_new_tokens": 8, "num_beams": 2, "prefill_chunk_size": 250}
    expected = eager(reference, inputs, **options)
    with alisa.hf.attach(reference.model, policy="dense", max_model_len=1024):
        assert generate(reference, inputs, **options).equal(expected)


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
